"""`pretrade up`: starts the stack, keeps it running, and stops it."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.markup import escape

from local.errors import PartFailedError, StackError
from local.progress import ProgressLines, print_failure, running
from local.settings import LocalSettings, refuse_unknown_variables
from local.signals import INTERRUPTED, stop_on_signals
from local.stack import PARTS, Stack

_OK, _FAILED, _MISUSED = 0, 1, 2
"""Exit codes."""

_POLL_SECONDS: Final = 0.5
_HOPELESS_SECONDS: Final = 15.0
"""A part that ends again so soon after it was started again is not started a third time."""


def run_up(given: Mapping[str, Any], parts: Collection[str]) -> int:
    """Runs the stack until SIGINT, SIGTERM or SIGHUP, or until a part is beyond help.

    Args:
        given: Settings given on the command line; they win over the environment.
        parts: The parts to start; none for all.

    Returns:
        The exit code: 0 when it was told to stop, 1 when a part failed, 2 when it was asked for something impossible,
        130 when it was told to stop before it was up.
    """
    console = Console()
    lines = ProgressLines(console)
    try:
        refuse_unknown_variables()
        stack = Stack(LocalSettings(**given), parts=parts or PARTS, report=lines)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        return _MISUSED
    stop_on_signals()
    code = INTERRUPTED
    began = time.monotonic()
    try:
        with lines:
            stack.start()
        code = _OK
        console.print(running(stack))
        console.print(f"up after {time.monotonic() - began:.1f} s; Ctrl-C stops it", highlight=False)
        _keep_running(stack, console)
    except KeyboardInterrupt:
        pass
    except PartFailedError as error:
        print_failure(console, error)
        code = _FAILED
    except StackError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        code = _FAILED
    finally:
        with lines:
            stack.stop()
    return code


def _keep_running(stack: Stack, console: Console) -> NoReturn:
    """Starts again what ends by itself.

    Raises:
        PartFailedError: A part does not start any more, or ends again at once.
    """
    restarted: dict[str, float] = {}
    idle = threading.Event()
    while True:
        for part in stack.ended():
            ending = stack[part].ending
            if time.monotonic() - restarted.get(part, -_HOPELESS_SECONDS) < _HOPELESS_SECONDS:
                raise stack[part].failure(f"{ending}, again")
            console.print(f"[yellow]![/] {part} {ending}; starting it again", highlight=False)
            stack.restart(part)
            restarted[part] = time.monotonic()
        idle.wait(_POLL_SECONDS)
