"""A lock that the processes of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from server.machine import REAL, Machine

_POLL_SECONDS: Final = 0.005


class FileLock:
    """One holder at a time, among the coroutines of all processes that use the same file; free when its holder dies.

    Args:
        path: The file, which stays empty; made when missing.
        machine: Whose disk it is on.
    """

    def __init__(self, path: Path, machine: Machine = REAL) -> None:
        self._path = path
        self._files = machine.files
        self._ours = asyncio.Lock()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Waits for the lock and holds it. Safe to cancel.

        Raises:
            OSError: The file cannot be made.
        """
        async with self._ours:
            # Waiting in flock itself would take a thread, which cannot be cancelled.
            while (lock := self._files.lock(self._path)) is None:  # noqa: ASYNC110 - no event crosses processes
                await asyncio.sleep(_POLL_SECONDS)
            try:
                yield
            finally:
                self._files.unlock(lock)
