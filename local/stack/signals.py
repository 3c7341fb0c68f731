"""The signals that stop a command that runs a stack."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final, NoReturn

INTERRUPTED: Final = 130
"""Exit code of a command that was stopped before it was done."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """Makes the first SIGINT, SIGTERM or SIGHUP raise KeyboardInterrupt in the main thread, whatever is under way.

    The second one exits at once and leaves what still runs to the guard.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for each in _SIGNALS:
            signal.signal(each, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    for each in _SIGNALS:
        signal.signal(each, interrupt)
