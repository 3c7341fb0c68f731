"""A process that a server starts for itself: it is given one task, works at a lower priority, and ends with its parent.

The parent writes the task as one line of JSON to the child's standard input and keeps that open. Whatever else it has
to say follows there, line by line. The end of the input means that the parent is gone or wants no more: the child exits
at once, wherever it is, so it may only do what can be broken off. What the child has to say it writes to its standard
output.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

from pydantic import BaseModel

from server.process.cores import keep_off

T = TypeVar("T", bound=BaseModel)

_NICENESS: Final = 5
"""How much nicer than its parent a child is: decisions come first."""
_END_SECONDS: Final = 1.0
"""How long a child may take to notice that its input has ended; a stopped one never does, and is killed."""


async def start(module: str, task: BaseModel) -> Process:
    """Starts `python -m <module>` and writes its task; its standard input and output are pipes.

    Raises:
        OSError: No process can be started.
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", module, stdin=PIPE, stdout=PIPE)
    with suppress(OSError):  # from its first import on, which take a second of a core
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
    keep_off(process.pid)
    say(process, task.model_dump_json().encode() + b"\n")
    return process


def say(process: Process, line: bytes) -> None:
    """Writes a line to a child, which may have ended."""
    assert process.stdin is not None
    with suppress(OSError, RuntimeError):  # uvloop calls a closed pipe a RuntimeError
        process.stdin.write(line)


async def end(process: Process) -> None:
    """Ends a child by closing its input, and kills it where that is not enough."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):  # it has just ended
            process.kill()
        await process.wait()


def take_task(kind: type[T], hear: Callable[[bytes], object] = lambda _: None) -> T:
    """Makes this process such a child, which ends when its parent ends it or is gone.

    Args:
        kind: The task's type.
        hear: Called, in a thread of its own, with every line that follows the task.

    Returns:
        The task.
    """
    # The server decides when this ends, also where a terminal or a supervisor signals the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    task = kind.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_listen, args=(hear,), daemon=True).start()
    return task


def _listen(hear: Callable[[bytes], object]) -> None:
    """Passes on what the parent says, and exits with it."""
    while line := sys.stdin.readline():
        hear(line.encode())
    os._exit(0)
