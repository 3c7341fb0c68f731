"""The model stage while a canary runs: some flows ask it first, and fall back to the champion when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from fallback.budget import Budget, BudgetSettings
from fallback.chain import Taken
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.evidence import FirstAttempt
from server.canary.pairing import Side
from server.inference.attempt import model_of, settle
from server.inference.attempt_span import attempt_span
from server.inference.outcome import Outcome
from server.inference.rows import Lane, Result, RowBlock, Scored

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.joint_case import JointCase
    from fallback.order import Order
    from server.canary.plan import Canary
    from server.inference.champion import Champion
    from server.inference.pool import Role
    from server.inference.replica import Replica

_MOST_FLOWS: Final = 1_000
"""Flows that are remembered, so that callers who make up strategies cannot fill the memory."""


class Fairness(Protocol):
    """Says which orders give a model a fair chance: what becomes of the others says nothing of it."""

    def counts(self, case: Case) -> bool:
        """Whether an order does."""
        ...

    def counted(self, block: Block) -> Sequence[bool]:
        """Whether each order of a block does."""
        ...


class CanaryRouting:
    """Asks the canary if the order's flow is its own; otherwise, or if it does not answer, the champion.

    The canary's time is limited so that the champion can still be asked. The canary is skipped if too little time is
    left or its breaker is open. Asking it costs one of the two attempts that an order has. A score of it that comes
    when its trial has ended decides nothing, unless it was promoted.

    Orders in columns stay there: those of the canary's flows are asked of it together, and the others of the champion.
    What cannot be asked of the canary together goes on one by one.

    An order with its caller's own features of `mf1` always goes to the champion: its caller could make the canary fail,
    and the canary is not judged by it. One with its caller's part of another set goes to a canary, which cannot decide
    without it. An order that is not fair, or that finds the canary's queue long, is decided like any other but counts
    for or against neither model.

    Args:
        challenger: Where the canary is served.
        champion: The model stage without a canary.
        reserve_seconds: What an attempt at the champion takes at present.
        budget_settings: How the time left is divided.
        fairness: Says which orders count.
        clock: Monotonic seconds, the event loop's own.
    """

    def __init__(
        self,
        challenger: Role,
        champion: Champion,
        reserve_seconds: Callable[[], float],
        budget_settings: BudgetSettings,
        fairness: Fairness,
        clock: Callable[[], float],
    ) -> None:
        self._challenger = challenger
        self._champion = champion
        self._reserve_seconds = reserve_seconds
        self._share = budget_settings.first_attempt_share
        self._fairness = fairness
        self._order_listeners: list[Callable[[Side, FirstAttempt], None]] = []
        self._clock = clock
        self._flows: set[tuple[str, str]] = set()
        """Instrument and strategy of the orders that came while this canary ran."""
        self.canary: Canary | None = None
        """The version on trial; None without one."""
        self.promoted = ""
        """The version whose trial ended last, if that was promoted."""
        self.answered = 0
        """Orders of a canary's flows that it answered, since start."""
        self.passed_over = 0
        """Those that it was not asked for, or that it did not answer."""

    def on_order(self, listener: Callable[[Side, FirstAttempt], None]) -> None:
        """Registers a function that is called, while a canary runs, for every order that gives a model a fair chance.

        It gets the model whose order it is, and the result of the first attempt at it.
        """
        self._order_listeners.append(listener)

    async def answer(self, case: Case) -> Answer | None:
        """The canary's or the champion's answer, or None. Cancelling it harms no other caller."""
        answer = await self.answer_on_trial(case)
        if answer is not None:
            return answer
        started, is_control = self._clock(), self.canary is not None and not _was_asked(case)
        answer = await self._champion.answer(case)
        if is_control:
            self._note_champion(case, started)
        return answer

    def _takes(self, canary: Canary, order: Order) -> bool:
        """True when the order's flow is the canary's. Remembers the flow."""
        flow = order.instrument, order.strategy
        if not canary.covers(*flow):
            return False
        if len(self._flows) < _MOST_FLOWS:
            self._flows.add(flow)
        return canary.takes(*flow)

    def flows(self, canary: Canary) -> tuple[int, int]:
        """How many different flows have had orders since `forget_flows`, and how many of them are the canary's now."""
        return len(self._flows), sum(canary.takes(*flow) for flow in self._flows)

    def forget_flows(self) -> None:
        """Another canary begins."""
        self._flows.clear()

    def wants(self, case: Case) -> bool:
        """Whether an order is to be asked of the canary: of its flows, and asked of no model yet."""
        canary = self.canary
        if canary is None or case.features is None or case.from_caller or case.attempts or _was_asked(case):
            return False
        return self._takes(canary, case.order)

    def begin(self, cases: Sequence[JointCase]) -> Sequence[JointCase]:
        """Begins the first attempts at the champion; orders of the canary's flows go case by case."""
        if self.canary is None:
            return self._champion.begin(cases)
        return self._champion.begin([case for case in cases if not self.wants(case)])

    def tells(self, order: Order) -> bool:
        """Whether what models say of an order tells something of the canary: of one that it covers."""
        return self.canary is None or self.canary.covers(order.instrument, order.strategy)

    answers_at_once: Final = False

    @property
    def takes_all(self) -> bool:
        """Whether the canary can be asked, and gets all orders."""
        return self.canary is not None and self.canary.takes_all and self._challenger.available

    def is_busy(self, orders: int) -> bool:
        """See `Champion.is_busy`; that of the canary where it gets all orders."""
        if self.takes_all:
            return self._challenger.would_wait(orders)
        return self._champion.is_busy(orders)

    def on_free(self, listener: Callable[[], None]) -> None:
        """See `fallback.chain.BlockStage`."""
        self._champion.on_free(listener)
        self._challenger.on_batch(lambda outcome, seconds: listener())

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """The orders of the canary's flows, and the others."""
        canary = self.canary
        if canary is None:
            return self._champion.parted(chosen, orders, places)
        own, others = list[int](), list[int]()
        for place in places:
            (own if self._takes(canary, orders[place]) else others).append(place)
        return [part for part in (others, own) if part]

    def begin_block(self, block: Block) -> Taken:
        """Begins with a block at the canary or at the champion."""
        taken = self.begin_on_trial(block)
        if taken is None:
            taken = self._champion.begin_block(block)
            if taken is Taken.PASSED_OVER:  # told of once more by each, should no other stage take the block: no harm
                self._note_block(Side.CHAMPION, block, math.inf, self._clock())
        return taken

    def begin_on_trial(self, block: Block) -> Taken | None:
        """The same at the canary; None where no order of the block is of its flows.

        Where the last of its rows would not have its score in time, each goes alone: what its caller makes too long is
        then passed over, and is no fault of the canary's.
        """
        canary = self.canary
        own = 0 if canary is None else sum([canary.takes(one.instrument, one.strategy) for one in block.orders])
        if not own:
            return None
        replica, now = self._challenger.pick(), self._clock()
        if own < len(block) or replica is None:
            return Taken.LEFT
        rows, (allowed, _) = block.whole_rows_of(replica.feature_set), self._allowed(block.budget, now)
        if rows is None or _is_busy(replica, allowed, own):
            return Taken.LEFT  # each finds out by itself, and tells of it
        block.asked_at, block.asked_of, block.allowed = now, replica.name, allowed
        replica.batcher.submit_block(RowBlock(rows, now + allowed, block, now), Lane.CANARY)
        return Taken.BEGUN

    def settle_block(self, block: Block) -> bool:
        """See `Champion.settle_block`."""
        if not self.was_asked(block.asked_of):
            return self._champion.settle_block(block)
        model = model_of(block.results)
        if model is None or not self._may_decide(model.version):
            return False
        block.answered(pb.SOURCE_CANARY, model, self._clock() - block.asked_at)
        return True

    def count_block(self, block: Block) -> None:
        """Counts the attempt of the orders that a block still has, and tells of it."""
        if self.was_asked(block.asked_of):
            self.answered += len(block)
            block.budget.charge(pb.STAGE_CANARY, block.allowed, block.used)
            self._note_block(Side.CANARY, block, block.used, block.asked_at)
        else:
            self._champion.count_block(block)
            self._note_block(Side.CHAMPION, block, block.used, block.asked_at)

    def _may_decide(self, version: str) -> bool:
        """Whether it is on trial, or has been promoted since it was asked."""
        return version == (self.promoted if self.canary is None else self.canary.model_version)

    def was_asked(self, replica: str) -> bool:
        """Whether a replica of this name serves the canary."""
        return replica in self._challenger.names

    def settle(self, case: JointCase) -> Answer | None:
        """See `Champion.settle`; also of an order that has left the canary's block."""
        if self.was_asked(case.asked_of):
            return self._settle(case, case.asked_of, case.result, case.asked_at, case.allowed)
        answer = self._champion.settle(case)
        self._note_champion(case, case.asked_at)
        return answer

    async def go_on(self, case: JointCase) -> Answer | None:
        """See `Champion.go_on`; the champion's answer to an order that the canary was asked for."""
        if self.was_asked(case.asked_of):
            return await self._champion.answer(case)
        return await self._champion.go_on(case)

    async def answer_on_trial(self, case: Case) -> Answer | None:
        """The canary's answer to an order of its own, unless it was asked for that order before; else None."""
        return await self._ask(case) if self.wants(case) else None

    def _note_champion(self, case: Case, asked_at: float) -> None:
        """Tells of the first attempt at the champion, with which the canary's orders are compared."""
        if self.canary is None or case.from_caller or not self.tells(case.order):
            return
        first = case.attempts[0] if case.attempts else None
        answered = first is not None and first.outcome == Outcome.SUCCESS.value
        seconds = first.used_seconds if first and answered else math.inf
        self._note(Side.CHAMPION, case, seconds, *self._allowed(case.budget, asked_at))

    def _note(self, side: Side, case: Case, seconds: float, allowed: float, reserve: float) -> None:
        """Tells of the first attempt at an order, unless it had not even time for two such as the champion's."""
        if allowed >= reserve and self._fairness.counts(case):
            for listener in self._order_listeners:
                listener(side, FirstAttempt(seconds, allowed))

    def _note_block(self, side: Side, block: Block, seconds: float, asked_at: float) -> None:
        """The same for each order of a block."""
        if self.canary is None:
            return
        allowed, reserve = self._allowed(block.budget, asked_at)
        if allowed < reserve:
            return
        attempt = FirstAttempt(seconds, allowed)
        for order, is_fair in zip(block.orders, self._fairness.counted(block), strict=True):
            if is_fair and self.tells(order):
                for listener in self._order_listeners:
                    listener(side, attempt)

    def _allowed(self, budget: Budget, now: float) -> tuple[float, float]:
        """Seconds that a first attempt may take, and those that one at the champion takes at present."""
        left, reserve = budget.for_models(now), self._reserve_seconds()
        return min(left * self._share, left - reserve), reserve

    async def _ask(self, case: Case) -> Answer | None:
        """One attempt at the canary; written into the ledger and the case."""
        replica, now = self._challenger.pick(), self._clock()
        allowed, reserve = self._allowed(case.budget, now)
        row = None if replica is None else case.row_of(replica.feature_set)
        if replica is not None and row is None:  # of its set's features, which is no fault of the model's
            self.passed_over += 1
            case.budget.skip(pb.STAGE_CANARY, max(allowed, 0.0), pb.DEGRADATION_FEATURES_OF_SET_MISSING)
            case.degradations.append(pb.DEGRADATION_FEATURES_OF_SET_MISSING)
            return None
        if replica is None or row is None or _is_busy(replica, allowed, 1):
            self.passed_over += 1
            case.budget.skip(pb.STAGE_CANARY, max(allowed, 0.0), pb.DEGRADATION_CANARY_PASSED_OVER)
            case.degradations.append(pb.DEGRADATION_CANARY_PASSED_OVER)
            if replica is None or _is_at_fault(replica, allowed):
                self._note(Side.CANARY, case, math.inf, allowed, reserve)
            return None
        span_id, traceparent = attempt_span(case)
        from_caller = case.is_callers(replica.feature_set)
        result = await replica.batcher.submit(row, now + allowed, Lane.CANARY, traceparent, from_caller)
        return self._settle(case, replica.name, result, now, allowed, span_id)

    def _settle(
        self, case: Case, replica: str, result: Result, asked_at: float, allowed: float, span_id: str = ""
    ) -> Answer | None:
        """Writes an attempt that has ended into the ledger and the case, and tells of it."""
        canary, used = self.canary, self._clock() - asked_at
        case.budget.charge(pb.STAGE_CANARY, allowed, used)
        if isinstance(result, Scored) and not self._may_decide(result.model.version):
            result = Outcome.IGNORED if canary is None else Outcome.BAD_ANSWER
        answer = settle(case, replica, pb.SOURCE_CANARY, result, used, span_id)
        if answer is None:
            self.passed_over += 1
            case.degradations.append(pb.DEGRADATION_CANARY_PASSED_OVER)
        else:
            self.answered += 1
        if canary is not None and result is not Outcome.OVERLOAD:
            seconds = math.inf if answer is None else used
            self._note(Side.CANARY, case, seconds, allowed, self._reserve_seconds())
        return answer


def _is_at_fault(replica: Replica, allowed: float) -> bool:
    """Whether it cannot be asked, or is too slow for what is allowed."""
    return replica.batcher.stuck or allowed < replica.latency.expected


def _is_busy(replica: Replica, allowed: float, rows: int) -> bool:
    """Whether the last of so many rows that were asked for now would be too late: a long queue is made by callers."""
    batcher = replica.batcher
    return batcher.full_for(Lane.CANARY) or allowed < batcher.expected_seconds_in(Lane.CANARY, rows)


def _was_asked(case: Case) -> bool:
    """True when the canary was asked for this order already, or passed over."""
    return any(stage == pb.STAGE_CANARY for stage, *_ in case.budget.uses)
