"""Waiting for what other tasks, threads and processes do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_seconds: float = 60.0) -> float:
    """Waits until something holds; returns the seconds it took.

    Raises:
        TimeoutError: It does not hold in time.
    """
    began = time.monotonic()
    async with asyncio.timeout(timeout_seconds):
        while not condition():  # noqa: ASYNC110 - plain attributes, set by another task, thread or process
            await asyncio.sleep(0.005)
    return time.monotonic() - began
