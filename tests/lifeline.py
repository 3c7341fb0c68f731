"""Processes that end with the test run that started them, however it ends.

A test run that is killed ends nobody. So a process that would go on by itself holds the reading end of a pipe whose
writing end the test run alone has: when the run is gone, the system closes that end, and the process ends.
"""

from __future__ import annotations

import functools
import os
import subprocess
import threading
from collections.abc import Sequence
from typing import Any, Final

_VARIABLE: Final = "TEST_LIFELINE"


def start(argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a process that calls `end_with_the_test_run`; the options are those of `subprocess.Popen`."""
    lifeline, _ = _pipe()
    return subprocess.Popen(argv, pass_fds=(lifeline,), env=os.environ | {_VARIABLE: str(lifeline)}, **options)


def end_with_the_test_run() -> None:
    """Ends this process, at once and whatever it does, when the test run that started it has ended.

    A process that somebody started by hand goes on.
    """
    if (lifeline := os.environ.get(_VARIABLE)) is not None:
        threading.Thread(target=_wait, args=(int(lifeline),), daemon=True).start()


def _wait(lifeline: int) -> None:
    os.read(lifeline, 1)  # nobody ever writes
    os._exit(1)


@functools.cache
def _pipe() -> tuple[int, int]:
    """One for all processes of this run; no process inherits the writing end."""
    return os.pipe()
