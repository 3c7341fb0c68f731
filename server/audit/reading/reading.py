"""The server's side of reading the audit: other processes look, so that the event loop that decides need not.

Taking packets apart, talking SQL and running a model would hold the interpreter lock of that loop. A `ReadingProcess`
serves the generated `AuditService`, and a small service of ours beside it, on a Unix socket
(`server/rpc/reading.py`). Decisions pass through the server as bytes. A `Reading` is one kind of question
to such a process: each kind is answered in a thread of its own, one question at a time.
"""

from __future__ import annotations

import asyncio
import enum
from asyncio.subprocess import Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
import structlog
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pydantic import BaseModel, ConfigDict, SecretStr, field_validator

from feature_cache.bars.store import BarStore
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.wire.reading import reading_pb2
from server.errors import (
    AuditBusyError,
    AuditError,
    AuditUnavailableError,
    BarsUnavailableError,
    InvalidRequestError,
    ModelFailedError,
    ModelUnknownError,
    NotReplayableError,
    OutcomeConflictError,
    UnknownDecisionError,
)
from server.process import child
from server.process.short_paths import short_directory

_log = structlog.get_logger(__name__)

LISTENING: Final = b"listening\n"
"""What a reading process writes when it can be asked."""
UNLIMITED: Final = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
"""Both ends trust each other, and a page of packets is as large as it is."""
_LAST_CALLS_SECONDS: Final = 1.0
"""How long calls get to learn that their process has ended."""
_OPTIONS: Final = (
    *UNLIMITED,
    ("grpc.client_idle_timeout_ms", 2**31 - 1),  # the socket has no name any more, so the connection must stay
)
_ADMIN: Final = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
_AUDIT: Final = audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name
_READING: Final = reading_pb2.DESCRIPTOR.services_by_name["ReadingService"].full_name
_ERRORS: Final[dict[str, type[AuditError]]] = {
    "MALFORMED_REQUEST": InvalidRequestError,
    **{
        kind.reason: kind
        for kind in (
            AuditUnavailableError,
            BarsUnavailableError,
            InvalidRequestError,
            ModelFailedError,
            ModelUnknownError,
            NotReplayableError,
            OutcomeConflictError,
            UnknownDecisionError,
        )
    },
}
"""By the reason that comes over the socket; any other is a fault of ours."""
_MOST_WAITING: Final = 32
_START_SECONDS: Final = 60.0
"""Its imports take about a second of a core, which a busy machine may not have."""


