"""Makes decisions durable: the packets of all that are decided together go to the journal at once.

A decision is handed to its caller when its packet is on disk. If that fails or takes too long, the caller gets ABSTAIN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.decided_block import DecidedBlock
from server.decision.record import Decided
from server.errors import DeadlineError, JournalError
from server.timing.deadlines import Deadlines
from server.timing.latency import LatencyWindow

if TYPE_CHECKING:
    import asyncio

    from server.decision.following import Following
    from server.decision.packets import PacketBatch, PacketWriter
    from server.decision.pending import Pending
    from server.decision.pending_block import PendingBlock
    from server.decision.replies import Replies
    from server.decision.reserves import Reserves
    from server.journal.journal import Journal


_REMEMBERED_SECONDS: Final = 10.0
"""How long the time of a commit counts: a caller that sends an order every few seconds meets the same disk again."""


@dataclass(frozen=True, slots=True)
class Recording:
    """What makes a decision durable."""

    journal: Journal
    replies: Replies
    packets: PacketWriter
    new_ids: Callable[[int], Sequence[str]]
    """Makes so many unique, time-ordered ids of decisions."""


class _Commit:
    """Cases whose packets become durable together. To `Deadlines` it is a future that is due with the first of them."""

    __slots__ = ("_recorder", "waiting")

    def __init__(self, cases: list[Pending], recorder: Recorder) -> None:
        self.waiting = cases
        self._recorder = recorder

    def done(self) -> bool:
        """True when no case waits any more."""
        return not self.waiting

    def set_result(self, durable: bool) -> None:
        """The cases are durable; if not, the time of at least one is up."""
        self._recorder.ended(self, durable)


class _BlockCommit:
    """Decisions of a block, until they are durable. To `Deadlines` it is as a `_Commit`.

    Where their time is up before, each goes on by itself, in a commit of the usual kind.
    """

    __slots__ = ("_recorder", "apart", "block")

    def __init__(self, block: PendingBlock, recorder: Recorder) -> None:
        self.block: PendingBlock | None = block
        """None when it waits no more."""
        self.apart: _Commit | None = None
        self._recorder = recorder

    def done(self) -> bool:
        """True when none waits any more."""
        return self.block is None

    def set_result(self, _: bool) -> None:
        """Their time is up."""
        self._recorder.block_is_late(self)


class Recorder:
    """Writes decisions down, and hands each to its caller once it is on disk.

    Args:
        recording: The journal, and what is written to it.
        reserves: What must be left for the reply.
        following: Does what follows decisions before their callers hear.
        clock: Monotonic seconds, the event loop's own.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        recording: Recording,
        reserves: Reserves,
        following: Following,
        clock: Callable[[], float],
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._journal = recording.journal
        self._replies = recording.replies
        self._packets = recording.packets
        self._new_ids = recording.new_ids
        self._reserves = reserves
        self._following = following
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._deadlines = Deadlines(clock)
        self._under_way = 0
        """Commits."""
        self._on_committed: list[Callable[[], None]] = []
        self.times = LatencyWindow(clock, prior_seconds=0.0, window_seconds=_REMEMBERED_SECONDS)
        """Seconds from writing decisions down until they were durable, or until their callers could wait no longer."""

    @property
    def is_committing(self) -> bool:
        """Whether decisions are on their way to the disk: others that were recorded now would wait for them."""
        return self._under_way > 0

    def on_committed(self, listener: Callable[[], None]) -> None:
        """Registers a function that is called when decisions have become durable, or could not."""
        self._on_committed.append(listener)

    def _goes_to_disk(self, durable: asyncio.Future[bool]) -> None:
        self._under_way += 1
        durable.add_done_callback(self._has_ended)

    def _has_ended(self, _: asyncio.Future[bool]) -> None:
        self._under_way -= 1
        for listener in self._on_committed:
            listener()

    def record(
        self,
        guarded: Sequence[tuple[Pending, pb.Action.ValueType, list[pb.ReasonCode.ValueType]]],
    ) -> None:
        """Writes decisions down: cases with their answers, and action and reasons after all guards."""
        written: list[Pending] = []
        packets = self._packets.batch()
        refused: list[Pending] = []
        reserves: dict[float, float] = {}
        now, wall_ns = self._clock(), self._wall_clock_ns()
        ids = self._new_ids(len(guarded))
        for (case, action, reasons), decision_id in zip(guarded, ids, strict=True):
            budget = case.budget
            allowed = budget.deadline - budget.arrived
            reserve = reserves.get(allowed)
            if reserve is None:  # most orders that are decided together are allowed the same
                reserve = reserves[allowed] = self._reserves.for_reply(allowed)
            case.recorded_at, case.durable_until = now, budget.deadline - reserve
            try:
                self._write(case, action, reasons, decision_id, packets, now, wall_ns)
            except JournalError:
                refused.append(case)
            except Exception as error:  # a bug that one order meets is none of the others' business
                fail(case, error)
            else:
                written.append(case)
        if refused:
            self._end_unwritten(refused)
        if written:
            self._append(written, packets)

    def record_block(self, block: PendingBlock) -> None:
        """The same for the orders of an answered block that no guard objects to."""
        now, wall_ns = self._clock(), self._wall_clock_ns()
        ids = self._new_ids(len(block.orders))
        decided = block.decided = DecidedBlock(block, ids, now, wall_ns, self._packets.control_version)
        budget = block.budget
        decided.durable_until = budget.deadline - self._reserves.for_reply(budget.deadline - budget.arrived)
        packets = self._packets.batch()
        packets.add_block(decided)
        try:
            self._replies.owe(decided)
            durable = self._journal.append_batch(packets)
        except JournalError:
            self._end_unwritten_block(block)
            return
        commit = _BlockCommit(block, self)
        self._deadlines.watch(commit, decided.durable_until, late=False)
        durable.add_done_callback(lambda done: self._block_committed(commit, done))
        self._goes_to_disk(durable)

    def _block_committed(self, commit: _BlockCommit, durable: asyncio.Future[bool]) -> None:
        block, commit.block = commit.block, None
        if commit.apart is not None:
            self._committed(commit.apart, durable)
        elif block is None:
            return
        elif durable.cancelled() or durable.exception() is not None:
            self._end_unwritten_block(block)
        elif not block.is_left():  # else its callers have gone, which is noted
            self._hand_over_block(block)

    def block_is_late(self, commit: _BlockCommit) -> None:
        """The time of decisions of a block is up before they are durable."""
        block, commit.block = commit.block, None
        if block is not None and not block.is_left():
            commit.apart = _Commit(block.part(), self)
            self.ended(commit.apart, durable=False)

    def _end_unwritten_block(self, block: PendingBlock) -> None:
        assert block.decided is not None
        self._replies.forget(block.decided)
        if not block.is_left():
            self._end_unwritten(block.part())

    def _hand_over_block(self, block: PendingBlock) -> None:
        """Gives the decisions of a block to their callers, if there is still time for that."""
        now, budget, decided = self._clock(), block.budget, block.decided
        assert decided is not None
        self.times.add(now - decided.recorded_at)
        if now >= budget.deadline or block.lost():
            self._hand_over(block.part())
            return
        budget.charge(pb.STAGE_AUDIT, decided.durable_until - decided.recorded_at, now - decided.recorded_at)
        decided.ended_at = now
        try:
            self._following.block(decided, now)
        except Exception:  # a bug that one order meets is none of the others' business
            budget.uses.pop()
            self._hand_over(block.part())
        else:
            block.ended()

    def _write(
        self,
        case: Pending,
        action: pb.Action.ValueType,
        reasons: list[pb.ReasonCode.ValueType],
        decision_id: str,
        packets: PacketBatch,
        now: float,
        wall_ns: int,
    ) -> None:
        answer = case.answer
        assert answer is not None
        decided = case.decided = Decided(
            case, answer, action, reasons, decision_id, now, wall_ns, self._packets.control_version
        )
        self._replies.owe(decided)
        packets.add(case, answer, decided, now, wall_ns)

    def _append(self, cases: list[Pending], packets: PacketBatch) -> None:
        try:
            durable = self._journal.append_batch(packets)
        except JournalError:
            self._end_unwritten(cases)
            return
        commit = _Commit(cases, self)
        self._watch(commit)
        durable.add_done_callback(lambda done: self._committed(commit, done))
        self._goes_to_disk(durable)

    def _watch(self, commit: _Commit) -> None:
        """Has those end in time that cannot wait for their commit."""
        due = min(case.durable_until for case in commit.waiting)
        self._deadlines.watch(commit, due, late=False)

    def _committed(self, commit: _Commit, durable: asyncio.Future[bool]) -> None:
        if durable.cancelled() or durable.exception() is not None:
            waiting, commit.waiting = commit.waiting, []
            self._end_unwritten(waiting)
        elif commit.waiting:
            self.ended(commit, durable.result())

    def ended(self, commit: _Commit, durable: bool) -> None:
        """Hands the cases to their callers: all of a commit, or those that cannot wait for it any longer."""
        waiting, now = commit.waiting, self._clock()
        commit.waiting = [] if durable else [case for case in waiting if case.durable_until > now]
        if commit.waiting:
            self._watch(commit)
        self.times.add(now - waiting[0].recorded_at)
        ended: list[Pending] = []
        for case in waiting:
            if case.future.done() or (not durable and case.durable_until > now):
                continue  # its caller has gone, which is noted; or it waits on
            if not durable:
                # The packet may still become durable, as the decision that was not given.
                assert case.decided is not None
                case.decided.abstain(pb.REASON_CODE_AUDIT_LATE)
            ended.append(case)
        self._hand_over(ended)

    def _end_unwritten(self, cases: Sequence[Pending]) -> None:
        """Hands over what cannot be made durable."""
        ended: list[Pending] = []
        for case in cases:
            assert case.decided is not None
            self._replies.forget(case.decided)
            if not case.future.done():
                case.decided.abstain(pb.REASON_CODE_AUDIT_UNAVAILABLE)
                ended.append(case)
        self._hand_over(ended)

    def _hand_over(self, cases: Sequence[Pending]) -> None:
        """Gives decisions to their callers, as far as there is still time for that."""
        now = self._clock()
        in_time: list[Pending] = []
        for case in cases:
            decided, budget = case.decided, case.budget
            assert decided is not None
            decided.charge_audit(budget, case.durable_until - case.recorded_at, case.recorded_at, now)
            if now >= budget.deadline:
                self._expire(case, decided)
            else:
                in_time.append(case)
        failed = self._following.cases(in_time, now)
        for case in in_time:
            decided = case.decided
            assert decided is not None
            if case in failed:
                self._replies.unheard(decided, "failed")
                case.future.set_exception(failed[case])
            else:
                case.future.set_result(decided)

    def _expire(self, case: Pending, decided: Decided) -> None:
        """Ends a case whose decision comes too late."""
        self._following.too_late(case)
        self._replies.unheard(decided, "deadline")
        late = DeadlineError("DEADLINE_EXCEEDED", "the answer was not ready in time")
        late.case = case
        case.future.set_exception(late)


def fail(case: Pending, error: BaseException) -> None:
    """Ends a case with an error, if its caller still waits."""
    if not case.future.done():
        case.future.set_exception(error)
