"""The file that tells other commands where the stack is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.stack_files import ENDPOINTS, stack_file
from typer.testing import CliRunner

from local.stack.parts.server import env
from pretrade.client.cli.main import app
from pretrade.client.stack_file import NoStackError, StackFile, StackFormatError, running_stack, stack_endpoint


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """The directory of a stack that runs."""
    with stack_file(tmp_path):
        yield tmp_path


def test_what_is_written_is_read(running: Path) -> None:
    stack = StackFile.read(running)
    assert stack is not None
    assert stack.endpoints == ENDPOINTS
    stack.write(running)
    assert StackFile.read(running) == stack
    assert stat.S_IMODE((running / "stack.json").stat().st_mode) == 0o600


def test_there_is_no_stack_without_a_file(tmp_path: Path) -> None:
    assert StackFile.read(tmp_path) is None
    assert StackFile.read(tmp_path / "nowhere") is None


def test_the_file_of_a_stack_that_was_killed_is_ignored_though_its_process_id_lives_again(tmp_path: Path) -> None:
    with stack_file(tmp_path) as stack:
        assert stack.pid == os.getpid()
    assert StackFile.read(tmp_path) is None
    (tmp_path / "lock").unlink()
    assert StackFile.read(tmp_path) is None


def test_a_stack_that_was_killed_does_not_run_while_its_parts_are_being_ended(running: Path) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    StackFile(pid=child, endpoints=ENDPOINTS, processes={}).write(running)
    assert StackFile.read(running) is None
    with pytest.raises(NoStackError, match="still starting, or about to end"):
        running_stack(running)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {},
        lambda _: [],
        lambda whole: whole | {"since": 1},
        lambda whole: whole | {"pid": "1"},
        lambda whole: whole | {"processes": ["valkey"]},
        lambda whole: whole | {"processes": {"valkey": "1"}},
        lambda whole: whole | {"endpoints": whole["endpoints"] | {"admin": 7}},
        lambda whole: whole | {"endpoints": whole["endpoints"] | {"admin_port": "7"}},
        lambda whole: whole | {"endpoints": whole["endpoints"] | {"management": {"primary": 7}}},
        lambda whole: whole | {"endpoints": whole["endpoints"] | {"instruments": "BTCUSDT.SIM"}},
        lambda whole: whole | {"endpoints": {name: one for name, one in whole["endpoints"].items() if name != "admin"}},
    ],
)
def test_a_file_of_another_shape_is_an_error(running: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = running / "stack.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(StackFormatError):
        StackFile.read(running)
    with pytest.raises(NoStackError, match="started by another version of pretrade"):
        running_stack(running)


def test_a_stack_without_the_part_is_named(running: Path) -> None:
    assert stack_endpoint(running, "decision") == "127.0.0.1:6"
    with pytest.raises(NoStackError, match=f"{running} has no challenger endpoint: give --target HOST:PORT"):
        stack_endpoint(running, "challenger")


def test_a_stack_that_is_starting_is_not_called_missing(running: Path) -> None:
    (running / "stack.json").unlink()
    with pytest.raises(NoStackError, match="still starting, or about to end"):
        running_stack(running)


def test_a_stack_of_another_user_is_not_called_missing(running: Path) -> None:
    ours = os.geteuid()
    if ours:
        (running / "stack.json").chmod(0)
    else:
        os.seteuid(65_534)  # root may read every file
    try:
        with pytest.raises(NoStackError, match="belongs to another user"):
            running_stack(running)
    finally:
        os.seteuid(ours)


COMMANDS = (
    ("decide BTCUSDT.SIM buy 0.05", "--target HOST:PORT, or PRETRADE_TARGET"),
    ("status", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("state halted --reason test --yes", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("breaker primary open --reason test --yes", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("changes", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("canary status", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("models list", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("features BTCUSDT.SIM", "--redis URL"),
    ("audit list", "--database-url URL or --journal FILE"),
    ("audit outcome 0197 --filled 1 --price 1 --reporter x", "--target HOST:PORT, or PRETRADE_ADMIN_TARGET"),
    ("kill valkey", None),
)


@pytest.mark.parametrize(("line", "instead"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_every_command_that_finds_no_stack_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, instead: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, line.split())
    said = " ".join(result.output.split())
    assert result.exit_code == 3, result.output
    assert f"No stack runs in {tmp_path}/.pretrade." in said
    assert "pretrade up" in said
    assert "cd to its folder" in said
    assert "PRETRADE_LOCAL_DIR" in said
    assert instead is None or f"If a server runs elsewhere: {instead}" in said
    assert "Traceback" not in said
    assert "Usage:" not in said


def test_the_database_is_shown_without_its_password() -> None:
    assert ENDPOINTS.database_address == "127.0.0.1:3"
    for url, address in (
        ("postgresql+psycopg://ours:pa#ss/w:rd@db.example:5432/pretrade", "db.example:5432"),
        ("postgresql://ours@db.example/pretrade", "db.example"),
        ("postgresql://ours:secret@[::1]:5432/pretrade", "[::1]:5432"),
    ):
        assert replace(ENDPOINTS, database_url=url).database_address == address
    assert replace(ENDPOINTS, database_url="sqlite:///audit.db").database_address is None


def test_the_server_is_told_what_the_stack_has_and_keeps_its_defaults_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PRETRADE_BUDGET__CAP_SECONDS", "0.2")
    values = env(ENDPOINTS, {"decision": 6, "admin": 7, "metrics": 8, "http": 9})
    assert values["PRETRADE_HTTP__PORT"] == "9"
    assert values["PRETRADE_REDIS_URL"] == "redis://:word@127.0.0.1:1/0"
    assert values["PRETRADE_REPLICAS__PRIMARY"] == "127.0.0.1:4"
    assert "PRETRADE_REPLICAS__CHALLENGER" not in values
    assert values["PRETRADE_INSTRUMENTS"] == '["BTCUSDT.SIM"]'
    assert values["PRETRADE_BUDGET__CAP_SECONDS"] == "0.2"


def test_people_see_where_redis_is_and_not_its_password() -> None:
    assert ENDPOINTS.redis_address == "redis://127.0.0.1:1/0"
    cluster = replace(ENDPOINTS, redis_url="redis+cluster://u:w@a:1,b:2")
    assert cluster.redis_address == "redis+cluster://a:1,b:2"