class ReplaySettings(BaseModel):
    """Replays of decisions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_store: Path | None = None
    """Folder, with all folders below it, that holds the archives of every model version to replay or explain. Unset: a
    decision that a model made can be neither here."""


class MarketSettings(BaseModel):
    """What people look at of the market, in the console and by RPC."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bars_database_url: SecretStr | None = None
    """SQLAlchemy URL of the database that `python -m feature_cache.bars` writes to, for people who look at bars. Unset:
    `database_url`. No decision reads it."""

    @field_validator("bars_database_url")
    @classmethod
    def _is_supported(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            BarStore(url.get_secret_value()).close()
        return url


class Question(enum.StrEnum):
    """The methods of a reading process: some of the server's own services, and those of its own."""

    GET = f"/{_AUDIT}/GetDecision"
    LIST = f"/{_AUDIT}/ListDecisions"
    REPLAY = f"/{_AUDIT}/ReplayDecision"
    EXPLAIN = f"/{_AUDIT}/ExplainDecision"
    EVENTS = f"/{_READING}/NextEvents"
    CHANGES = f"/{_ADMIN}/ListChanges"
    NEWEST = f"/{_READING}/NewestDecisions"
    OUTCOME = f"/{_READING}/FindOutcome"
    DRIFT = f"/{_READING}/CompareDrift"
    CHECK = f"/{_READING}/CheckAudit"
    WARM_UP = f"/{_READING}/WarmUp"
    BARS = f"/{_ADMIN}/ListBars"


class Task(BaseModel):
    """What a reading process reads, and where it serves."""

    journal: Path
    """Where the server keeps its journal, or those of its processes."""
    database_url: str
    """SQLAlchemy URL; may hold a password, and therefore is not a command-line argument."""
    model_store: Path | None
    models: int = 1
    """How many models decide orders."""
    bars_database_url: str = ""
    """The same of the database of bars; empty for that of the audit."""
    socket: Path = Path()
    """Set for every process anew."""


@dataclass(frozen=True, slots=True, eq=False)
class _Started:
    """A process that can be asked."""

    process: Process
    channel: grpc.aio.Channel

    async def end(self) -> None:
        await child.end(self.process)
        # Closed at once, the channel would cancel the calls that still are to learn that the process has ended.
        await self.channel.close(_LAST_CALLS_SECONDS)


class ReadingProcess:
    """A process that reads the audit; an async context manager.

    It starts with the first question, which takes about a second, runs at a lower priority than decisions, and is
    replaced when it has ended. Safe to use by many tasks at once.

    Args:
        name: For log and metrics.
        task: What it reads.
    """

    def __init__(self, name: str, task: Task) -> None:
        self.name = name
        self._task = task
        self._running: asyncio.Task[_Started] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self.ended = 0
        """Times that it ended, or did not start, when it was asked."""

    async def __aenter__(self) -> Self:
        """Nothing yet: the process starts with the first question."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the process, whatever it is doing."""
        running, self._running = self._running, None
        if running is not None:
            running.cancel()  # in vain once it has started
            with suppress(asyncio.CancelledError, OSError):
                self._end(await running)
        await asyncio.gather(*self._ending)

    async def ask(self, question: Question, request: bytes) -> bytes:
        """The serialised response. Cancelling harms no other caller.

        Raises:
            AuditError: There is none.
        """
        running, started = await self._started()
        try:
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = started.channel.unary_unary(question)
            return await method(request)
        except grpc.aio.AioRpcError as error:
            raise self._error(running, error) from None

    async def _started(self) -> tuple[asyncio.Task[_Started], _Started]:
        if self._running is not None and (ended := _exit_code(self._running)) is not None:
            self._over(self._running, f"it ended with {ended}")
        if self._running is None:
            self._running = asyncio.create_task(self._start(), name=f"start {self.name}")
        running = self._running
        try:
            return running, await asyncio.shield(running)
        except OSError as error:
            self._over(running, f"it does not start: {str(error) or type(error).__name__}")
            raise _unavailable() from error

    async def _start(self) -> _Started:
        """Starts a process.

        Raises:
            OSError: It cannot be started, or says nothing in time.
        """
        with TemporaryDirectory(
            prefix="pretrade-audit-", dir=short_directory(), ignore_cleanup_errors=True
        ) as directory:  # needed until both ends have met, so no killed process leaves it behind
            socket = Path(directory, "socket")
            process = await child.start(
                "server.composition.reading_process", self._task.model_copy(update={"socket": socket})
            )
            started = _Started(process, grpc.aio.insecure_channel(f"unix:{socket}", _OPTIONS))
            try:
                assert process.stdout is not None
                async with asyncio.timeout(_START_SECONDS):
                    if await process.stdout.readline() != LISTENING:
                        raise OSError("it ended before it could be asked")
                    await started.channel.channel_ready()
            except BaseException:
                await started.end()
                raise
        return started

    def _error(self, running: asyncio.Task[_Started], error: grpc.aio.AioRpcError) -> AuditError:
        """What a call's status says; one without a reason comes of no program of ours, but of the connection."""
        reason = _reason(error)
        if not reason:
            self._over(running, f"{error.code().name}: {error.details()}")
            return _unavailable()
        return _ERRORS.get(reason, AuditError)(error.details() or "")

    def _over(self, running: asyncio.Task[_Started], why: str) -> None:
        """Forgets a process that has ended; the next question starts another. A second call does nothing."""
        if self._running is not running:
            return
        _log.error("audit_reading_ended", name=self.name, error=why)
        self.ended += 1
        self._running = None
        if _has_started(running):
            self._end(running.result())

    def _end(self, started: _Started) -> None:
        ending = asyncio.create_task(started.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


class Reading:
    """One kind of question to a process that reads the audit.

    Args:
        name: For log and metrics.
        process: Whom to ask.
    """

    def __init__(self, name: str, process: ReadingProcess) -> None:
        self.name = name
        self._process = process
        self.waiting = 0
        """Questions that have no answer yet."""
        self.asked = 0
        """Questions so far."""

    @property
    def ended(self) -> int:
        """Times that the process ended: the next one has nothing loaded."""
        return self._process.ended

    async def ask(self, question: Question, request: bytes) -> bytes:
        """The serialised response. Cancelling gives up the waiting and harms no other caller.

        Raises:
            AuditBusyError: Too many wait already.
            AuditError: There is none, for another reason.
        """
        if self.waiting >= _MOST_WAITING:
            raise AuditBusyError(f"{self.waiting} requests wait already")
        self.waiting += 1
        self.asked += 1
        try:
            return await self._process.ask(question, request)
        finally:
            self.waiting -= 1


def _exit_code(running: asyncio.Task[_Started]) -> int | None:
    """What a process ended with; None while it starts or runs."""
    return running.result().process.returncode if _has_started(running) else None


def _has_started(running: asyncio.Task[_Started]) -> bool:
    return running.done() and not running.cancelled() and running.exception() is None


def _unavailable() -> AuditUnavailableError:
    return AuditUnavailableError("the process that reads the audit ended; ask again")


def _reason(error: grpc.aio.AioRpcError) -> str:
    """The reason of an error of ours; empty where there is none."""
    status: Any = rpc_status.from_call(error)  # type: ignore[arg-type]  # it has what is read of a call
    info = error_details_pb2.ErrorInfo()
    found = status is not None and any(detail.Unpack(info) for detail in status.details)
    return str(info.reason) if found else ""
