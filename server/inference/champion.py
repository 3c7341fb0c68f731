"""First stage of the chain: the champion model, on the primary, with one retry or hedge on the secondary."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from fallback.budget import BudgetSettings
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.attempt import settle
from server.inference.attempt_span import attempt_span
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget
from server.inference.rows import Result, Row, Scored
from server.timing.latency import LatencyWindow

if TYPE_CHECKING:
    from fallback.joint_case import JointCase
    from server.inference.batcher import MicroBatcher
    from server.inference.replica import Replica

_MOST_ATTEMPTS = 2
"""For one order, wherever they are made."""
_EXPECTED_ANEW: Final = 32
"""Rows after which the time to a score is estimated again: those before them lengthen the queue."""
_FAILURE = {
    Outcome.OVERLOAD: (pb.DEGRADATION_PRIMARY_OVERLOADED, pb.DEGRADATION_SECONDARY_OVERLOADED),
    Outcome.MODEL_ERROR: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.TRANSPORT: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.IGNORED: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.BAD_ANSWER: (pb.DEGRADATION_PRIMARY_BAD_ANSWER, pb.DEGRADATION_SECONDARY_BAD_ANSWER),
    Outcome.TIMEOUT: (pb.DEGRADATION_PRIMARY_TIMEOUT, pb.DEGRADATION_SECONDARY_TIMEOUT),
}


class _Seat:
    """A replica's place in the stage: how its part in a decision is named."""

    __slots__ = ("breaker_open", "drained", "failure_index", "replica", "source", "stage")

    def __init__(
        self,
        replica: Replica,
        source: pb.Source.ValueType,
        stage: pb.Stage.ValueType,
        breaker_open: pb.Degradation.ValueType,
        drained: pb.Degradation.ValueType,
        failure_index: int,
    ) -> None:
        self.replica = replica
        self.source = source
        self.stage = stage
        self.breaker_open = breaker_open
        self.drained = drained
        self.failure_index = failure_index


