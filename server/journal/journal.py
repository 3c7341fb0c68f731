"""The durable audit journal: a row is on disk before its caller continues.

Life of a row::

    append() ─▶ queue ─▶ writer thread: everything queued, one INSERT, one sync ─▶ event loop: the callers' futures

Appends that arrive during a sync share the next one (group commit), so the cost of a sync is divided by the load. The
rows of one iteration of the event loop are handed over together: waking the writer takes longer than writing a row.

Decisions arrive as batches (`append_batch`). The writer makes one entry of all that stand side by side in a commit: one
position, one hash, one row in SQLite. A decision's key is therefore the position of its entry and its row there. What
is counted in `depth`, `written` and the like are decisions and other entries.

States::

    writable ──a write fails──▶ unwritable: its rows and all that wait fail, new ones are refused at once
        ▲                             │
        └── a probe is durable ◀──────┘  opens the file anew and commits a probe, again and again with backoff

Whether a caller received its decision is known only after the row is durable. Until then the row is *held*. Every
commit stores the position up to which no row is held (see `journal_file.py` and `server/decision/replies.py`). If a
process is killed, the next one that opens the journal marks the rows beyond that position with cause `killed`.

A failed sync is never retried on the same pages, because their state in the page cache is unknown. The log is written
once more (see `journal_file.py`), the file is reopened, and a new commit must succeed. Rows of a failed commit can
appear in the file after all. They are marked as `reply_unconfirmed` with cause `not_durable`, because their callers
were told that they failed. Trims wait until that is over.
"""

from __future__ import annotations

import asyncio
import enum
import queue
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future as BackgroundFuture
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Protocol, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.backoff import Backoff
from feature_cache.constants import Constant
from pretrade.audit.v1.packet_pb2 import DecisionPacket
from server.errors import (
    JournalClosedError,
    JournalCorruptedError,
    JournalError,
    JournalFullError,
    JournalInUseError,
    JournalUnwritableError,
)
from server.journal.journal_file import JournalFile, checkpoint, make_log_durable
from server.journal.reply_status import Cause, notes_of, unknown_replies
from server.machine import REAL, Files, Machine, Queue
from server.timing.histogram import ROW_EDGES, Histogram

_log = structlog.get_logger(__name__)

_SETTLE_SECONDS: Final = 0.05
"""How long after the last commit `settled` is written by itself. Until then, the next commit may write it at no
cost."""
_MOST_BYTES: Final = 16 * 2**30
"""What rows may fill that are not shipped, unless the settings say."""
_MEASURE_BYTES: Final = 256 * 1024
"""What may be written between two looks at what the volume has left."""
_MEASURE_SECONDS: Final = 1.0
"""Time between two such checks while the journal is full: space may have become free."""
_QUEUED_ROW_BYTES: Final = 2048
"""A large row: what waits for the writer when the volume's end is seen must fit, too."""
_LONGEST_LOG: Final = 2
"""Commits wait for the log to be moved into the file once it has grown meanwhile by this many times its normal
length."""
_LOGS: Final = 8
"""The reserve holds this many logs of normal length: the log as it is, what it grows while it is moved, as much again
where a reader is in the way, and all by which the file may grow."""
_CHECKPOINT_SECONDS: Final = 0.001
"""Between two looks whether the log has been moved, while commits wait for that."""
_MARKS: Final = 4_000
"""Rows that are marked in one commit."""
_TRIM_ROWS: Final = 256  # a trim shares the writer with the callers: small steps, each between two batches
_LOCK_SECONDS: Final = 0.5
"""How long a journal that is opened may be in use: another process settles what a killed one left there."""
_LOCK_AGAIN_SECONDS: Final = 0.005
_PAGE_BYTES: Final = 4096
_ROW_BYTES: Final = 48  # of a row besides its entry: position, hash and headers
_PAGES_PER_COMMIT: Final = 2  # the last leaf of the table and now and then its parent


class Durability(enum.StrEnum):
    """What an append waits for."""

    FSYNC = "fsync"
    """The row survives the loss of power."""
    OS = "os"
    """The row survives the death of this process, not of the machine."""
    OFF = "off"
    """Nothing: the row is written soon."""


