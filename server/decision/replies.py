"""The ledger of replies: whether each caller received the decision that was written for it.

A row of the journal says what was decided. Whether the caller received it is known only later. Every decision is
therefore *owed* from the moment its packet is handed to the journal::

    owe() ──▶ owed ──heard()─────────▶ settled. Nothing is written: a row alone says `replied`
                │
                └──unheard(cause)──▶ a note for the journal, held here until it is durable ──▶ settled

*Heard* means that the deadline had not passed when the reply's bytes were handed to the transport. The edges only
report that the bytes were sent, or that they were not. The note is the journal entry `ReplyUnconfirmed`. If a repeat of
the call receives the decision after all, `ReplyHeard` is written. The last entry about a decision holds.

An answer that waits for seconds for a caller who does not read is noted as `unsent`: nobody knows yet what the caller
will hear. The caller may read it at any moment, and the process may be killed before `ReplyHeard` is durable. If the
call ends without it, a second note says why. An answer whose deadline passed while grpc.aio wrote it is `unsent`, too:
gRPC does not say which of the two came first.

A repeat must not get what the audit may deny, even if the process is killed before `ReplyHeard` is durable. Such a
decision is therefore noted as `repeated` before a repeat gets it (`denied`, `repeated`): a repeat may have received it.

If the journal does not take a note, or its commit fails, the note waits and is written when the journal has recovered.
The number of decisions that are not settled is bounded. Beyond that bound `owe` refuses, and the decision is answered
ABSTAIN, because the audit could not say whether it was received.

A process that is killed writes no notes. Therefore the journal knows which decisions are not settled (`Journal.hold`),
and stores the position through which all of them are. The next process that opens it notes the rest as `killed`.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, cast

import structlog

from server.decision.decided_block import DecidedRow
from server.decision.record import Decided, HeldTogether, ReplyState
from server.errors import JournalError, JournalFullError
from server.journal.reply_status import Cause, heard, unconfirmed

if TYPE_CHECKING:
    from server.decision.decided_block import DecidedBlock, OneDecided
    from server.journal.journal import Journal

_log = structlog.get_logger(__name__)

_MOST: Final = 100_000
"""Decisions that may be owed, and notes that may wait: about 50 MiB."""
_TICK_SECONDS: Final = 0.1
_LONGEST_OWED_SECONDS: Final = 5.0
"""An answer that waits longer for a caller who does not read is noted as unsent."""
_CLOSE_SECONDS: Final = 2.0
_NOT_KNOWN_TO_BE_HEARD: Final = (ReplyState.UNSENT, ReplyState.UNHEARD, ReplyState.ELSEWHERE)
"""Of these the audit may say that nobody heard them: of what is unsent, once its call has ended."""


class _Note:
    """What is to be written about a decision."""

    __slots__ = ("entry", "written")

    def __init__(self, entry: bytes) -> None:
        self.entry = entry
        self.written = False
        """True while the journal has it and has not said that it failed."""


class Replies:
    """Knows for every decision whether its caller received it, and notes in the journal if not.

    An async context manager, to be left before the journal is closed and after the last call has ended. Its methods are
    called on the journal's loop. The attributes are for metrics.

    Args:
        journal: Where decisions and notes are written.
        clock: Monotonic seconds, the event loop's own.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]) -> None:
        self._journal = journal
        self._clock = clock
        self._owed: Final = cast("OrderedDict[Decided | DecidedBlock, int]", journal.held)
        """Those not settled, the oldest first."""
        self._beside = 0
        """Decisions that are held in blocks, but for the first of each block."""
        self._notes: OrderedDict[Decided, _Note] = OrderedDict()
        """What is not durable yet, in the order in which it happened."""
        self._delayed = False
        self.unconfirmed: Counter[Cause] = Counter()
        """Decisions that were not what their callers heard, by cause."""
        self.lost = 0
        """Notes given up because too many waited; each is of a decision of another process."""

    @property
    def owed(self) -> int:
        """Decisions that are not settled."""
        return len(self._owed) + self._beside

    @property
    def waiting(self) -> int:
        """Notes that are not durable yet."""
        return len(self._notes)

    async def __aenter__(self) -> Self:
        self._ticking = asyncio.create_task(self._tick(), name="replies")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Notes what was never sent, and waits for a bounded time until every note is durable."""
        self._ticking.cancel()
        await asyncio.wait((self._ticking,))
        self._note_unsent(math.inf)
        until = self._clock() + _CLOSE_SECONDS
        while self._notes and self._journal.writable and self._clock() < until:
            self._write_again()
            await asyncio.sleep(_TICK_SECONDS / 10)
        if self._notes:
            _log.error("reply_notes_unwritten", notes=len(self._notes), error=self._journal.problem)

    def owe(self, decided: Decided | DecidedBlock) -> None:
        """Remembers a decision, or those of a block, whose packet is about to be handed to the journal.

        Raises:
            JournalFullError: Too many decisions are not settled.
        """
        if self.owed >= _MOST:
            raise JournalFullError(f"of {_MOST} decisions it is not known yet whether their callers received them")
        decided.reply = ReplyState.OWED
        self._journal.hold(decided)
        self._beside += decided.count - 1

    def forget(self, decided: Decided | DecidedBlock) -> None:
        """It did not become durable: there is no row whose reply could be in doubt."""
        for one in _each(decided):
            if one.reply is ReplyState.OWED:
                one.reply = ReplyState.NONE
                self._release(one)

    def heard(self, decisions: Iterable[OneDecided | DecidedBlock]) -> None:
        """The transport has the bytes of these replies, in time."""
        for decided in decisions:
            if isinstance(decided, DecidedRow):
                block = decided.block
                if block.is_apart:
                    self._heard(decided.apart())
                elif block.reply is ReplyState.OWED:
                    block.heard.add(decided.place)
                    if len(block.heard) == len(block.ids):
                        self._heard_block(block)
            elif isinstance(decided, Decided):
                self._heard(decided)
            elif decided.is_apart:
                for one in decided.apart():
                    self._heard(one)
            elif decided.reply is ReplyState.OWED:
                self._heard_block(decided)

    def _heard_block(self, block: DecidedBlock) -> None:
        block.reply = ReplyState.HEARD
        self._release_block(block)

    def _heard(self, decided: Decided) -> None:
        state = decided.reply
        if state is ReplyState.HEARD or state is ReplyState.NONE:
            return
        decided.reply = ReplyState.HEARD
        if decided.abstained:
            # The row says something else than the caller heard.
            self._note(decided, unconfirmed(decided.decision_id, "audit_late", decided.action, decided.reasons))
            self.unconfirmed["audit_late"] += 1
        elif state is ReplyState.OWED:
            self._release(decided)
        else:
            self._note(decided, heard(decided.decision_id))

    def in_doubt(self, decided: OneDecided | DecidedBlock) -> None:
        """The transport was given the reply's bytes in time; nobody knows whether it wrote them in time."""
        for one in _each(decided):
            if one.abstained:
                self._heard(one)  # the row says TRADE or NO_TRADE, which nobody heard
            elif one.reply is ReplyState.OWED:
                self._unsent(one)

    @staticmethod
    def denied(decided: Decided) -> bool:
        """Whether the audit may say, now or later, that nobody heard what a repeat is about to hear as decided."""
        return not decided.abstained and decided.reply in _NOT_KNOWN_TO_BE_HEARD

    def repeated(self, decided: Decided) -> None:
        """It is durable that a repeat may hear a decision that was `denied`."""
        if self.denied(decided):
            decided.reply = ReplyState.REPEATED

    def unheard(self, decided: OneDecided | DecidedBlock, cause: Cause) -> None:
        """The reply was not sent, and will not be. A decision that was heard before stays heard."""
        for one in _each(decided):
            if one.reply is ReplyState.OWED:
                self.unconfirmed[cause] += 1
            elif one.reply is not ReplyState.UNSENT:
                continue
            one.reply = ReplyState.UNHEARD
            self._note(one, unconfirmed(one.decision_id, cause))

    def _unsent(self, decided: Decided) -> None:
        """The reply has not been sent for long, and nobody says that it will not be."""
        decided.reply = ReplyState.UNSENT
        self.unconfirmed["unsent"] += 1
        self._note(decided, unconfirmed(decided.decision_id, "unsent"))

    def _release(self, decided: Decided) -> None:
        """A decision is settled."""
        block = decided.block
        if block is None:
            self._journal.release(decided)
            return
        block.unsettled.discard(decided)
        if not block.unsettled:
            self._release_block(block)

    def _release_block(self, block: HeldTogether) -> None:
        """All decisions of a block are settled."""
        if block in self._owed:
            self._beside -= len(block) - 1
            self._journal.release(block)

    def _note(self, decided: Decided, entry: bytes) -> None:
        if (decided.block or decided) not in self._owed and len(self._notes) >= _MOST:
            self.lost += 1
            return
        note = self._notes[decided] = _Note(entry)
        self._notes.move_to_end(decided)
        self._write(decided, note)

    def _write(self, decided: Decided, note: _Note) -> None:
        try:
            future = self._journal.append(note.entry, even_if_full=True)
        except JournalError as error:
            self._delay(error)
        else:
            note.written = True
            future.add_done_callback(partial(self._ended, decided, note))

    def _ended(self, decided: Decided, note: _Note, future: asyncio.Future[bool]) -> None:
        """The journal has made a note durable, or failed to."""
        note.written = False
        if future.cancelled() or (error := future.exception()) is not None:
            if not future.cancelled():
                self._delay(error)
        elif self._notes.get(decided) is note:  # otherwise there is more to say by now
            del self._notes[decided]
            self._release(decided)

    def _delay(self, error: BaseException | None) -> None:
        if not self._delayed:
            self._delayed = True
            _log.warning("reply_notes_wait", notes=len(self._notes), error=str(error))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._note_unsent(self._clock() - _LONGEST_OWED_SECONDS)
            self._write_again()

    def _note_unsent(self, before: float) -> None:
        """Notes decisions that no edge has reported since they came, at this instant or earlier.

        It is not known whether they will ever be sent.
        """
        old = list[Decided]()
        for decided in self._owed:
            if decided.arrived > before:
                break
            if decided.reply is ReplyState.OWED:
                old += _each(decided)
        for one in old:
            if one.reply is ReplyState.OWED:
                self._unsent(one)

    def _write_again(self) -> None:
        if self._journal.writable:
            for decided, note in list(self._notes.items()):
                if not note.written:
                    self._write(decided, note)
        if self._delayed and not self._notes:
            self._delayed = False
            _log.info("reply_notes_written")


def _each(decided: OneDecided | DecidedBlock) -> Sequence[Decided]:
    """Decisions as each is by itself: those of a block are apart from now on."""
    if isinstance(decided, Decided):
        return (decided,)
    return (decided.apart(),) if isinstance(decided, DecidedRow) else decided.apart()