class Champion:
    """Scores with the champion. At most two attempts, the second on the other replica and only if it can still finish.

    An attempt that was made before, at a model on trial, counts.

    A replica that is full or whose breaker is open is passed over, which costs nothing. The first attempt is made where
    the expected time fits into the attempt's, the second where the p95 fits too and the retry budget grants it.

    Hedging makes the second attempt before the first has ended: as soon as that takes longer than the recent p95 of
    first attempts. The first usable score wins and the other attempt is given up: it leaves its queue, or its batch
    goes on and counts for its replica. In the ledger the first attempt's stage ends where the hedge's begins.

    Args:
        primary, secondary: Replicas that serve the same model.
        retry_budget: Bounds retries and hedges together.
        hedge: Whether to hedge.
        budget_settings: How the time left is divided between the attempts.
        clock: Monotonic seconds, the event loop's own.
        random: Uniform in [0, 1), jitters the attempts' time so that timeouts do not come in waves.
    """

    def __init__(
        self,
        primary: Replica,
        secondary: Replica,
        retry_budget: RetryBudget,
        hedge: bool,
        budget_settings: BudgetSettings,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._seats = (
            _Seat(
                primary,
                pb.SOURCE_PRIMARY,
                pb.STAGE_PRIMARY,
                pb.DEGRADATION_PRIMARY_BREAKER_OPEN,
                pb.DEGRADATION_PRIMARY_DRAINED,
                0,
            ),
            _Seat(
                secondary,
                pb.SOURCE_SECONDARY,
                pb.STAGE_SECONDARY,
                pb.DEGRADATION_SECONDARY_BREAKER_OPEN,
                pb.DEGRADATION_SECONDARY_DRAINED,
                1,
            ),
        )
        self._retry_budget = retry_budget
        self._hedge = hedge
        self._first_attempts = LatencyWindow(clock, prior_seconds=0.005)
        """Time of first attempts while hedging, of those given up until then."""
        self.attempts: Counter[tuple[str, Outcome]] = Counter()
        """Attempts since start, by (replica, outcome); IGNORED: given up because the other one had answered."""
        self.second_attempts: Counter[tuple[str, str]] = Counter()
        """Second attempts since start, by (`retry` or `hedge`, `granted`, `refused` or `won`): refused by the retry
        budget, won when the second attempt's score was the answer."""
        self._first_share = budget_settings.first_attempt_share
        self._clock = clock
        self._random = random

    async def answer(self, case: Case) -> Answer | None:
        """The champion's answer, or None. Cancelling it harms no other caller."""
        return None if case.features is None else await self._ask(case, self._passing(case), tried=False)

    def begin(self, cases: Sequence[JointCase]) -> list[JointCase]:
        """Begins the first attempt for all cases that `answer` would make one for at the primary, without a hedge.

        Returns:
            Those that it began. Each gets its result from the batcher; `settle` then makes it an answer.
        """
        first, second = self._seats
        if self._hedge or not first.replica.available:
            return []
        batcher, spare = first.replica.batcher, second.replica.available
        others = (second,) if spare else ()
        now, expected, begun = self._clock(), math.inf, []
        rows: list[Row] = []
        feature_set = first.replica.feature_set
        for place, case in enumerate(cases):
            if not place % _EXPECTED_ANEW:
                _submit(batcher, rows)
                expected = math.inf if batcher.full else batcher.expected_seconds
            allowed = self._allowance(case.budget.for_models(now), others)
            if case.features is None or allowed < expected:
                continue
            row = case.row_of(feature_set)
            if row is None:
                continue
            if not spare:
                _pass_over(case, second, 0.0, _closed(second))
            case.asked_at, case.allowed = now, allowed
            begun.append(case)
            rows.append(Row(row, now + allowed, case, now))
        _submit(batcher, rows)
        if begun:
            self._retry_budget.count_attempts(len(begun))
        return begun

    def settle(self, case: JointCase) -> Answer | None:
        """The answer of a case whose first attempt has a result, if that is a score."""
        assert case.result is not None
        seat, used = self._seats[0], self._clock() - case.asked_at
        case.budget.charge(seat.stage, case.allowed, used)
        return self._outcome(case, seat, case.result, used, "")

    async def go_on(self, case: JointCase) -> Answer | None:
        """What is left to do for a case whose first attempt, begun with others, gave no score."""
        spare = self._seats[1]
        seats = () if any(use[0] == spare.stage for use in case.budget.uses) else (spare,)
        return await self._ask(case, seats, tried=True)

    async def _ask(self, case: Case, seats: Sequence[_Seat], tried: bool) -> Answer | None:
        """Asks these replicas in turn, `tried` if one was asked before."""
        attempts_left = _MOST_ATTEMPTS - len(case.attempts)
        for place, seat in enumerate(seats):
            batcher = seat.replica.batcher
            payload = case.row_of(seat.replica.feature_set)
            now = self._clock()
            others = seats[place + 1 :] if attempts_left > 1 else ()
            allowed = self._allowance(case.budget.for_models(now), others)
            needed = max(batcher.expected_seconds, seat.replica.latency.p95) if tried else batcher.expected_seconds
            if payload is None:
                _pass_over(case, seat, 0.0, pb.DEGRADATION_FEATURES_OF_SET_MISSING)
            elif batcher.full:
                _pass_over(case, seat, allowed, _FAILURE[Outcome.OVERLOAD][seat.failure_index])
            elif allowed < needed:
                _pass_over(case, seat, allowed, pb.DEGRADATION_NO_TIME_FOR_MODEL)
            elif tried and not self._granted("retry"):
                _pass_over(case, seat, allowed, pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED)
            else:
                if not tried:
                    self._retry_budget.count_attempts()
                hedged = False
                spare = seats[place + 1] if place + 1 < len(seats) else None
                hedges = self._hedge and not tried and attempts_left == _MOST_ATTEMPTS
                if hedges and spare is not None and spare.replica.feature_set is seat.replica.feature_set:
                    answer, hedged = await self._hedged_attempt(case, seat, spare, payload, now, allowed)
                else:
                    answer = await self._attempt(case, seat, payload, now, allowed)
                if answer is not None or hedged:
                    if answer is not None and tried:
                        self.second_attempts["retry", "won"] += 1
                    return answer
                tried = True
                if (attempts_left := attempts_left - 1) == 0:
                    return None
        return None

    def _passing(self, case: Case) -> list[_Seat]:
        """The seats that an order may go to; the others go into the case."""
        seats = []
        for seat in self._seats:
            if seat.replica.available:
                seats.append(seat)
            else:
                _pass_over(case, seat, 0.0, _closed(seat))
        return seats

    def _allowance(self, left: float, others: Sequence[_Seat]) -> float:
        """What an attempt may take of the seconds left: all, unless another replica could still use the rest."""
        if others and left * (1 - self._first_share) >= others[0].replica.latency.p95:
            left *= self._first_share
        return left * (1 - 0.1 * self._random())

    async def _attempt(self, case: Case, seat: _Seat, payload: bytes, now: float, allowed: float) -> Answer | None:
        """One attempt on one replica, written into the ledger and the case."""
        span_id, traceparent = attempt_span(case)
        result = await seat.replica.batcher.submit(
            payload, now + allowed, traceparent=traceparent, from_caller=case.from_caller
        )
        used = self._clock() - now
        case.budget.charge(seat.stage, allowed, used)
        return self._outcome(case, seat, result, used, span_id)

    async def _hedged_attempt(
        self, case: Case, seat: _Seat, spare: _Seat, payload: bytes, now: float, allowed: float
    ) -> tuple[Answer | None, bool]:
        """The first attempt, and beside it a second one should it take long. True when there was a second one."""
        patience = min(allowed, self._first_attempts.p95)
        (first_span, first_parent), (hedge_span, hedge_parent) = attempt_span(case), attempt_span(case)
        first = seat.replica.batcher.submit(
            payload, now + allowed, traceparent=first_parent, from_caller=case.from_caller
        )
        hedge: asyncio.Future[Result] | None = None
        try:
            await asyncio.wait((first,), timeout=patience)
            hedged_at = self._clock()
            hedge_allowed = max(now + allowed - hedged_at, self._allowance(case.budget.for_models(hedged_at), ()))
            if not first.done() and self._may_hedge(spare, hedge_allowed):
                hedge = spare.replica.batcher.submit(
                    payload, hedged_at + hedge_allowed, traceparent=hedge_parent, from_caller=case.from_caller
                )
                await asyncio.wait((first, hedge), return_when=asyncio.FIRST_COMPLETED)
                if not any(future.done() and isinstance(future.result(), Scored) for future in (first, hedge)):
                    await asyncio.wait((first, hedge))
            else:
                await first
        finally:
            first.cancel()
            if hedge is not None:
                hedge.cancel()
        ended_at = self._clock()
        self._first_attempts.add(ended_at - now)
        if hedge is None:
            case.budget.charge(seat.stage, allowed, ended_at - now)
            return self._outcome(case, seat, first.result(), ended_at - now, first_span), False
        case.budget.charge(seat.stage, patience, hedged_at - now)
        case.budget.charge(spare.stage, hedge_allowed, ended_at - hedged_at)
        if first.cancelled():
            case.degradations.append(_FAILURE[Outcome.TIMEOUT][seat.failure_index])
        first_result = None if first.cancelled() else first.result()
        hedge_result = None if hedge.cancelled() else hedge.result()
        first_answer = self._outcome(case, seat, first_result, ended_at - now, first_span)
        hedge_answer = self._outcome(case, spare, hedge_result, ended_at - hedged_at, hedge_span)
        if first_answer is None and hedge_answer is not None:
            self.second_attempts["hedge", "won"] += 1
        return first_answer or hedge_answer, True

    def _may_hedge(self, spare: _Seat, allowed: float) -> bool:
        """True when the other replica can be expected to answer in time and the budget grants it; takes it then."""
        needed = max(spare.replica.batcher.expected_seconds, spare.replica.latency.p95)
        return not spare.replica.batcher.full and needed <= allowed and self._granted("hedge")

    def _granted(self, kind: str) -> bool:
        """Takes a second attempt from the retry budget, if it has one."""
        granted = self._retry_budget.try_take()
        self.second_attempts[kind, "granted" if granted else "refused"] += 1
        return granted

    def _outcome(self, case: Case, seat: _Seat, result: Result | None, used: float, span_id: str) -> Answer | None:
        """Counts an attempt and writes it into the case; its result is None when the other one had answered first."""
        outcome = Outcome.IGNORED if result is None else Outcome.SUCCESS if isinstance(result, Scored) else result
        self.attempts[seat.replica.name, outcome] += 1
        if result is not None and outcome is not Outcome.SUCCESS:
            case.degradations.append(_FAILURE[outcome][seat.failure_index])
        return settle(case, seat.replica.name, seat.source, result, used, span_id)


def _submit(batcher: MicroBatcher, rows: list[Row]) -> None:
    """Queues rows, and empties the list."""
    if rows:
        batcher.submit_together(rows.copy())
        rows.clear()


def _closed(seat: _Seat) -> pb.Degradation.ValueType:
    """Why a replica that is not available is not asked."""
    return seat.drained if seat.replica.drained else seat.breaker_open


def _pass_over(case: Case, seat: _Seat, allowed: float, reason: pb.Degradation.ValueType) -> None:
    """Notes in ledger and case why a replica was not asked."""
    case.budget.skip(seat.stage, allowed, reason)
    if reason not in case.degradations:
        case.degradations.append(reason)
