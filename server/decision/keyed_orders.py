"""Decides orders with an idempotency key: repeats of a call get the decision of the first one, or something safer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from fallback.order import Case, Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.idempotency import ClaimLostError, identify
from server.decision.record import Decided
from server.errors import DeadlineError, JournalError, OverloadedError
from server.journal.reply_status import unconfirmed
from server.timing.deadlines import Deadlines

if TYPE_CHECKING:
    from fallback.budget import Budget
    from fallback.guards import Guards
    from server.decision.admission import Admission
    from server.decision.decided_block import OneDecided
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.markets import Markets
    from server.decision.metrics import DecisionMetrics
    from server.decision.pending import Waited
    from server.decision.recorder import Recording
    from server.decision.reserves import Reserves
    from server.decision.shared_keys import KeyedOrder, Remembered
    from server.journal.reply_status import Cause


class KeyedOrders:
    """Sees that the orders of one key get one decision.

    Args:
        idempotency: Remembers keys and their decisions.
        markets, guards: Look again before a TRADE is repeated.
        recording: Makes notes about repeats durable.
        reserves: What such a note must leave of the time.
        admission, metrics: Count what gets no decision.
        begin: Begins with an order as if it had no key; the caller of the call has its place.
        clock: Monotonic seconds, the event loop's own.
    """

    def __init__(
        self,
        *,
        idempotency: IdempotencyWindow,
        markets: Markets,
        guards: Guards,
        recording: Recording,
        reserves: Reserves,
        admission: Admission,
        metrics: DecisionMetrics,
        begin: Callable[[Order, Budget], Waited],
        clock: Callable[[], float],
    ) -> None:
        self._idempotency = idempotency
        self._markets = markets
        self._guards = guards
        self._journal = recording.journal
        self._replies = recording.replies
        self._packets = recording.packets
        self._reserves = reserves
        self._admission = admission
        self._metrics = metrics
        self._begin = begin
        self._clock = clock
        self._note_deadlines = Deadlines(clock)

    async def decide(self, order: Order, budget: Budget) -> Decided:
        """Decides an order with a key.

        Raises:
            DeadlineError: An earlier call with the key has not ended, or what it got could not be had in time.
            OverloadedError: No further key can be remembered.
            KeyReusedError: The key belongs to another order.
        """
        try:
            return await self._decide_once(order, budget)
        except OverloadedError:
            self._admission.shed += 1  # no room for another key
            raise
        except TimeoutError as error:
            self._metrics.late += 1
            raise DeadlineError("DEADLINE_EXCEEDED", "an earlier call with this key is still under way") from error

    async def _decide_once(self, order: Order, budget: Budget) -> Decided:
        """The decision of an order with an idempotency key: that of the first call with it, or something safer."""
        keyed = identify(order.message, order.caller)
        made: Decided | None = None

        async def decide() -> Decided:
            nonlocal made
            promise = self._begin(order, budget)
            try:
                made = _by_itself(await promise)
            except asyncio.CancelledError:
                if not promise.cancel() and promise.exception() is None:  # it was decided before that was known
                    made = _by_itself(promise.result())
                raise
            return made

        try:
            kept = await self._idempotency.once(keyed, budget.deadline, decide)
        except ClaimLostError as error:
            assert made is not None
            self._metrics.late += 1
            self._replies.unheard(made, "superseded")
            raise DeadlineError("DEADLINE_EXCEEDED", "the answer was not ready in time") from error
        except BaseException as error:
            if made is not None:  # decided, but not published to the other processes in time
                self._replies.unheard(made, _cause(error))
            raise
        return kept.decided if kept.at is None else await self._repeat(order, budget, keyed, kept.decided, kept.at)

    async def _repeat(
        self, order: Order, budget: Budget, keyed: KeyedOrder, decided: Decided, at: Remembered
    ) -> Decided:
        """The answer to a repeat: the remembered decision, unless the guards object to it now.

        If they object, every later repeat gets the safer decision, whatever the guards say then. It is stored in the
        table first, noted in the audit next, and sent last. A repeat that finds it without its note writes the note
        first.

        A decision that the first call did not hear is sent only when it is durable that a repeat may have heard it. If
        that fails or takes too long, the decision is withdrawn as well.
        """
        if decided.action == pb.ACTION_TRADE:
            case = Case(order, budget)
            self._markets.look_up((case,))
            answer = decided.answer
            action, reasons = self._guards.again(case, answer)
            if action != pb.ACTION_TRADE:
                safer = decided.withdrawn(action, [*decided.reasons, *reasons[1:]], self._packets.control_version)
                decided, at = await self._idempotency.withdraw(keyed, at, safer, budget.deadline)
        if not at.is_withdrawn and self._replies.denied(decided):
            problem = await self._note(unconfirmed(decided.decision_id, "repeated"), budget)
            if problem is None:
                self._replies.repeated(decided)
            else:
                decided, at = await self._idempotency.withdraw(
                    keyed, at, self._abstained(decided, problem), budget.deadline
                )
        if at.is_withdrawn:
            self._idempotency.withdrawn += 1
            if not at.is_noted:
                decided = await self._note_withdrawn(decided, at, budget)
        if self._clock() >= budget.deadline:
            raise TimeoutError
        return decided

    async def _note_withdrawn(self, decided: Decided, at: Remembered, budget: Budget) -> Decided:
        """Makes it durable that repeats get this decision; ABSTAIN if that fails or takes too long."""
        note = unconfirmed(decided.decision_id, "withdrawn", decided.action, decided.reasons)
        problem = await self._note(note, budget)
        if problem is None:
            self._idempotency.noted(at)
            return decided
        return self._abstained(decided, problem)

    async def _note(self, note: bytes, budget: Budget) -> pb.ReasonCode.ValueType | None:
        """Makes a note durable before a reply; says why it could not be done while there was time for the reply."""
        durable_until = budget.deadline - self._reserves.for_reply(budget.allowed)
        try:
            durable = self._journal.append(note, even_if_full=True)
            self._note_deadlines.watch(durable, durable_until, late=False)
            return None if await durable else pb.REASON_CODE_AUDIT_LATE
        except JournalError:
            return pb.REASON_CODE_AUDIT_UNAVAILABLE

    def _abstained(self, decided: Decided, problem: pb.ReasonCode.ValueType) -> Decided:
        """What a repeat hears in place of a decision whose note is not durable."""
        reasons = decided.reasons if problem in decided.reasons else [*decided.reasons, problem]
        return decided.withdrawn(pb.ACTION_ABSTAIN, list(reasons), self._packets.control_version)


def _by_itself(decided: OneDecided) -> Decided:
    """The decision of an order that was in no block."""
    assert isinstance(decided, Decided)
    return decided


def _cause(error: BaseException) -> Cause:
    """Why a decision is not sent that was made when this was raised."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "deadline" if isinstance(error, TimeoutError) else "failed"
