"""A lock that the processes of a server share."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_POLL_SECONDS: Final = 0.005


class FileLock:
    """One holder at a time, among the coroutines of all processes that use the same file; free when its holder dies.

    A context manager around the open file.

    Args:
        path: The file, which stays empty; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ours = asyncio.Lock()

    def __enter__(self) -> Self:
        """Opens the file.

        Raises:
            OSError: It cannot be made.
        """
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the file, and so gives the lock back."""
        os.close(self._descriptor)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Waits for the lock and holds it. Safe to cancel."""
        async with self._ours:
            # Waiting in flock itself would take a thread, which cannot be cancelled.
            while not self._try():  # noqa: ASYNC110 - no event crosses processes
                await asyncio.sleep(_POLL_SECONDS)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
