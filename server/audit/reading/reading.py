"""The server's side of reading the audit: questions go to processes of their own.

Taking packets apart, talking SQL and running a model would hold the interpreter lock of the event loop that decides.
Each `Reading` is one process, started with its first question (about a second of a core, 110 MiB), that answers one
question at a time, at a lower priority than decisions; its other side is `server/composition/reading_process.py`.
Requests and answers pass through the server as bytes.
"""

from __future__ import annotations

import asyncio
import enum
import os
import struct
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog
from pydantic import BaseModel, ConfigDict

from server.errors import (
    AuditBusyError,
    AuditError,
    AuditUnavailableError,
    InvalidRequestError,
    ModelFailedError,
    ModelUnknownError,
    NotReplayableError,
    OutcomeConflictError,
    UnknownDecisionError,
)

_log = structlog.get_logger(__name__)

REQUEST: Final = struct.Struct("<BI")
"""Header of a request: question, length."""
RESPONSE: Final = struct.Struct("<BI")
"""Header of an answer: 0 or 1 + index in `ERRORS`, length of the answer or of the error's message."""
EVENT: Final = struct.Struct("<I")
"""Header of an event in the answer to a WATCH: its length."""
STEP: Final = struct.Struct("<?I")
"""Header of the answer to a WATCH: whether there is more to look at, length of the cursor that follows."""
ERRORS: Final[tuple[type[AuditError], ...]] = (
    AuditError,
    AuditUnavailableError,
    InvalidRequestError,
    ModelFailedError,
    ModelUnknownError,
    NotReplayableError,
    OutcomeConflictError,
    UnknownDecisionError,
)
_MOST_WAITING: Final = 32
_NICENESS: Final = 5


class ReplaySettings(BaseModel):
    """Replays of decisions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_store: Path | None = None
    """Folder, with all folders below it, that holds the archives of every model version to replay or explain. Unset: a
    decision that a model made can be neither here."""


class Question(enum.IntEnum):
    """What a reading process can be asked: a serialised request, answered by the serialised response."""

    GET = 0
    LIST = 1
    WATCH = 2
    """`WatchDecisionsRequest` → `STEP`, the cursor, then `WatchDecisionsResponse` messages, each after its `EVENT`."""
    RECORDED = 3
    """`Outcome` → the `Outcome` recorded before, or nothing."""
    REPLAY = 4
    CHANGES = 5
    """`pretrade.admin.v1.ListChangesRequest` → `ListChangesResponse`."""
    EXPLAIN = 6
    DRIFT = 7
    """`DriftRequest` as JSON → `DriftState` as JSON (`server/drift/watch.py`)."""


class Task(BaseModel):
    """What to read."""

    journal: Path
    """Where the server keeps its journal, or those of its processes."""
    database_url: str
    """SQLAlchemy URL; may hold a password, and therefore is not a command-line argument."""
    model_store: Path | None


class Reading:
    """One process that reads the audit; an async context manager.

    Args:
        name: For the log.
        task: What it reads.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.name = name
        self._task = task
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self.waiting = 0
        """Questions that have no answer yet."""
        self.asked = 0
        """Questions so far."""
        self.ended = 0
        """Times the process ended while it was asked."""
        self._exchanges: set[asyncio.Task[tuple[int, bytes]]] = set()

    async def __aenter__(self) -> Self:
        """Nothing yet: the process starts with the first question."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the process, whatever it is doing."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        process = self._process
        self._end()
        if process is not None:
            await process.wait()

    async def ask(self, question: Question, request: bytes) -> bytes:
        """The answer to a question. Cancelling gives up the waiting and harms no other caller.

        Raises:
            AuditBusyError: Too many wait already.
            AuditError: One of `ERRORS`.
        """
        if self.waiting >= _MOST_WAITING:
            raise AuditBusyError(f"{self.waiting} requests wait already")
        self.waiting += 1
        self.asked += 1
        # A task of its own, because half an exchange would leave the answer to the next caller.
        exchange = asyncio.create_task(self._exchange(question, request))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._done)
        status, answer = await asyncio.shield(exchange)
        if status:
            raise ERRORS[status - 1](answer.decode())
        return answer

    def _done(self, exchange: asyncio.Task[tuple[int, bytes]]) -> None:
        self._exchanges.discard(exchange)
        self.waiting -= 1
        if not exchange.cancelled():
            exchange.exception()  # seen, also where its caller has gone

    async def _exchange(self, question: Question, request: bytes) -> tuple[int, bytes]:
        async with self._turn:
            try:
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(REQUEST.pack(question, len(request)) + request)
                await process.stdin.drain()
                status, length = RESPONSE.unpack(await process.stdout.readexactly(RESPONSE.size))
                return status, await process.stdout.readexactly(length)
            except (OSError, asyncio.IncompleteReadError, RuntimeError) as error:
                # RuntimeError is what uvloop says of a pipe that has closed while nobody wrote.
                _log.error("audit_reading_ended", name=self.name, error=repr(error))
                self.ended += 1
                self._end()
                raise AuditUnavailableError("the process that reads the audit ended; ask again") from error

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.composition.reading_process", stdin=PIPE, stdout=PIPE
            )
            with suppress(OSError):  # from its first import on: decisions first
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
            assert self._process.stdin is not None
            self._process.stdin.write(self._task.model_dump_json().encode() + b"\n")
        return self._process

    def _end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()  # it only reads; and its own children end with it
        self._process = None
