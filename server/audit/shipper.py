"""The server's side of shipping: keeps the shipping process running and trims the journal behind it.

The shipping process is `shipping_process.py`; only it needs SQLAlchemy.
"""

from __future__ import annotations

import asyncio
import re
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import structlog

from server.audit.errors import JournalError
from server.audit.journal import Journal
from server.audit.shipping import Progress, ShippingSettings, Task

_log = structlog.get_logger(__name__)

_URL: Final = re.compile(r"(sqlite|postgresql)(\+\w+)?://")
_TRIM_EVERY_ROWS: Final = 1000
_RESTART_MIN_SECONDS: Final = 0.5
_RESTART_MAX_SECONDS: Final = 30.0


class Shipper:
    """Moves what the journal holds into SQL, in a process of its own; never in the way of a decision.

    An async context manager, to be left before the journal is closed. Leaving it waits up to
    `ShippingSettings.drain_seconds` for the rest to be shipped. The attributes are for status and metrics.

    Args:
        journal: An open journal.
        database_url: SQLAlchemy URL of the audit database: `sqlite:///…` or `postgresql+psycopg://…`.
        settings: How.

    Raises:
        ValueError: The URL is of neither kind.
    """

    def __init__(self, journal: Journal, database_url: str, settings: ShippingSettings) -> None:
        if not _URL.match(database_url):
            raise ValueError("the audit database must be sqlite:///… or postgresql+psycopg://…")
        self._journal = journal
        self._task = Task(journal=journal.settings.path.absolute(), database_url=database_url, settings=settings)
        self._settings = settings
        self._progressed = asyncio.Event()
        self._neglected = ""
        self._trimmed = 0
        self.position = 0
        """Position of the newest row in SQL; 0 until the database has answered."""
        self.last_error = ""
        """Why nothing is shipped; empty when all is well."""
        self.outages = 0
        """Times that shipping began to fail since start."""
        self.restarts = 0
        """Times that the shipping process was started again after it had died."""

    @property
    def unshipped(self) -> int:
        """Durable rows that are not in SQL yet."""
        return max(0, self._journal.position - self.position)

    async def __aenter__(self) -> Self:
        """Starts shipping; does not wait for the database."""
        self._supervision = asyncio.create_task(self._supervise(), name="audit-shipper")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drains and stops."""
        if not await self.drain(self._settings.drain_seconds):
            _log.warning("audit_not_drained", unshipped=self.unshipped, error=self.last_error)
        self._supervision.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervision

    async def drain(self, within_seconds: float) -> bool:
        """Waits until every row appended so far is in SQL. Safe to cancel.

        Args:
            within_seconds: Longest wait.

        Returns:
            False when that takes longer.
        """
        try:
            async with asyncio.timeout(within_seconds):
                with suppress(JournalError):  # what is not durable will not be shipped either
                    await self._journal.flush()
                target = self._journal.position
                while self.position < target:
                    self._progressed.clear()
                    await self._progressed.wait()
        except TimeoutError:
            return False
        return True

    async def _supervise(self) -> None:
        pause = _RESTART_MIN_SECONDS
        while True:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "server.audit", stdin=PIPE, stdout=PIPE
                )
                try:
                    if await self._follow(process):
                        pause = _RESTART_MIN_SECONDS
                finally:
                    await _end(process)
                problem = f"the shipping process ended with {process.returncode}"
            except (OSError, ValueError) as error:  # no process to be had, or it talks nonsense
                problem = f"the shipping process: {error}"
            self.restarts += 1
            with suppress(OSError):  # of the log, whose disk may be full
                self._note(Progress(position=self.position, error=problem))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RESTART_MAX_SECONDS)

    async def _follow(self, process: Process) -> bool:
        """Gives the process its task and reads its progress until it ends; True when it made any."""
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(ConnectionError):
            process.stdin.write(self._task.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
        progressed = False
        while line := await process.stdout.readline():
            progress = Progress.model_validate_json(line)
            progressed = progressed or not progress.error
            self._note(progress)
        return progressed

    def _note(self, progress: Progress) -> None:
        began = bool(progress.error and not self.last_error)
        over = bool(self.last_error and not progress.error)
        self.last_error = progress.error
        self.outages += began
        self.position = max(self.position, progress.position)
        self._progressed.set()
        # Where there is no room, what was shipped need not stay.
        trim_to = self.position - (0 if self._journal.full else self._settings.retained_rows)
        if trim_to - self._trimmed >= _TRIM_EVERY_ROWS:
            self._trimmed = trim_to
            self._journal.trim(trim_to)
        if progress.neglected != self._neglected:
            self._neglected = progress.neglected
            if progress.neglected:
                _log.warning("audit_store_neglected", why=progress.neglected)
        if began:
            _log.error("audit_shipping_fails", error=progress.error, unshipped=self.unshipped)
        elif over:
            _log.info("audit_shipping_again", unshipped=self.unshipped)


async def _end(process: Process) -> None:
    """Ends the process by closing its input, on which it exits wherever it is."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(1.0):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
