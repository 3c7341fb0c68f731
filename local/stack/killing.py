"""`pretrade kill`: kills a part of a running stack, for load scenarios in which something fails."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from local.stack.command import FAILED, MISUSED, OK
from local.stack.guard import Family
from local.stack.settings import LocalSettings
from pretrade.client.cli.options import UNREACHABLE
from pretrade.client.stack_file import NoStackError, running_stack


def kill_part(given: Mapping[str, Any], part: str, after_seconds: float) -> int:
    """Sends SIGKILL to a part and all that it started, after a while.

    Args:
        given: Settings given on the command line; only the directory counts.
        part: Its name.
        after_seconds: How long to wait.

    Returns:
        The exit code: 0 when it was killed, 1 when it had ended by itself, 2 when the stack has no such part, 3 when no
        stack runs there.
    """
    console = Console(highlight=False)
    directory = LocalSettings(**given).dir
    time.sleep(after_seconds)  # the caller's wish, nothing is waited for
    try:
        stack = running_stack(directory)
    except NoStackError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        return UNREACHABLE
    if part not in stack.processes:
        console.print(f"no such part here: {part}; there are {', '.join(sorted(stack.processes))}")
        return MISUSED
    if not Family(stack.processes[part]).signal(signal.SIGKILL):
        console.print(f"{part} has ended already")
        return FAILED
    console.print(f"{part} killed")
    return OK