class JournalSettings(BaseModel):
    """The audit journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Path("pretrade-journal.db")
    """The journal's file. One journal belongs to one server process. Its directory must exist: put it on a fast,
    durable disk."""
    durability: Durability = Durability.FSYNC
    """What a decision waits for: `fsync` (its row survives power loss), `os` (it survives the process) or `off`. Change
    it only if you may lose audit rows."""
    queue_rows: Constant[int] = 20_000
    """Rows that may wait to be written; beyond, appends fail at once. A few seconds of rows; what
    waits longer misses its deadline."""
    batch_rows: Constant[int] = 256
    """Rows after which a commit takes no further appends. More rows make a commit longer than a decision can wait."""
    max_mebibytes: int | None = Field(default=None, ge=1)
    """Space for rows that are not shipped yet, in MiB, for each process. Unset: 16 GiB, or what the volume has left
    less a reserve. When it is full, decisions are answered ABSTAIN and the server is not healthy until the database
    takes rows again. Size it for the longest outage of the database. If you set it, the server does not start on a
    volume that cannot hold this space for all its processes and one more, which runs while a process is replaced."""
    checkpoint_pages: Constant[int] = 1000
    """Pages of 4 KiB written to the log after which they are moved into the file. SQLite's own default."""
    retry_min_seconds: Constant[float] = 0.05
    """First pause before a probe after a failed write, in seconds; doubles up to `retry_max_seconds`."""
    retry_max_seconds: Constant[float] = 2.0
    """Longest pause between two probes, in seconds: how long a journal may stay unwritable after its disk is well."""


Left = Callable[[Sequence[DecisionPacket]], object]
"""Told of the decisions of a killed process of which it is unknown whether their callers heard them, before any of them
counts as settled. Called in the thread that reads them."""


def _nobody(_: Sequence[DecisionPacket]) -> None:
    """Nobody wants to know."""


class Batch(Protocol):
    """Decisions that become durable together; `len` is how many, and never changes once they were appended."""

    def __len__(self) -> int: ...

    def can_join(self, other: Any, /) -> bool:
        """True when the decisions of another batch of this kind can be in the same entry."""

    def entry(self, others: Sequence[Any], /) -> bytes:
        """The serialised `JournalEntry` of these decisions and of those of others. Called in the writer's thread."""


