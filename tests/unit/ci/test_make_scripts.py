"""What `make setup` and `make clean` run: what they say, and what they leave alone."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

CI: Final = Path(__file__).parents[3] / ".ci"
PIP: Final = """
print("Collecting torch==2.13.0 (from pretrade-server==0.1.0)")
print("  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)")
print("  Downloading grpcio-1.85.1-cp311-cp311-manylinux2014_x86_64.whl (7.4 MB)")
print("  Using cached duckdb-2.0.0-cp311-cp311-manylinux_2_28_x86_64.whl (20.5 MB)")
print("Installing collected packages: torch, grpcio, duckdb")
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that holds nothing but the scripts, in a folder with a space."""
    root = tmp_path / "a clone"
    shutil.copytree(CI, root / ".ci")
    return root


def interpreter(path: Path, version: tuple[int, int], pip: str = PIP) -> Path:
    """A Python that makes environments of itself, and in whose environments pip does this."""
    code = f"""#!{sys.executable}
import pathlib, runpy, sys
if sys.argv[1:2] == ["-c"]:
    sys.version_info = {version}
    exec(sys.argv[2])
elif sys.argv[1:] == ["--version"]:
    print("Python {version[0]}.{version[1]}.0")
elif sys.argv[1:3] == ["-m", "venv"]:
    made = pathlib.Path(sys.argv[3], "bin", "python")
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(pathlib.Path(__file__).read_text())
    made.chmod(0o755)
else:
    print(*sys.argv[1:])
    exec({pip!r})
"""
    path.write_text(code)
    path.chmod(0o755)
    return path


def setup(clone: Path, python: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [str(clone / ".ci" / "setup"), str(python), ".venv"]
    env = os.environ | environment
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_setup_says_what_it_takes_and_shows_what_is_large(clone: Path) -> None:
    done = setup(clone, interpreter(clone / "python3", (3, 11)))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert "2 to 10 minutes" in lines[0]
    assert lines[-4:] == [
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.6 MB)",
        "  Using cached duckdb-2.0.0-cp311-cp311-manylinux_2_28_x86_64.whl (20.5 MB)",
        "  Installing all of them",
        "  Compiling them",
    ]
    assert "grpcio" in (clone / ".venv" / "setup.log").read_text()


def test_setup_installs_by_hash_what_the_locks_name_when_it_is_told_to(clone: Path) -> None:
    def installed(**environment: str) -> str:
        done = setup(clone, interpreter(clone / "python3", (3, 11)), **environment)
        assert done.returncode == 0, done.stderr
        return (clone / ".venv" / "setup.log").read_text()

    locked = installed(LOCKED="1", TORCH="")
    by_hash = r"--no-deps --require-hashes --requirement (\S+)"
    assert re.findall(by_hash, locked) == ["requirements/torch.txt", "requirements/dev.txt"]
    assert "--no-deps --no-build-isolation --editable ./client --editable .\n" in locked
    own = installed(LOCKED="1", TORCH="torch==2.13.0")
    assert re.findall(by_hash, own) == ["requirements/dev.txt"]
    assert "--no-deps torch==2.13.0" in own
    assert "--require-hashes" not in installed(LOCKED="", TORCH="")


def test_make_hands_its_variables_to_setup(tmp_path: Path) -> None:
    command = ["make", "--dry-run", "--always-make", f"VENV={tmp_path / 'none'}", "setup", "LOCKED=1", "TORCH=torch==2"]
    planned = subprocess.run(command, cwd=CI.parent, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f'LOCKED="1" TORCH="torch==2" .ci/setup "python3" "{tmp_path / "none"}"' in planned


def test_setup_says_which_python_it_needs(clone: Path) -> None:
    old = setup(clone, interpreter(clone / "python3", (3, 10)))
    assert old.returncode == 1
    assert "is Python 3.10.0, and 3.11 or newer is needed. Name one: make setup PYTHON=python3.12" in old.stderr
    assert not (clone / ".venv").exists()
    new = setup(clone, interpreter(clone / "python3", (3, 14)))
    assert new.returncode == 0
    assert "Python 3.14.0 is newer than what this was tested with, 3.11 to 3.13" in new.stderr


def test_setup_without_any_python_says_so(clone: Path) -> None:
    none = setup(clone, clone / "nothing")
    assert none.returncode == 1
    assert f"there is no {clone}/nothing here" in none.stderr
    assert not (clone / ".venv").exists()


def test_setup_shows_why_pip_failed(clone: Path) -> None:
    failing = 'print("ERROR: No space left on device"); raise SystemExit(1)'
    done = setup(clone, interpreter(clone / "python3", (3, 11), failing))
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[-2] == "ERROR: No space left on device"
    assert said[-1].startswith("setup: pip failed; its whole output is in .venv/setup.log.")


def clean(clone: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(clone / ".ci" / "clean"), ".venv", ".venv-deploy"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_clean_removes_what_make_made_and_nothing_else(clone: Path) -> None:
    made = [
        ".pretrade/postgres",
        ".venv/bin",
        ".venv-deploy",
        ".mypy_cache",
        "dist",
        "x.egg-info",
        "server/__pycache__",
    ]
    for name in made:
        (clone / name).mkdir(parents=True)
    for name in ("app.py", "fast_c.pyx", "fast_c.cpython-311-x86_64-linux-gnu.so"):
        (clone / "server" / name).touch()
    assert clean(clone).returncode == 0
    assert sorted(path.name for path in clone.iterdir()) == [".ci", "server"]
    assert sorted(path.name for path in (clone / "server").iterdir()) == ["app.py", "fast_c.pyx"]
    assert clean(clone).returncode == 0


def test_clean_leaves_everything_while_a_stack_runs(clone: Path) -> None:
    (clone / ".pretrade").mkdir()
    (clone / ".venv").mkdir()
    with (clone / ".pretrade" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = clean(clone)
        assert (done.returncode, (clone / ".venv").exists()) == (1, True)
        assert f"a stack runs in {clone}/.pretrade: end it first, with Ctrl-C where it was started" in done.stderr
    assert clean(clone).returncode == 0
    assert not (clone / ".pretrade").exists()
