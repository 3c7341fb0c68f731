"""The JavaScript client in client/js, installed and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

_ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = _ROOT / "client/js"
_LACKING: Final = {3: "needs npm and Node 20 or newer", 4: "npm cannot install the packages of client/js"}
"""Why there is none here, by the exit code of `.ci/js`."""


@pytest.fixture(scope="session")
def js_client() -> Path:
    """The folder of the package, ready to be used."""
    argv = [sys.executable, str(_ROOT / ".ci/js")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=170, check=False)
    if done.returncode in _LACKING:
        pytest.skip(_LACKING[done.returncode])
    assert done.returncode == 0, done.stdout + done.stderr
    return PACKAGE


def node_tests(*files: str, **environment: str) -> None:
    """Runs tests of the package, which have to pass.

    Args:
        files: In its folder.
        environment: Besides that of this process.
    """
    argv = ["node", "--test", "--test-concurrency=4", *files]  # they wait more than they work
    env = os.environ | environment
    done = subprocess.run(argv, cwd=PACKAGE, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout
    assert f"# tests {len(files)}\n" not in done.stdout, "a file without tests counts as one"


def node(*arguments: str, environment: Mapping[str, str] | None = None, seconds: float = 60.0) -> Any:
    """The JSON that a program of the package's tests prints."""
    argv = ["node", *arguments]
    done = subprocess.run(
        argv, cwd=PACKAGE, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
