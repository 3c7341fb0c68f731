"""The model stage while a canary runs: some flows ask it first, and fall back to the champion when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from fallback.budget import BudgetSettings
from fallback.chain import Taken
from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.evidence import FirstAttempt, Side
from server.inference.attempt import settle
from server.inference.attempt_span import attempt_span
from server.inference.outcome import Outcome
from server.inference.rows import Lane, Scored

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.joint_case import JointCase
    from server.canary.plan import Canary
    from server.inference.champion import Champion
    from server.inference.pool import Role

_MOST_FLOWS: Final = 1_000
"""Flows that are remembered, so that callers who make up strategies cannot fill the memory."""


class CanaryRouting:
    """Asks the canary if the order's flow is its own; otherwise, or if it does not answer, the champion.

    The canary's time is limited so that the champion can still be asked. The canary is skipped if too little time is
    left or its breaker is open. Asking it costs one of the two attempts that an order has.

    An order with its caller's own features of `mf1` always goes to the champion: its caller could make the canary fail,
    and the canary is not judged by it. One with its caller's part of another set goes to a canary, which cannot decide
    without it. An order that `is_fair` rejects, or that finds the canary's queue long, is decided like any other but
    counts for or against neither model.

    Args:
        challenger: Where the canary is served.
        champion: The model stage without a canary.
        reserve_seconds: What an attempt at the champion takes at present.
        budget_settings: How the time left is divided.
        is_fair: Whether an order gives a model a fair chance: its outcome then counts.
        clock: Monotonic seconds, the event loop's own.
    """

    def __init__(
        self,
        challenger: Role,
        champion: Champion,
        reserve_seconds: Callable[[], float],
        budget_settings: BudgetSettings,
        is_fair: Callable[[Case], bool],
        clock: Callable[[], float],
    ) -> None:
        self._challenger = challenger
        self._champion = champion
        self._reserve_seconds = reserve_seconds
        self._share = budget_settings.first_attempt_share
        self._is_fair = is_fair
        self._order_listeners: list[Callable[[Side, FirstAttempt], None]] = []
        self._clock = clock
        self._flows: set[tuple[str, str]] = set()
        """Instrument and strategy of the orders that came while this canary ran."""
        self.canary: Canary | None = None
        """The version on trial; None without one."""
        self.orders = 0
        """Orders that belonged to a canary, since start."""
        self.answered = 0
        """Those that it answered."""

    def on_order(self, listener: Callable[[Side, FirstAttempt], None]) -> None:
        """Registers a function that is called, while a canary runs, for every order that gives a model a fair chance.

        It gets the model whose order it is, and the result of the first attempt at it.
        """
        self._order_listeners.append(listener)

    async def answer(self, case: Case) -> Answer | None:
        """The canary's or the champion's answer, or None. Cancelling it harms no other caller."""
        canary = self.canary
        if canary is None or case.features is None or case.from_caller or not _covers(canary, case):
            return await self._champion.answer(case)
        if not self._takes(canary, case):
            return await self._ask_champion(case)
        answer = None if _was_asked(case) else await self._ask(case, canary.model_version)
        return answer if answer is not None else await self._champion.answer(case)

    def _takes(self, canary: Canary, case: Case) -> bool:
        """True when the order's flow is the canary's. Remembers the flow."""
        flow = case.order.instrument, case.order.strategy
        if len(self._flows) < _MOST_FLOWS:
            self._flows.add(flow)
        return canary.takes(*flow)

    def flows(self, canary: Canary) -> tuple[int, int]:
        """How many different flows have had orders since `forget_flows`, and how many of them are the canary's now."""
        return len(self._flows), sum(canary.takes(*flow) for flow in self._flows)

    def forget_flows(self) -> None:
        """Another canary begins."""
        self._flows.clear()

    def begin(self, cases: Sequence[JointCase]) -> Sequence[JointCase]:
        """Begins the first attempts at the champion, but for orders that a canary covers: these go case by case."""
        canary = self.canary
        if canary is None:
            return self._champion.begin(cases)
        return self._champion.begin([case for case in cases if not _covers(canary, case)]) if canary.is_partial else ()

    def tells(self, case: Case) -> bool:
        """Whether what models say of a case tells something of the canary: of one that it covers."""
        return self.canary is None or _covers(self.canary, case)

    answers_at_once: Final = False

    def is_busy(self, orders: int) -> bool:
        """See `Champion.is_busy`."""
        return self._champion.is_busy(orders)

    def on_free(self, listener: Callable[[], None]) -> None:
        """See `fallback.chain.BlockStage`."""
        self._champion.on_free(listener)

    def begin_block(self, block: Block) -> Taken:
        """The same for orders in columns, where a canary covers none of them."""
        canary = self.canary
        if canary is not None and any(canary.covers(order.instrument, order.strategy) for order in block.orders):
            return Taken.LEFT
        return self._champion.begin_block(block)

    def settle_block(self, block: Block) -> bool:
        """See `Champion.settle_block`."""
        return self._champion.settle_block(block)

    def count_block(self, block: Block) -> None:
        """See `Champion.count_block`."""
        self._champion.count_block(block)

    def settle(self, case: JointCase) -> Answer | None:
        """See `Champion.settle`."""
        return self._champion.settle(case)

    async def go_on(self, case: JointCase) -> Answer | None:
        """See `Champion.go_on`."""
        return await self._champion.go_on(case)

    async def answer_on_trial(self, case: Case) -> Answer | None:
        """The canary's answer to an order of its own, unless it was asked for that order before; else None."""
        canary = self.canary
        if canary is None or case.features is None or case.from_caller or _was_asked(case):
            return None
        if not _covers(canary, case):
            return None
        if not self._takes(canary, case):
            return None
        return await self._ask(case, canary.model_version)

    async def _ask_champion(self, case: Case) -> Answer | None:
        """What the canary's orders are compared with."""
        allowed, reserve = self._allowed(case, self._clock())
        answer = await self._champion.answer(case)
        first = case.attempts[0] if case.attempts else None
        answered = first is not None and first.outcome == Outcome.SUCCESS.value
        self._note(Side.CHAMPION, case, first.used_seconds if first and answered else math.inf, allowed, reserve)
        return answer

    def _note(self, side: Side, case: Case, seconds: float, allowed: float, reserve: float) -> None:
        """Tells of the first attempt at an order, unless it had not even time for two such as the champion's."""
        if allowed >= reserve and self._is_fair(case):
            for listener in self._order_listeners:
                listener(side, FirstAttempt(seconds, allowed))

    def _allowed(self, case: Case, now: float) -> tuple[float, float]:
        """Seconds that a first attempt may take, and those that one at the champion takes at present."""
        left, reserve = case.budget.for_models(now), self._reserve_seconds()
        return min(left * self._share, left - reserve), reserve

    async def _ask(self, case: Case, version: str) -> Answer | None:
        """One attempt at the canary; written into the ledger and the case."""
        self.orders += 1
        replica, now = self._challenger.pick(), self._clock()
        allowed, reserve = self._allowed(case, now)
        row = None if replica is None else case.row_of(replica.feature_set)
        if replica is not None and row is None:  # of its set's features, which is no fault of the model's
            case.budget.skip(pb.STAGE_CANARY, max(allowed, 0.0), pb.DEGRADATION_FEATURES_OF_SET_MISSING)
            case.degradations.append(pb.DEGRADATION_FEATURES_OF_SET_MISSING)
            return None
        at_fault = replica is None or replica.batcher.stuck or allowed < replica.latency.expected
        if (
            replica is None
            or row is None
            or at_fault
            or replica.batcher.full_for(Lane.CANARY)
            or allowed < replica.batcher.expected_seconds_in(Lane.CANARY)
        ):
            case.budget.skip(pb.STAGE_CANARY, max(allowed, 0.0), pb.DEGRADATION_CANARY_PASSED_OVER)
            case.degradations.append(pb.DEGRADATION_CANARY_PASSED_OVER)
            if at_fault:  # a long queue is made by callers
                self._note(Side.CANARY, case, math.inf, allowed, reserve)
            return None
        span_id, traceparent = attempt_span(case)
        from_caller = case.is_callers(replica.feature_set)
        result = await replica.batcher.submit(row, now + allowed, Lane.CANARY, traceparent, from_caller)
        used = self._clock() - now
        case.budget.charge(pb.STAGE_CANARY, allowed, used)
        if isinstance(result, Scored) and result.model.version != version:
            result = Outcome.BAD_ANSWER
        answer = settle(case, replica.name, pb.SOURCE_CANARY, result, used, span_id)
        if answer is not None:
            self.answered += 1
            self._note(Side.CANARY, case, used, allowed, reserve)
            return answer
        case.degradations.append(pb.DEGRADATION_CANARY_PASSED_OVER)
        if result is not Outcome.OVERLOAD:
            self._note(Side.CANARY, case, math.inf, allowed, reserve)
        return None


def _covers(canary: Canary, case: Case) -> bool:
    return canary.covers(case.order.instrument, case.order.strategy)


def _was_asked(case: Case) -> bool:
    """True when the canary was asked for this order already, or passed over."""
    return any(stage == pb.STAGE_CANARY for stage, *_ in case.budget.uses)
