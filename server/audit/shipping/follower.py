"""The server's handle on a process that follows the journal: keeps it running and reads its progress."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog
from pydantic import BaseModel

from feature_cache.backoff import Backoff
from feature_cache.ending import end
from server.audit.shipping.shipping import CLOSE, Progress
from server.errors import JournalError
from server.journal.journal import Journal
from server.process import child

_log = structlog.get_logger(__name__)

_RESTART_MIN_SECONDS: Final = 0.5
_RESTART_MAX_SECONDS: Final = 30.0


class Follower:
    """Runs `python -m <module>` beside the journal, again whenever it dies. The attributes are for status and metrics.

    Args:
        journal: An open journal.
        module: Reads its task, one line of JSON, from its input and says one `Progress` a line.
        task: The task.
        name: What it is called in the log.
        on_progress: Called after every `Progress`.
    """

    def __init__(
        self, journal: Journal, module: str, task: BaseModel, name: str, on_progress: Callable[[], None]
    ) -> None:
        self._journal = journal
        self._module = module
        self._task = task
        self._name = name
        self._on_progress = on_progress
        self._process: Process | None = None
        self._closed = False
        self._progressed = asyncio.Event()
        self._neglected = ""
        self.position = 0
        """Position of the newest row that arrived; 0 until that is known."""
        self.last_error = ""
        """Why nothing arrives; empty when all is well."""
        self.outages = 0
        """Times that it began to fail since start."""
        self.restarts = 0
        """Times that the process was started again after it had died."""
        self.skipped = 0
        """Rows that were trimmed before they arrived, since the process was started."""

    @property
    def behind(self) -> int:
        """Durable entries that have not arrived yet."""
        return max(0, self._journal.position - self.position)

    def start(self) -> None:
        """Starts the process; does not wait for it."""
        self._supervision = asyncio.create_task(self._supervise(), name=self._name)

    async def stop(self, drain_seconds: float) -> None:
        """Waits for what is still on its way, has it said where the journal ends, and ends the process."""
        until = asyncio.get_running_loop().time() + drain_seconds
        if not await self.drain(drain_seconds):
            _log.warning(f"{self._name}_not_drained", behind=self.behind, error=self.last_error)
        elif not await self._close(until):
            _log.warning(f"{self._name}_not_closed", error=self.last_error)
        await end([self._supervision])
        with suppress(asyncio.CancelledError):
            self._supervision.result()

    async def _close(self, until: float) -> bool:
        """Has the process say where the journal ends; False when that takes longer than until `until`, loop time."""
        if self._process is None:
            return False
        try:
            async with asyncio.timeout_at(until):
                child.say(self._process, CLOSE)
                while not self._closed:
                    self._progressed.clear()
                    await self._progressed.wait()
        except TimeoutError:
            return False
        return True

    async def drain(self, within_seconds: float) -> bool:
        """Waits until every row appended so far has arrived. Safe to cancel.

        Args:
            within_seconds: Longest wait.

        Returns:
            False when that takes longer.
        """
        try:
            async with asyncio.timeout(within_seconds):
                with suppress(JournalError):  # what is not durable will not arrive either
                    await self._journal.flush()
                target = self._journal.position
                while self.position < target:
                    self._progressed.clear()
                    await self._progressed.wait()
        except TimeoutError:
            return False
        return True

    async def _supervise(self) -> None:
        backoff = Backoff(_RESTART_MIN_SECONDS, _RESTART_MAX_SECONDS, spread=(1.0, 1.0))
        while True:
            try:
                process = await child.start(self._module, self._task)
                try:
                    if await self._follow(process):
                        backoff.reset()
                finally:
                    await child.end(process)
                problem = f"the shipping process ended with {process.returncode}"
            except (OSError, ValueError) as error:  # no process to be had, or it talks nonsense
                problem = f"the shipping process: {error}"
            self.restarts += 1
            with suppress(OSError):  # of the log, whose disk may be full
                self._note(Progress(position=self.position, error=problem))
            await asyncio.sleep(backoff.next_pause())

    async def _follow(self, process: Process) -> bool:
        """Reads the progress of the process until it ends; True when it made any."""
        assert process.stdout is not None
        self._process = process
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
        self._closed = progress.closed
        self.position = max(self.position, progress.position)
        if progress.skipped > self.skipped:
            _log.error(f"{self._name}_skipped", rows=progress.skipped - self.skipped)
        self.skipped = progress.skipped
        self._progressed.set()
        self._on_progress()
        if progress.neglected != self._neglected:
            self._neglected = progress.neglected
            if progress.neglected:
                _log.warning(f"{self._name}_neglected", why=progress.neglected)
        if began:
            _log.error(f"{self._name}_fails", error=progress.error, behind=self.behind)
        elif over:
            _log.info(f"{self._name}_again", behind=self.behind)
