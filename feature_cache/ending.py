"""Ends tasks for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_SECONDS: Final = 10.0
"""Longer than any task here takes to end in good order, which another cancellation would interrupt."""


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended; raises nothing of what they raise.

    They are cancelled again where that takes long, since a task may never hear of a cancellation: in Python 3.11
    `asyncio.TaskGroup` loses one that comes while it ends for an error, and `asyncio.wait_for` one that comes with what
    it waits for. Some libraries suppress what comes while they close a connection.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