class Journal:
    """Makes rows durable for the coroutines of one event loop.

    An async context manager; its methods are called on the loop's thread. The attributes are for status and metrics.

    Args:
        settings: Where and how.
        machine: Whose disk, threads and clock it uses.
        on_volume: How many journals with these settings share the volume, with this one.
        left: Told what the process before this one left, when the journal is opened.
    """

    def __init__(
        self,
        settings: JournalSettings,
        machine: Machine = REAL,
        on_volume: int = 1,
        left: Left = _nobody,
    ) -> None:
        self._left = left
        self.settings: Final = settings
        self.on_volume: Final = on_volume
        self.machine: Final = machine
        self.commits = Histogram()
        """Seconds of commits."""
        self.commit_rows = Histogram(ROW_EDGES)
        """Rows of commits."""
        self._when_full: list[Callable[[], None]] = []
        self._work: Queue[_Work] = machine.threads.queue()
        self._gathered: list[_Append] = []
        """Appended in this turn of the event loop, and not handed to the writer yet."""
        self.held: Final[OrderedDict[Hashable, int]] = OrderedDict()
        """What keeps `settled` where it is, the oldest first, and the position before the row it stands for."""
        self._settled_handed = 0
        """The value of `settled` that the writer last got."""
        self._handed_over = False
        """True when the writer got something since the last look at whether `settled` must be written by itself."""
        self._look: asyncio.TimerHandle | None = None
        self._measuring: asyncio.TimerHandle | None = None
        self._open = False
        self.writable = False
        """True when the last write succeeded."""
        self.last_error = ""
        """Why the journal is unwritable; empty when it is not."""
        self.position = 0
        """Position of the newest durable row."""
        self.depth = 0
        """Rows that wait."""
        self.written = 0
        """Rows made durable since start."""
        self.batches = 0
        """Commits since start."""
        self.refused = 0
        """Rows whose caller got a `JournalError` since start."""
        self.outages = 0
        """Times the journal began to refuse decisions since start, since it was full or could not be written."""
        self._out = False
        """True while it does. A full volume is both, one after the other, and one outage."""
        self.marked: Counter[Cause] = Counter()
        """Decisions that were marked when the file was opened, because the fate of their replies is unknown, by
        cause."""
        self.bytes = 0
        """What the rows of the file fill."""
        self.limit_bytes = _MOST_BYTES
        """What they may fill: what the settings allow and the volume has left but for a reserve. In that, what has been
        shipped can be removed and the journal recover."""
        self.last_commit_seconds = 0.0
        """Duration of the newest commit."""

    @property
    def full(self) -> bool:
        """True when the rows fill all that they may."""
        return self.bytes >= self.limit_bytes

    @property
    def settled(self) -> int:
        """The position up to which it is known of every decision whether its caller received it."""
        return next(iter(self.held.values())) if self.held else self.position

    def hold(self, row: Hashable) -> None:
        """Keeps `settled` before the row that is appended next, until `release`."""
        self.held[row] = self.position

    def release(self, row: Hashable) -> None:
        """The fate of a row is known and durable; nothing when it is not held."""
        self.held.pop(row, None)

    @property
    def problem(self) -> str:
        """Why nothing can be appended; empty when all is well."""
        if not self.writable:
            return self.last_error or "not open"
        if self.full:
            return f"rows that are not shipped fill all that they may, {max(0, self.limit_bytes) >> 20} MiB"
        return ""

    async def __aenter__(self) -> Self:
        """Opens the journal, creating it if there is none.

        Raises:
            JournalInUseError: Another process writes it.
            JournalCorruptedError: Its tail is not what was written.
            JournalError: It cannot be opened or written.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[None] = self._loop.create_future()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._lock = await self._take_lock()
        self._thread = self.machine.threads.start(lambda: self._run(opened), "audit-journal")
        try:
            await opened
        except BaseException:
            await self._stop()
            raise
        self._open = True
        self._measured(self.bytes, self.limit_bytes)
        return self

    async def _take_lock(self) -> int:
        until = self.machine.clock() + _LOCK_SECONDS
        while True:
            try:
                return _lock(self.machine.files, self.settings.path)
            except JournalInUseError:
                if self.machine.clock() >= until:
                    raise
            await asyncio.sleep(_LOCK_AGAIN_SECONDS)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Writes what waits and closes the file."""
        self._open = False
        await self._stop()

    async def _stop(self) -> None:
        self._hand_over()
        for timer in (self._look, self._measuring):
            if timer is not None:
                timer.cancel()
        self._work.put(_Stop(self.settled if self.held else None))
        try:
            await asyncio.shield(self._stopped)
        finally:
            self._thread.join()
            self.machine.files.unlock(self._lock)

    def append(self, entry: bytes, *, even_if_full: bool = False) -> asyncio.Future[bool]:
        """Appends one serialised `JournalEntry`; see `append_many`."""
        return self.append_many((entry,), even_if_full=even_if_full)

    def append_many(self, entries: Sequence[bytes], *, even_if_full: bool = False) -> asyncio.Future[bool]:
        """Appends serialised `JournalEntry` messages, in order and in one commit.

        Args:
            entries: The messages.
            even_if_full: True for what is no decision, and must be said also when no decision can be taken.

        Returns:
            A future that resolves to True when all of them are durable (at once with durability `off`) and fails with
            `JournalUnwritableError` when none of them is. Cancelling it gives up the waiting, not the rows, and
            harms no other caller. It need not be awaited.

        Raises:
            JournalFullError: Too many rows wait for the writer, or for being shipped.
            JournalUnwritableError: The last write failed.
            JournalClosedError: The journal is not open.
        """
        self._check(len(entries), even_if_full=even_if_full)
        return self._take(_Append(self._loop.create_future(), len(entries), entries))

    def append_batch(self, batch: Batch) -> asyncio.Future[bool]:
        """Appends decisions, at least one, in one entry; those appended right before and after may be in it too.

        Returns and raises what `append_many` does. Its future also fails, with `JournalError`, when no entry can be
        made of the batch.
        """
        self._check(len(batch))
        return self._take(_Append(self._loop.create_future(), len(batch), batch=batch))

    def _check(self, rows: int, *, even_if_full: bool = False) -> None:
        """Raises when nothing can be appended now."""
        full = (self.full and not even_if_full) or self.depth + rows > self.settings.queue_rows
        if full or not (self._open and self.writable):
            self.refused += rows
            raise self._refusal()

    def _take(self, append: _Append) -> asyncio.Future[bool]:
        self.depth += append.rows
        self._gather(append)
        if self.settings.durability is Durability.OFF:
            append.future.set_result(True)
        return append.future

    def _gather(self, append: _Append) -> None:
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append(append)
        if len(self._gathered) >= self.settings.batch_rows:
            self._hand_over()

    def _hand_over(self) -> None:
        """Gives the writer what was gathered."""
        if self._gathered:
            self._put(self._gathered)
            self._gathered = []
            self._handed_over = True
            if self._look is None:
                self._look = self._loop.call_later(_SETTLE_SECONDS, self._settle_if_idle)

    def _put(self, appends: list[_Append]) -> None:
        self._settled_handed = self.settled
        self._work.put(_Batch(appends, self._settled_handed))

    def _settle_if_idle(self) -> None:
        """Writes the position up to which replies are settled, if no commit will do so."""
        self._look = None
        idle, self._handed_over = not self._handed_over, False
        if idle and self.settled > self._settled_handed:
            self._put([])
        if not idle or self.depth or self.held or not self.writable:
            self._look = self._loop.call_later(_SETTLE_SECONDS, self._settle_if_idle)

    async def flush(self) -> None:
        """Waits until everything appended so far is durable, and through where replies are settled. Safe to cancel.

        Raises:
            JournalUnwritableError: It could not be made durable.
            JournalClosedError: The journal is not open.
        """
        if not (self._open and self.writable):
            raise self._refusal()
        await self._after_what_waits()  # what stands before it in the queue
        await self._after_what_waits()  # and what is settled by that

    def _after_what_waits(self) -> asyncio.Future[bool]:
        nothing = _Append(self._loop.create_future(), 0)
        self._gather(nothing)
        return nothing.future

    def trim(self, through: int) -> None:
        """Asks the writer to remove the rows up to position `through`, in small steps between batches.

        While nothing can be written it waits.
        """
        if self._open:
            self._hand_over()
            self._put([])  # rows stay until their replies are settled
            self._work.put(_Trim(through))

    def _refusal(self) -> JournalError:
        if not self._open:
            return JournalClosedError("the audit journal is not open")
        if not self.writable:
            return JournalUnwritableError(f"the audit journal cannot be written: {self.last_error}")
        if self.full:
            return JournalFullError(f"the audit journal: {self.problem}")
        return JournalFullError(f"{self.depth} rows wait for the audit journal")

    def on_full(self, listener: Callable[[], None]) -> None:
        """Has a function called on the loop when the rows have come to fill all that they may."""
        self._when_full.append(listener)

    def _measured(self, bytes_: int, limit_bytes: int) -> None:
        """On the loop: what the rows fill by now, and what they may fill."""
        was_full = self.full
        self.bytes, self.limit_bytes = bytes_, limit_bytes
        if self.full and not was_full:
            self._count_outage()
            _log.error("audit_journal_full", path=str(self.settings.path), error=self.problem)
            for listener in self._when_full:
                listener()
        elif was_full and not self.full:
            _log.info("audit_journal_takes_rows_again", path=str(self.settings.path))
        if self.writable and not self.full:
            self._out = False
        if self.full and self._open and self._measuring is None:
            self._measuring = self._loop.call_later(_MEASURE_SECONDS, self._measure)

    def _measure(self) -> None:
        self._measuring = None
        self._work.put(_Measure())

    def _settle(self, appends: list[_Append], rows: int, position: int, seconds: float, grown: int) -> None:
        """On the loop: a batch is durable."""
        self.depth -= rows
        self.position = position
        self._measured(self.bytes + grown, self.limit_bytes)
        for append in appends:
            if not append.future.done():
                append.future.set_result(True)
        if rows:
            self.written += rows
            self.batches += 1
            self.last_commit_seconds = seconds
            self.commits.observe(seconds)
            self.commit_rows.observe(rows)

    def _fail(self, appends: list[_Append], why: str) -> None:
        """On the loop: these rows are not durable."""
        for append in appends:
            self.depth -= append.rows
            self.refused += append.rows
            if not append.future.done():
                append.future.set_exception(JournalUnwritableError(f"the audit journal cannot be written: {why}"))
                append.future.exception()  # seen: an outage is logged once, not for every future that is not awaited

    def _reject(self, append: _Append, error: Exception) -> None:
        """On the loop: no entry could be made of a batch, which is a bug."""
        self.depth -= append.rows
        self.refused += append.rows
        _log.error("audit_entry_failed", decisions=append.rows, exc_info=error)
        if not append.future.done():
            append.future.set_exception(JournalError(f"the decision cannot be written down: {error!r}"))
            append.future.exception()

    # The writer does not log: a full disk may hold the log too, and no failure to log may end the writer.

    def _note_outage(self, why: str) -> None:
        """On the loop: the journal became unwritable."""
        self._count_outage()
        _log.error("audit_journal_unwritable", path=str(self.settings.path), error=why)

    def _count_outage(self) -> None:
        if not self._out:
            self._out = True
            self.outages += 1

    def _note_recovery(self, position: int, seconds: float) -> None:
        """On the loop: the journal is writable again; rows may have turned up, or been added about them."""
        self.position = position
        _log.info("audit_journal_writable", path=str(self.settings.path), outage_seconds=round(seconds, 3))

    def _note_marked(self, cause: Cause, decisions: int) -> None:
        """On the loop: the file had decisions whose replies are unknown."""
        self.marked[cause] += decisions
        _log.warning("audit_replies_unknown", path=str(self.settings.path), cause=cause, decisions=decisions)

    def _note_neglect(self, what: str, why: str) -> None:
        """On the loop: something was put off that loses nothing."""
        _log.warning("audit_journal_neglected", what=what, error=why)

    def _run(self, opened: asyncio.Future[None]) -> None:
        """The writer thread."""
        post = self._loop.call_soon_threadsafe
        try:
            with _Writer(self, self._work, post) as writer:
                writer.settle_what_was_left(self._left)
                self.position = writer.position
                self.bytes, self.limit_bytes = writer.measure()
                self.writable = True
                post(_resolve, opened, None)
                writer.run()
        except Exception as error:
            self.writable = False
            self.last_error = f"{self.settings.path}: {error}"
            post(_resolve, opened, error if isinstance(error, JournalError) else JournalError(self.last_error))
            if not isinstance(error, (JournalError, sqlite3.Error, OSError)):
                raise
        finally:
            post(_resolve, self._stopped, None)


