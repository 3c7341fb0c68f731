"""Ends the processes that tests start, and everything these start, when the tests end, even if the tests are killed."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from local.stack.guard import Family, Guard

_GRACE_SECONDS: Final = 1.0
_TESTS: Final = Path(__file__).parents[1]


@cache
def _guard() -> Guard:
    guard = Guard(grace_seconds=_GRACE_SECONDS)
    atexit.register(guard.close)
    return guard


class LeashedPopen(subprocess.Popen[bytes]):
    """`subprocess.Popen` of a program that leads a session of its own."""

    def __init__(self, argv: Sequence[str], pass_fds: Sequence[int] = (), **options: Any) -> None:
        guard = _guard()
        super().__init__(
            [*guard.launcher(), *argv], pass_fds=(*pass_fds, guard.pipe), start_new_session=True, **options
        )

    @classmethod
    def module(cls, name: str, arguments: Sequence[str], **options: Any) -> LeashedPopen:
        """The same for a module of the tests, such as `support.flood`."""
        path = os.pathsep.join((str(_TESTS), os.environ.get("PYTHONPATH", "")))
        return cls([sys.executable, "-m", name, *arguments], env=os.environ | {"PYTHONPATH": path}, **options)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the program; the guard is told when nothing of it is left."""
        code = super().wait(timeout)
        if not Family(self.pid).signal(0):
            _guard().forget(self.pid)
        return code
