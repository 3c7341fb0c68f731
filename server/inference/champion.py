"""First stage of the chain: the champion model, on the primary, with one retry or hedge on another replica."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from fallback.budget import BudgetSettings
from fallback.chain import Taken
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.attempt import model_of, settle
from server.inference.attempt_span import attempt_span
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget
from server.inference.rows import Result, Row, RowBlock, Scored
from server.timing.latency import LatencyWindow

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.joint_case import JointCase
    from fallback.order import Order
    from server.inference.batcher import MicroBatcher
    from server.inference.pool import Role
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
    """A role's place in the stage: how the part of its replicas in a decision is named."""

    __slots__ = ("breaker_open", "drained", "failure_index", "role", "source", "stage")

    def __init__(
        self,
        role: Role,
        source: pb.Source.ValueType,
        stage: pb.Stage.ValueType,
        breaker_open: pb.Degradation.ValueType,
        drained: pb.Degradation.ValueType,
        failure_index: int,
    ) -> None:
        self.role = role
        self.source = source
        self.stage = stage
        self.breaker_open = breaker_open
        self.drained = drained
        self.failure_index = failure_index


class _Choice(NamedTuple):
    """A replica that an order may go to."""

    seat: _Seat
    replica: Replica
    again: bool = False
    """True where another replica of the same role comes before it."""


class _Picked(NamedTuple):
    """Where first attempts are made that are not hedged."""

    seat: _Seat
    replica: Replica
    passed_over: _Seat | None
    """The other role, if nobody of it can be asked."""
    retry_seconds: float
    """That another attempt takes; infinite where there can be none."""


