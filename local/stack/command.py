"""What every command that runs the stack has in common: start it, show the progress, use it, stop it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from feature_cache import logs
from local.stack.errors import PartFailedError, StackError
from local.stack.progress import ProgressLines, print_failure, running
from local.stack.settings import LocalSettings, refuse_unknown_variables, wrong_settings
from local.stack.signals import INTERRUPTED, stop_on_signals
from local.stack.stack import PARTS, Stack

OK: Final = 0
FAILED: Final = 1
MISUSED: Final = 2


def run_with_stack(
    given: Mapping[str, Any],
    use: Callable[[Stack, LocalSettings, Console], int],
    parts: Collection[str] = PARTS,
) -> int:
    """Starts the stack, uses it and stops it, whatever happens.

    Args:
        given: Settings given on the command line; they win over the environment.
        use: What to do while it runs; returns the exit code.
        parts: The parts to start.

    Returns:
        The exit code: that of `use`, 1 when a part failed, 2 when asked for something impossible, 130 when interrupted
        by SIGINT, SIGTERM or SIGHUP.
    """
    logs.configure("error", "pretrade")  # what is printed is for people
    console = Console()
    lines = ProgressLines(console)
    try:
        refuse_unknown_variables()
        settings = LocalSettings(**given)
        stack = Stack(settings, parts=parts, report=lines)
    except ValidationError as error:
        for problem in wrong_settings(error):
            console.print(f"[red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
        return MISUSED
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return MISUSED
    stop_on_signals()
    began = time.monotonic()
    try:
        with lines:
            stack.start()
        console.print(running(stack))
        console.print(f"up after {time.monotonic() - began:.1f} s", highlight=False)
        return use(stack, settings, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    except PartFailedError as error:
        print_failure(console, error)
        return FAILED
    except StackError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return FAILED
    finally:
        with lines:
            stack.stop()
