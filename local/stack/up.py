"""`pretrade up`: starts the stack, keeps it running, and stops it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from local.stack.command import OK, run_with_stack
from local.stack.errors import PartFailedError
from local.stack.parts import torchserve
from local.stack.parts.market import mid
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Stack
from pretrade.client.cli.model_lines import standing_line
from pretrade.client.stack_file import DEFAULT_DIRECTORY
from pretrade.console.cli import login_link
from server.models.archive import read_archive
from server.models.registry import Registry, is_version

_POLL_SECONDS: Final = 0.5
_HOPELESS_SECONDS: Final = 15.0
"""A part that ends again so soon after it was started again is not started a third time."""


def run_up(given: Mapping[str, Any], parts: Collection[str]) -> int:
    """Runs the stack until SIGINT, SIGTERM or SIGHUP, or until a part cannot be restarted.

    Args:
        given: Settings given on the command line; they win over the environment.
        parts: The parts to start; none for all.

    Returns:
        The exit code: 0 when it was stopped, 1 when a part failed, 2 for impossible settings, 130 when it was stopped
        before it was up.
    """
    return run_with_stack(given, _keep_running, parts or PARTS)


def _keep_running(stack: Stack, settings: LocalSettings, console: Console) -> int:
    """Keeps it up until Ctrl-C.

    Returns:
        0.

    Raises:
        PartFailedError: A part no longer starts, or ends again at once.
    """
    if line := _champion(stack):
        console.print(line, highlight=False, soft_wrap=True)
    if line := console_line(stack, is_person=console.is_terminal):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Ctrl-C stops it{_next_steps(stack, settings)}", highlight=False, markup=False, soft_wrap=True)
    with suppress(KeyboardInterrupt):
        keep_up(stack, settings, console)
    return OK


def _champion(stack: Stack) -> str:
    """Which model its replicas started with, and how good it is known to be; empty where none of them is ours."""
    store = stack.endpoints.model_store
    if store is None or not any(part.partition("-")[0] in ("primary", "secondary") for part in stack.processes):
        return ""
    archive = torchserve.archive(Path(store), "champion")
    version = archive.stem if is_version(archive.stem) else read_archive(archive).version
    standing = Registry(Path(store)).standing(version)
    return standing_line(version, standing.text, "" if standing.card is None else os.path.relpath(standing.card))


def console_line(stack: Stack, *, is_person: bool) -> str:
    """Where the console is; for a person with a link that logs in, which no log is to hold. Empty without a console."""
    url = stack.endpoints.console_url
    if url is None:
        return ""
    if is_person:
        link = login_link(stack.endpoints)
        return f"The console, by a link that logs you in once (`pretrade console` prints another):\n  {link}"
    return f"The console: {url}/ (`pretrade console` prints a link that logs you in)"


def _next_steps(stack: Stack, settings: LocalSettings) -> str:
    """What to type in another terminal, as this command was typed; nothing where no server decides."""
    if stack.endpoints.decision is None or not stack.endpoints.instruments:
        return ""
    program = "pretrade" if shutil.which("pretrade") else os.path.relpath(sys.argv[0])
    # Whoever named the directory here has to name it there; a variable may not be set in the other terminal.
    where = [] if settings.dir == DEFAULT_DIRECTORY else ["--dir", str(settings.dir.absolute())]
    instrument = stack.endpoints.instruments[0]
    price = mid(stack.endpoints, instrument)
    limit = [] if price is None else ["--limit", f"{price:.7g}"]
    lines = [
        shlex.join([program, "decide", instrument, "buy", "0.05", *limit, *where]),
        shlex.join([program, "status", *where]),
    ]
    market = "" if price is None else f"The mid of {instrument} is {price:,.7g}. "
    return "\n".join([f". {market}In another terminal, in this folder:", *(f"  {line}" for line in lines)])


def keep_up(stack: Stack, settings: LocalSettings, console: Console, until: Callable[[], bool] = lambda: False) -> None:
    """Restarts parts that end by themselves, and the broker before it fills the memory, until it is stopped.

    Raises:
        PartFailedError: A part does not start in two attempts, or ends again at once.
    """
    restarted: dict[str, float] = {}
    idle = threading.Event()
    while not until():
        for part in stack.ended():
            ending = stack[part].ending
            if time.monotonic() - restarted.get(part, -_HOPELESS_SECONDS) < _HOPELESS_SECONDS:
                raise stack[part].failure(f"{ending}, again")
            console.print(f"[yellow]![/] {part} {ending}; starting it again", highlight=False)
            try:
                stack.restart(part)
            except PartFailedError as error:  # on a busy machine a model server may not come up in its time
                console.print(f"[yellow]![/] {escape(str(error))}; trying once more", highlight=False)
                stack.restart(part)
            restarted[part] = time.monotonic()
        broker = stack.processes.get("broker")
        if broker is not None and broker.memory_bytes() > settings.broker_memory_mebibytes * 2**20:
            console.print("[yellow]![/] broker has filled its memory; starting it with an empty log", highlight=False)
            stack.restart("broker")
        idle.wait(_POLL_SECONDS)