class Champion:
    """Scores with the champion. At most two attempts, the second on another replica and only if it can still finish.

    The second attempt goes to the other role: that is the server which has the least in common with the one that
    failed. Where that is out, or full, or too slow, it goes to another endpoint of the role that was asked.

    An attempt that was made before, at a model on trial, counts.

    A replica that is full or whose breaker is open is passed over, which costs nothing. The first attempt is made where
    the expected time fits into the attempt's, the second where the p95 fits too and the retry budget grants it.

    Hedging makes the second attempt before the first has ended: as soon as that takes longer than the recent p95 of
    first attempts. The first usable score wins and the other attempt is given up: it leaves its queue, or its batch
    goes on and counts for its replica. In the ledger the first attempt's stage ends where the hedge's begins.

    Args:
        primary, secondary: Who serves the model; no secondary where the primary's endpoints are all there is.
        retry_budget: Bounds retries and hedges together.
        hedge: Whether to hedge.
        budget_settings: How the time left is divided between the attempts.
        clock: Monotonic seconds, the event loop's own.
        random: Uniform in [0, 1), jitters the attempts' time so that timeouts do not come in waves.
    """

    def __init__(
        self,
        primary: Role,
        secondary: Role | None,
        retry_budget: RetryBudget,
        hedge: bool,
        budget_settings: BudgetSettings,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._first = _Seat(
            primary,
            pb.SOURCE_PRIMARY,
            pb.STAGE_PRIMARY,
            pb.DEGRADATION_PRIMARY_BREAKER_OPEN,
            pb.DEGRADATION_PRIMARY_DRAINED,
            0,
        )
        self._second = (
            None
            if secondary is None
            else _Seat(
                secondary,
                pb.SOURCE_SECONDARY,
                pb.STAGE_SECONDARY,
                pb.DEGRADATION_SECONDARY_BREAKER_OPEN,
                pb.DEGRADATION_SECONDARY_DRAINED,
                1,
            )
        )
        self._seats = (self._first,) if self._second is None else (self._first, self._second)
        self._seat_of = {name: seat for seat in self._seats for name in seat.role.names}
        """By the replica that is asked."""
        self._several = any(seat.role.several for seat in self._seats)
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
        if case.features is None:
            return None
        return await self._ask(case, self._choices(case, self._seats, ()), tried=False)

    def begin(self, cases: Sequence[JointCase]) -> list[JointCase]:
        """Begins the first attempt for all cases that `answer` would make one for, without a hedge.

        Cases that come together go to one endpoint together, as long as their rows fill no more than a batch.

        Returns:
            Those that it began. Each gets its result from the batcher; `settle` then makes it an answer.
        """
        picked = self._pick()
        if picked is None:
            return []
        seat, replica, passed_over, retry_seconds = picked
        now, expected, begun = self._clock(), math.inf, []
        batcher, name, rows = replica.batcher, replica.name, list[Row]()
        left_before, allowed = math.nan, 0.0
        feature_set = replica.feature_set
        for place, case in enumerate(cases):
            if not place % _EXPECTED_ANEW:
                _submit(batcher, rows)
                if place and seat.role.several:
                    replica = seat.role.pick() or replica
                    batcher, name, feature_set = replica.batcher, replica.name, replica.feature_set
                expected = math.inf if batcher.full else batcher.expected_seconds
            budget = case.budget
            left = budget.deadline - now - budget.reserve_seconds
            if left != left_before:  # those of one call have the same, and may go on to the other replica together
                left_before, allowed = left, self._allowance(left, retry_seconds)
            if case.features is None or allowed < expected:
                continue
            row = case.row_of(feature_set)
            if row is None:
                continue
            if passed_over is not None:
                _pass_over(case, passed_over, 0.0, _closed(passed_over))
            case.asked_at, case.asked_of, case.allowed = now, name, allowed
            begun.append(case)
            rows.append(Row(row, now + allowed, case, now, from_caller=case.is_callers(feature_set)))
        _submit(batcher, rows)
        if begun:
            self._retry_budget.count_attempts(len(begun))
        return begun

    def _pick(self) -> _Picked | None:
        """Where first attempts without a hedge are made now; None where none can be."""
        if self._hedge:
            return None
        first, second = self._first, self._second
        seat, replica = first, first.role.pick()
        spare = None if second is None else second.role.pick()
        passed_over = None if spare is not None else second
        if replica is None:
            if second is None or spare is None:
                return None
            seat, replica, spare, passed_over = second, spare, None, first
        if spare is None and seat.role.several:
            spare = seat.role.pick((replica.name,))
        return _Picked(seat, replica, passed_over, math.inf if spare is None else spare.latency.p95)

    answers_at_once: Final = False

    def is_busy(self, orders: int) -> bool:
        """Whether so many rows would not leave the queue yet of the replica that is asked."""
        role = next((seat.role for seat in self._seats if seat.role.available), None)
        return role is not None and role.would_wait(orders)

    def on_free(self, listener: Callable[[], None]) -> None:
        """See `fallback.chain.BlockStage`."""
        for seat in self._seats:
            seat.role.on_batch(lambda outcome, seconds: listener())

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """All of them: one model scores them."""
        return (places,)

    def begin_block(self, block: Block) -> Taken:
        """Begins the first attempt of a block as `begin` does."""
        if self._hedge:
            return Taken.LEFT
        picked = self._pick()
        if picked is None:
            for seat in self._seats:
                block.pass_over(seat.stage, 0.0, _closed(seat))
            return Taken.PASSED_OVER
        seat, replica, passed_over, retry_seconds = picked
        batcher, now = replica.batcher, self._clock()
        rows = block.whole_rows_of(replica.feature_set)
        allowed = self._allowance(block.budget.for_models(now), retry_seconds)
        if rows is None or batcher.full or allowed < batcher.expected_seconds:
            return Taken.LEFT
        if passed_over is not None:
            block.pass_over(passed_over.stage, 0.0, _closed(passed_over))
        block.asked_at, block.asked_of, block.allowed = now, replica.name, allowed
        batcher.submit_block(RowBlock(rows, now + allowed, block, now))
        self._retry_budget.count_attempts(len(block))
        return Taken.BEGUN

    def settle_block(self, block: Block) -> bool:
        """Makes the scores of a block's attempt answers, if all of them are of one version."""
        model, used = model_of(block.results), self._clock() - block.asked_at
        if model is None:
            return False
        block.answered(self._seat_of[block.asked_of].source, model, used)
        return True

    def count_block(self, block: Block) -> None:
        """Counts the attempt of the orders that a block still has, and writes it into the ledger."""
        self.attempts[block.asked_of, Outcome.SUCCESS] += len(block)
        block.budget.charge(self._seat_of[block.asked_of].stage, block.allowed, block.used)

    def settle(self, case: JointCase) -> Answer | None:
        """The answer of a case whose first attempt has a result, if that is a score."""
        assert case.result is not None
        seat, used = self._seat_of[case.asked_of], self._clock() - case.asked_at
        case.budget.charge(seat.stage, case.allowed, used)
        return self._outcome(case, seat, case.asked_of, case.result, used, "")

    async def go_on(self, case: JointCase) -> Answer | None:
        """What is left to do for a case whose first attempt, begun with others, gave no score."""
        seat, second = self._seat_of[case.asked_of], self._second
        is_used = second is None or any(use[0] == second.stage for use in case.budget.uses)
        seats = () if second is None or is_used else (second,)
        choices = self._choices(case, seats, (case.asked_of,))
        if seat.role.several and (other := seat.role.pick((case.asked_of,))) is not None:
            choices.append(_Choice(seat, other, again=True))
        return await self._ask(case, choices, tried=True)

    async def _ask(self, case: Case, choices: Sequence[_Choice], tried: bool) -> Answer | None:
        """Asks these replicas in turn, `tried` if one was asked before."""
        attempts_left = _MOST_ATTEMPTS - len(case.attempts)
        for place, choice in enumerate(choices):
            seat, replica, again = choice
            payload = case.row_of(replica.feature_set)
            now = self._clock()
            others = choices[place + 1 :] if attempts_left > 1 else ()
            retry_seconds = others[0].replica.latency.p95 if others else math.inf
            allowed = self._allowance(case.budget.for_models(now), retry_seconds)
            problem = self._problem(choice, payload, allowed, tried)
            if problem or payload is None:
                if not again:
                    _pass_over(case, seat, allowed, problem)
                continue
            if not tried:
                self._retry_budget.count_attempts()
            hedged = False
            hedges = self._hedge and not tried and attempts_left == _MOST_ATTEMPTS
            if hedges and others and others[0].replica.feature_set is replica.feature_set:
                answer, hedged = await self._hedged_attempt(case, choice, others[0], payload, now, allowed)
            else:
                answer = await self._attempt(case, choice, payload, now, allowed)
            if answer is not None or hedged:
                if answer is not None and tried:
                    self.second_attempts["retry", "won"] += 1
                return answer
            tried = True
            if (attempts_left := attempts_left - 1) == 0:
                return None
        return None

    def _problem(self, choice: _Choice, payload: bytes | None, allowed: float, tried: bool) -> pb.Degradation.ValueType:
        """Why a replica is not asked; unspecified if it is, and then a retry has been taken from its budget."""
        seat, replica, _ = choice
        batcher = replica.batcher
        if payload is None:
            return pb.DEGRADATION_FEATURES_OF_SET_MISSING
        if batcher.full:
            return _FAILURE[Outcome.OVERLOAD][seat.failure_index]
        if allowed < (max(batcher.expected_seconds, replica.latency.p95) if tried else batcher.expected_seconds):
            return pb.DEGRADATION_NO_TIME_FOR_MODEL
        if tried and not self._granted("retry"):
            return pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED
        return pb.DEGRADATION_UNSPECIFIED

    def _choices(self, case: Case, seats: Sequence[_Seat], tried: Sequence[str]) -> list[_Choice]:
        """The replicas that an order may go to, one of each role and then another of each; who is out is noted."""
        choices = []
        for seat in seats:
            if (replica := seat.role.pick(tried)) is not None:
                choices.append(_Choice(seat, replica))
            else:
                _pass_over(case, seat, 0.0, _closed(seat))
        for seat, replica, _ in tuple(choices) if self._several else ():
            if (other := seat.role.pick((*tried, replica.name))) is not None:
                choices.append(_Choice(seat, other, again=True))
        return choices

    def _allowance(self, left: float, retry_seconds: float) -> float:
        """What an attempt may take of the seconds left: all, unless a retry could still use the rest."""
        if left * (1 - self._first_share) >= retry_seconds:
            left *= self._first_share
        return left * (1 - 0.1 * self._random())

    async def _attempt(self, case: Case, choice: _Choice, payload: bytes, now: float, allowed: float) -> Answer | None:
        """One attempt on one replica, written into the ledger and the case."""
        seat, replica, _ = choice
        span_id, traceparent = attempt_span(case)
        from_caller = case.is_callers(replica.feature_set)
        result = await replica.batcher.submit(payload, now + allowed, traceparent=traceparent, from_caller=from_caller)
        used = self._clock() - now
        case.budget.charge(seat.stage, allowed, used)
        return self._outcome(case, seat, replica.name, result, used, span_id)

    async def _hedged_attempt(
        self, case: Case, choice: _Choice, spare: _Choice, payload: bytes, now: float, allowed: float
    ) -> tuple[Answer | None, bool]:
        """The first attempt, and beside it a second one should it take long. True when there was a second one."""
        seat, replica, _ = choice
        patience = min(allowed, self._first_attempts.p95)
        (first_span, first_parent), (hedge_span, hedge_parent) = attempt_span(case), attempt_span(case)
        from_caller = case.is_callers(replica.feature_set)
        first = replica.batcher.submit(payload, now + allowed, traceparent=first_parent, from_caller=from_caller)
        hedge: asyncio.Future[Result] | None = None
        try:
            await asyncio.wait((first,), timeout=patience)
            hedged_at = self._clock()
            hedge_allowed = max(now + allowed - hedged_at, self._allowance(case.budget.for_models(hedged_at), math.inf))
            if not first.done() and self._may_hedge(spare.replica, hedge_allowed):
                hedge = spare.replica.batcher.submit(
                    payload, hedged_at + hedge_allowed, traceparent=hedge_parent, from_caller=from_caller
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
            return self._outcome(case, seat, replica.name, first.result(), ended_at - now, first_span), False
        case.budget.charge(seat.stage, patience, hedged_at - now)
        case.budget.charge(spare.seat.stage, hedge_allowed, ended_at - hedged_at)
        if first.cancelled():
            case.degradations.append(_FAILURE[Outcome.TIMEOUT][seat.failure_index])
        first_result = None if first.cancelled() else first.result()
        hedge_result = None if hedge.cancelled() else hedge.result()
        first_answer = self._outcome(case, seat, replica.name, first_result, ended_at - now, first_span)
        hedge_answer = self._outcome(
            case, spare.seat, spare.replica.name, hedge_result, ended_at - hedged_at, hedge_span
        )
        if first_answer is None and hedge_answer is not None:
            self.second_attempts["hedge", "won"] += 1
        return first_answer or hedge_answer, True

    def _may_hedge(self, spare: Replica, allowed: float) -> bool:
        """True when the other replica can be expected to answer in time and the budget grants it; takes it then."""
        needed = max(spare.batcher.expected_seconds, spare.latency.p95)
        return not spare.batcher.full and needed <= allowed and self._granted("hedge")

    def _granted(self, kind: str) -> bool:
        """Takes a second attempt from the retry budget, if it has one."""
        granted = self._retry_budget.try_take()
        self.second_attempts[kind, "granted" if granted else "refused"] += 1
        return granted

    def _outcome(
        self, case: Case, seat: _Seat, replica: str, result: Result | None, used: float, span_id: str
    ) -> Answer | None:
        """Counts an attempt and writes it into the case; its result is None when the other one had answered first."""
        outcome = Outcome.IGNORED if result is None else Outcome.SUCCESS if isinstance(result, Scored) else result
        self.attempts[replica, outcome] += 1
        if result is not None and outcome is not Outcome.SUCCESS:
            case.degradations.append(_FAILURE[outcome][seat.failure_index])
        return settle(case, replica, seat.source, result, used, span_id)


def _submit(batcher: MicroBatcher, rows: list[Row]) -> None:
    """Queues rows, and empties the list."""
    if rows:
        batcher.submit_together(rows.copy())
        rows.clear()


def _closed(seat: _Seat) -> pb.Degradation.ValueType:
    """Why a role of which no replica is available is not asked."""
    return seat.drained if seat.role.drained else seat.breaker_open


def _pass_over(case: Case, seat: _Seat, allowed: float, reason: pb.Degradation.ValueType) -> None:
    """Notes in ledger and case why a replica was not asked."""
    case.budget.skip(seat.stage, allowed, reason)
    if reason not in case.degradations:
        case.degradations.append(reason)