class _Append(NamedTuple):
    future: asyncio.Future[bool]
    rows: int
    """Decisions and other entries."""
    entries: Sequence[bytes] = ()
    batch: Batch | None = None
    """In place of `entries`."""


class _Batch(NamedTuple):
    appends: list[_Append]
    settled: int
    """`Journal.settled` when it was handed over."""


@dataclass(frozen=True, slots=True)
class _Trim:
    through: int


@dataclass(frozen=True, slots=True)
class _Measure:
    pass


@dataclass(frozen=True, slots=True)
class _Stop:
    settled: int | None
    """`Journal.settled`; None when nothing is held, and so all is settled that has become durable."""


_Work = _Batch | _Trim | _Measure | _Stop


class _Writer:
    """The writer thread's part: the only user of the file.

    Args:
        journal: Whose callers are answered.
        work: What the journal wants done, in order.
        post: Runs a function on the journal's loop.
    """

    def __init__(
        self,
        journal: Journal,
        work: Queue[_Work],
        post: Callable[..., object],
    ) -> None:
        self._journal = journal
        self._settings = journal.settings
        self._machine = journal.machine
        self._clock = journal.machine.clock
        self._work = work
        self._post = post
        self._file = self._open()
        self._settled = self._file.settled
        self._unmeasured = 0
        """Bytes written since the volume was looked at."""
        self._trim_waiting = 0
        """Rows up to here are to be removed as soon as anything can be written."""
        self._log_pages = 0.0
        self._checkpoints = journal.machine.threads.pool("audit-checkpoint")
        self._checkpoint: BackgroundFuture[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._checkpoints.shutdown()
        self._file.close()

    @property
    def position(self) -> int:
        """Position of the newest durable row."""
        return self._file.head.position

    def measure(self) -> tuple[int, int]:
        """What the rows fill, and what they may fill.

        Raises:
            JournalError: The volume is too small for what the settings say, or for any journal.
        """
        settings = self._settings
        self._unmeasured = 0
        journals = self._journal.on_volume
        reserve = journals * (_LOGS * settings.checkpoint_pages * _PAGE_BYTES + settings.queue_rows * _QUEUED_ROW_BYTES)
        limit = _MOST_BYTES if settings.max_mebibytes is None else settings.max_mebibytes * 2**20
        volume = self._machine.files.volume(settings.path.absolute().parent)
        if volume.total_bytes:
            _check_volume(settings, journals, volume.total_bytes, reserve)
            # What the log holds beyond the file's end will be moved there, and is free only until then.
            size = self._machine.files.identity(settings.path).size
            limit = min(limit, size + volume.free_bytes - reserve)
        return self._file.used_bytes(), limit

    def settle_what_was_left(self, left: Left) -> None:
        """Marks the decisions of a killed process whose replies are unknown."""
        self._mark(self._settled, "killed", left)
        self._write_settled(self.position)

    def _mark(self, after: int, cause: Literal["killed", "not_durable"], left: Left = _nobody) -> None:
        """Notes that the replies of the decisions after a position are unknown."""
        marked = _mark(self._file, after, cause, self._settled, left)
        if marked:
            self._post(self._journal._note_marked, cause, marked)

    def run(self) -> None:
        """Works until stopped."""
        while True:
            appends, rest = self._take()
            if (appends or self._settled > self._file.settled) and not self._write(appends):
                return
            match rest:
                case _Trim(through):
                    if not self._trim(through):
                        return
                case _Measure():
                    self._tell_measure()
                case _Stop(settled):
                    self._end(settled)
                    return

    def _end(self, settled: int | None) -> None:
        """Leaves it on disk through where replies are settled; what cannot be left, the next process marks."""
        with suppress(sqlite3.Error):
            self._write_settled(self.position if settled is None else settled)

    def _write_settled(self, settled: int) -> None:
        """Makes it durable through where replies are settled, unless it is."""
        self._settled = max(self._settled, settled)
        if self._settled > self._file.settled:
            self._file.settle(self._settled)

    def _take(self) -> tuple[list[_Append], _Trim | _Measure | _Stop | None]:
        """Waits for work and takes what is there: appends up to a batch, and what stood behind them."""
        work = self._work.get()
        appends: list[_Append] = []
        while isinstance(work, _Batch):
            appends += work.appends
            self._settled = max(self._settled, work.settled)
            if sum(append.rows for append in appends) >= self._settings.batch_rows:
                return appends, None
            try:
                work = self._work.get_nowait()
            except queue.Empty:
                return appends, None
        return appends, work

    def _write(self, appends: list[_Append]) -> bool:
        """Commits a batch and answers its callers; False when the journal was stopped during an outage."""
        appends, entries = self._entries(appends)
        started = self._clock()
        try:
            if entries:
                self._file.append(entries, self._settled)
            else:
                self._write_settled(self._settled)
        except Exception as error:  # whatever it is, the callers must hear and the writer must go on
            return self._outlast(error, appends)
        seconds = self._clock() - started
        grown = sum(map(len, entries)) + len(entries) * _ROW_BYTES
        rows = sum(append.rows for append in appends)
        self._post(self._journal._settle, appends, rows, self.position, seconds, grown)
        self._file.note()  # only now: the callers wait no longer
        self._log_pages += _PAGES_PER_COMMIT + grown / _PAGE_BYTES
        self._keep_log_short()
        self._unmeasured += grown
        if self._unmeasured >= _MEASURE_BYTES:
            self._tell_measure()
        return True

    def _entries(self, appends: list[_Append]) -> tuple[list[_Append], list[bytes]]:
        """The entries of what was appended, and whose they are: without batches of which no entry can be made."""
        whose: list[_Append] = []
        entries: list[bytes] = []
        side_by_side: list[_Append] = []
        for append in appends:
            if side_by_side and not _joins(side_by_side[0], append):
                whose += self._add_decisions(side_by_side, entries)
                side_by_side = []
            if append.batch is not None:
                side_by_side.append(append)
            else:
                whose.append(append)
                entries += append.entries
        if side_by_side:
            whose += self._add_decisions(side_by_side, entries)
        return whose, entries

    def _add_decisions(self, appends: list[_Append], entries: list[bytes]) -> list[_Append]:
        """Adds the entry of some batches; returns those it could be made of."""
        first, *others = [append.batch for append in appends]
        assert first is not None
        try:
            entries.append(first.entry(others))
        except Exception as error:  # a bug that one batch meets is none of the others' business
            if len(appends) == 1:
                self._post(self._journal._reject, appends[0], error)
                return []
            return [one for append in appends for one in self._add_decisions([append], entries)]
        return appends

    def _tell_measure(self) -> None:
        try:
            self._post(self._journal._measured, *self.measure())
        except (sqlite3.Error, OSError, JournalError) as error:
            self._post(self._journal._note_neglect, "measuring", str(error))

    def _trim(self, through: int) -> bool:
        """Removes some rows; False when the journal was stopped during an outage."""
        try:
            free = self._file.free_pages()
            left = self._file.trim(through, _TRIM_ROWS, self._settled)
            freed = self._file.free_pages() - free
        except JournalError as error:
            self._post(self._journal._note_neglect, "trim", str(error))
            return True
        except sqlite3.Error as error:  # its sync may have failed: what comes after it would be lost with it
            self._trim_later(through)
            return self._outlast(error, [])
        self._log_pages += _PAGES_PER_COMMIT + freed
        self._keep_log_short()
        if left:
            self._work.put(_Trim(through))
        else:
            self._tell_measure()
        return True

    def _trim_later(self, through: int) -> None:
        """Remembers a trim until the journal is well again."""
        self._trim_waiting = max(self._trim_waiting, through)

    def _keep_log_short(self) -> None:
        """Checkpoints when the log has grown by its share.

        The bulk moves in the background while commits go on; what was committed meanwhile is little, and is moved here,
        so that no frame is left and the next commit starts the log from its beginning.
        """
        if self._checkpoint is None:
            if self._log_pages < self._settings.checkpoint_pages:
                return
            self._log_pages = 0.0
            self._checkpoint = self._checkpoints.submit(checkpoint, self._settings.path)
        while not self._checkpoint.done():
            if self._log_pages < _LONGEST_LOG * self._settings.checkpoint_pages:
                return
            self._machine.threads.sleep(_CHECKPOINT_SECONDS)
        error = self._checkpoint.exception()
        self._checkpoint = None
        try:
            if error is not None:
                raise error
            self._file.checkpoint()
        except (sqlite3.Error, OSError) as failure:  # the log grows until a later one succeeds; nothing is lost
            self._post(self._journal._note_neglect, "checkpoint", str(failure))

    def _outlast(self, error: Exception, appends: list[_Append]) -> bool:
        """Fails everything that waits or arrives until a probe is durable; False when stopped before."""
        journal = self._journal
        began = self._clock()
        journal.last_error = str(error)
        journal.writable = False
        self._post(journal._fail, appends, str(error))
        self._post(journal._note_outage, str(error))
        backoff = Backoff(self._settings.retry_min_seconds, self._settings.retry_max_seconds, spread=(1.0, 1.0))
        acknowledged = self.position
        while True:
            if not self._refuse_for(backoff.next_pause()):
                return False
            try:
                make_log_durable(self._settings.path, self._machine.files)  # before closing moves it into the file
                with suppress(sqlite3.Error):
                    self._file.close()
                self._file = self._open()
                self._mark_unacknowledged(acknowledged)
                self._file.probe()
                self._write_settled(self._settled)
            except Exception as failure:  # as in _write
                journal.last_error = str(failure)
                continue
            break
        journal.last_error = ""
        journal.writable = True
        self._post(journal._note_recovery, self.position, self._clock() - began)
        self._tell_measure()
        if self._trim_waiting:
            self._work.put(_Trim(self._trim_waiting))
            self._trim_waiting = 0
        return True

    def _refuse_for(self, seconds: float) -> bool:
        """Fails what arrives during `seconds`; False when the journal is to stop."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            try:
                work = self._work.get(timeout=left)
            except queue.Empty:
                return True
            match work:
                case _Batch(appends, settled):
                    self._settled = max(self._settled, settled)
                    self._post(self._journal._fail, appends, self._journal.last_error)
                case _Trim(through):
                    self._trim_later(through)
                case _Stop(settled):
                    self._end(settled)
                    return False
        return True

    def _mark_unacknowledged(self, acknowledged: int) -> None:
        """Compares the file with the results that callers got."""
        position = self.position
        if position < acknowledged:
            raise JournalCorruptedError(position + 1, f"gone, like every row up to {acknowledged}")
        self._mark(acknowledged, "not_durable")

    def _open(self) -> JournalFile:
        return _open(self._settings.path, self._machine, sync_commits=self._settings.durability is Durability.FSYNC)


def _joins(before: _Append, append: _Append) -> bool:
    """True when the decisions of both can be in the same entry."""
    return before.batch is not None and append.batch is not None and before.batch.can_join(append.batch)


def settle_what_was_left(path: Path, machine: Machine = REAL, left: Left = _nobody, *, waits: bool = True) -> int:
    """Marks what a killed process left in its journal, which no process writes now; returns the last position.

    What it does not find there will never be found: it writes, in the place of a commit that SQLite had not completed.

    Args:
        path: The journal's file.
        machine: Whose disk it is on.
        left: Told what the process left.
        waits: Whether to wait for another one who does the same.

    Raises:
        JournalInUseError: A process writes it.
        JournalError: It cannot be opened, or its tail is not what was written.
        sqlite3.Error: It cannot be read or written.
    """
    lock = _lock_patiently(machine, path, _LOCK_SECONDS if waits else 0.0)
    try:
        file = _open(path, machine, sync_commits=True)
        try:
            marked = _mark(file, file.settled, "killed", file.settled, left)
            file.settle(file.head.position)
        finally:
            file.close()
    finally:
        machine.files.unlock(lock)
    if marked:
        _log.warning("audit_replies_unknown", path=str(path), cause="killed", decisions=marked)
    return file.head.position


def _check_volume(settings: JournalSettings, journals: int, total_bytes: int, reserve: int) -> None:
    room = (total_bytes - reserve) // journals
    where = f"the volume of {settings.path.absolute().parent} has {total_bytes >> 20} MiB"
    if room * journals < reserve:
        needed = "the journal needs" if journals == 1 else f"{journals} journals need"
        raise JournalError(f"{where}, and {needed} {2 * reserve >> 20} MiB, half of them as a reserve")
    if settings.max_mebibytes is not None and settings.max_mebibytes * 2**20 > room:
        raise JournalError(
            f"journal.max_mebibytes: {where}, {reserve >> 20} of them as a reserve, and cannot hold "
            f"{settings.max_mebibytes} MiB of rows{'' if journals == 1 else f' of {journals} journals each'}; "
            f"set at most {room >> 20}, or nothing for what there is"
        )


def _open(path: Path, machine: Machine, *, sync_commits: bool) -> JournalFile:
    make_log_durable(path, machine.files)
    return JournalFile(path, sync_commits=sync_commits, random_bytes=machine.random_bytes)


def _mark(
    file: JournalFile, after: int, cause: Literal["killed", "not_durable"], settled: int, left: Left = _nobody
) -> int:
    """Notes that the replies of the decisions after a position are unknown; returns how many they are."""
    unknown = unknown_replies(file.rows_after(after))
    left(unknown)
    marks = notes_of(unknown, cause)
    for first in range(0, len(marks), _MARKS):
        file.append(marks[first : first + _MARKS], settled)
    return len(marks)


def _lock_patiently(machine: Machine, path: Path, seconds: float) -> int:
    until = machine.clock() + seconds
    while True:
        try:
            return _lock(machine.files, path)
        except JournalInUseError:
            if machine.clock() >= until:
                raise
        machine.threads.sleep(_LOCK_AGAIN_SECONDS)


def _lock(files: Files, path: Path) -> int:
    """Takes the right to write `path`, held until it is given back or the process dies."""
    try:
        lock = files.lock(path.with_name(path.name + ".lock"))
    except OSError as error:
        raise JournalError(f"cannot open the audit journal: {error}") from error
    if lock is None:
        raise JournalInUseError(f"another process writes the audit journal {path}")
    return lock


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
