"""The request path: one order in, one durable decision out. Knows no transport; every edge calls `DataPlane.decide`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fallback.budget import Budget, BudgetSettings
from fallback.order import CHAMPION_SOURCES, MODEL_SOURCES, Answer, Case, Order
from fallback.staleness import judge
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.idempotency import ClaimLostError, identify
from server.decision.record import Decided
from server.errors import DeadlineError, JournalError, OverloadedError
from server.journal.reply_status import unconfirmed
from server.timing.deadlines import Deadlines
from server.timing.latency import LatencyWindow

if TYPE_CHECKING:
    from fallback.cached_score import CachedScores
    from fallback.chain import Chain
    from fallback.guards import Guards
    from feature_cache.store.codec import FeatureSnapshot
    from feature_cache.store.l1 import FeatureCache
    from server.canary.burn import Objective
    from server.control.state import ControlState
    from server.decision.admission import Admission
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.metrics import DecisionMetrics
    from server.decision.record import PacketWriter
    from server.decision.replies import Replies
    from server.decision.reports import DecisionReports
    from server.decision.shared_keys import KeyedOrder, Remembered
    from server.inference.embedded_check import EmbeddedCheck
    from server.inference.shadow import Shadow
    from server.journal.journal import Journal
    from server.journal.reply_status import Cause
    from server.timing.loop_lag import LoopLag

_BOOK_AGE = features.INDEX["book_age_ms"]
_AGES = slice(_BOOK_AGE, features.INDEX["trade_age_ms"] + 1)
assert features.NAMES[_AGES] == ("book_age_ms", "trade_age_ms"), "they grow with the snapshot's own age"
_UNAUDITED = frozenset((pb.REASON_CODE_AUDIT_UNAVAILABLE, pb.REASON_CODE_AUDIT_LATE))
_OUT_OF_TIME = frozenset(
    (
        pb.DEGRADATION_NO_TIME_FOR_MODEL,
        pb.DEGRADATION_PRIMARY_TIMEOUT,
        pb.DEGRADATION_SECONDARY_TIMEOUT,
        pb.DEGRADATION_PRIMARY_OVERLOADED,
        pb.DEGRADATION_SECONDARY_OVERLOADED,
    )
)
"""What keeps a model from answering when too many ask it at once."""


class _Market:
    """What a snapshot says, in the form that decisions take it: the same for all of them until the next snapshot."""

    __slots__ = ("book_age_seconds", "for_buy", "for_sell", "mid", "snapshot")

    def __init__(self, snapshot: FeatureSnapshot) -> None:
        self.snapshot = snapshot
        self.book_age_seconds = float(snapshot.values[_BOOK_AGE]) / 1e3
        self.mid = snapshot.mid
        self.for_buy = snapshot.values
        self.for_sell = features.for_sell(snapshot.values)


@dataclass(frozen=True, slots=True)
class Recording:
    """What makes a decision durable."""

    journal: Journal
    replies: Replies
    packets: PacketWriter
    new_id: Callable[[], str]
    """Unique, time-ordered decision ids."""


@dataclass(frozen=True, slots=True)
class Observers:
    """What counts decisions and tells of them."""

    metrics: DecisionMetrics
    objective: Objective
    reports: DecisionReports
    loop_lag: LoopLag
    """How late the event loop is."""
    embedded_check: EmbeddedCheck
    """Has the primary score a sample of what the embedded model decided."""


class DataPlane:
    """Decides orders.

    Args:
        budget_settings: Cap and reserves of a decision's time.
        max_feature_age_seconds: Older features are stale.
        clock: Monotonic seconds, the event loop's own.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        Everything else: the collaborators, one a step of `_decide`.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        idempotency: IdempotencyWindow,
        feature_cache: FeatureCache,
        max_feature_age_seconds: float,
        chain: Chain,
        cached_scores: CachedScores,
        guards: Guards,
        recording: Recording,
        shadow: Shadow,
        control: ControlState,
        observers: Observers,
        budget_settings: BudgetSettings,
        clock: Callable[[], float],
        wall_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._admission = admission
        self._idempotency = idempotency
        self._feature_cache = feature_cache
        self._markets: dict[str, _Market] = {}
        """The newest of each instrument."""
        self._max_feature_age_seconds = max_feature_age_seconds
        self._chain = chain
        self._cached_scores = cached_scores
        self._guards = guards
        self._journal = recording.journal
        self._replies = recording.replies
        self._packets = recording.packets
        self._shadow = shadow
        self._embedded_check = observers.embedded_check
        self._control = control
        self._metrics = observers.metrics
        self._objective = observers.objective
        self._cap_seconds = budget_settings.cap_seconds
        self._fallback_reserve_seconds = budget_settings.fallback_reserve_seconds
        self._audit_reserve_seconds = budget_settings.audit_reserve_seconds
        self._audit_times = LatencyWindow(clock, prior_seconds=0.0)
        self._audit_deadlines = Deadlines(clock)
        self._reports = observers.reports
        self._loop_lag = observers.loop_lag
        self._reply_reserve_seconds = budget_settings.reply_reserve_seconds
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._new_id = recording.new_id

    def capped(self, arrived: float, deadline: float | None) -> float:
        """The monotonic instant before which an order's decision must be sent; its arguments are those of `decide`."""
        latest = arrived + self._cap_seconds
        return latest if deadline is None or deadline > latest else deadline

    async def place(self) -> None:
        """Waits for a place, as an order without a deadline may."""
        await self._admission.place()

    async def decide(self, order: Order, arrived: float, deadline: float | None) -> Decided:
        """Decides one order; the decision is durable when this returns.

        The caller of this method reports whether the reply was sent: `heard` or `unheard`.

        Args:
            order: A valid order.
            arrived: Monotonic instant at which it arrived.
            deadline: Monotonic instant at which the caller stops waiting; None for the server's cap.

        Raises:
            DeadlineError: Too late on arrival, or no durable decision before the deadline.
            OverloadedError, DrainingError: Not admitted.
            KeyReusedError: The idempotency key belongs to another order.

        Cancelling is safe: other callers keep their answers, and a packet already written is marked unconfirmed.
        """
        deadline = self.capped(arrived, deadline)
        if self._clock() >= deadline:
            self._metrics.late += 1
            raise DeadlineError("DEADLINE_EXPIRED", "the deadline had passed on arrival")
        budget = Budget(arrived, deadline, self._reserve(deadline - arrived))
        with self._admission.admit(order.reduce_only):
            try:
                if not order.message.idempotency_key:
                    return await self._decide(order, budget)
                return await self._decide_once(order, budget)
            except OverloadedError:
                self._admission.shed += 1  # no room for another key
                raise
            except asyncio.CancelledError:
                self._metrics.cancelled += 1
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
            made = await self._decide(order, budget)
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
        """
        if decided.action == pb.ACTION_TRADE:
            case = Case(order, budget)
            self._look_up_features(case)
            answer = Answer(
                decided.action, decided.source, decided.reasons[0], model_expires_at=decided.model_expires_at
            )
            action, reasons = self._guards.again(case, answer)
            if action != pb.ACTION_TRADE:
                safer = decided.withdrawn(action, [*decided.reasons, *reasons[1:]], self._packets.control_version)
                decided, at = await self._idempotency.withdraw(keyed, at, safer, budget.deadline)
        if at.is_withdrawn:
            self._idempotency.withdrawn += 1
            if not at.is_noted:
                decided = await self._note_withdrawn(decided, at, budget)
        if self._clock() >= budget.deadline:
            raise TimeoutError
        return decided

    async def _note_withdrawn(self, decided: Decided, at: Remembered, budget: Budget) -> Decided:
        """Makes it durable that repeats get this decision; ABSTAIN if that fails or takes too long."""
        durable_until = budget.deadline - self._reply_reserve(budget.allowed)
        note = unconfirmed(decided.decision_id, "withdrawn", decided.action, decided.reasons)
        try:
            durable = self._journal.append(note, even_if_full=True)
            self._audit_deadlines.watch(durable, durable_until, late=False)
            if await durable:
                self._idempotency.noted(at)
                return decided
            problem = pb.REASON_CODE_AUDIT_LATE
        except JournalError:
            problem = pb.REASON_CODE_AUDIT_UNAVAILABLE
        return decided.withdrawn(pb.ACTION_ABSTAIN, [*decided.reasons, problem], self._packets.control_version)

    def _reserve(self, allowed_seconds: float) -> float:
        """What model attempts may not touch.

        The audit's share is what it recently took in 19 of 20 cases, and the reply's reserve: where the disk or the
        machine is slow, a model's score that could no longer be made durable in time would be worth nothing. At least
        the reserve of the settings, at most half of what is allowed.
        """
        recent = min(self._audit_times.p95 + self._reply_reserve(allowed_seconds), allowed_seconds / 2)
        return self._fallback_reserve_seconds + max(self._audit_reserve_seconds, recent)

    def _reply_reserve(self, allowed_seconds: float) -> float:
        """The time that waiting for the audit must leave for the reply: the setting plus the event loop's delay.

        It is at most a quarter of the allowed time. A reply that is not sent by then comes too late.
        """
        late = self._reply_reserve_seconds + self._loop_lag.p95
        return max(self._reply_reserve_seconds, min(late, allowed_seconds / 4))

    async def _decide(self, order: Order, budget: Budget) -> Decided:
        """Life of a request, a line a step."""
        case = Case(order, budget)
        if self._control.stale:
            case.degradations.append(pb.DEGRADATION_CONTROL_STALE)
        budget.charge(pb.STAGE_ADMISSION, budget.allowed, self._clock() - budget.arrived)
        self._look_up_features(case)
        answer = await self._chain.decide(case)
        action, reasons = self._guards.apply(case, answer)
        decided = await self._make_durable(case, answer, action, reasons)
        try:
            self._after(case, answer, decided)
        except BaseException as error:
            self._replies.unheard(decided, _cause(error))
            raise
        return decided

    def _look_up_features(self, case: Case) -> None:
        """Fills in what is known of the instrument. Missing or stale features are a degradation, not an error."""
        started = self._clock()
        order = case.order
        own = order.caller_features
        entry = self._feature_cache.get(order.instrument)
        if entry is None:
            judge(case, None, math.nan, math.nan, self._max_feature_age_seconds)
        else:
            case.snapshot = entry.snapshot
            market = self._market(entry.snapshot)
            age = case.snapshot_age_seconds = entry.age_seconds(started)
            if judge(case, market.snapshot.state, age, market.book_age_seconds, self._max_feature_age_seconds):
                case.mid = market.mid
            if own is None:
                case.feature_age_seconds = age
                if case.features_problem is None:
                    values = (market.for_sell if order.side == pb.SIDE_SELL else market.for_buy).copy()
                    values[_AGES] += age * 1e3
                    case.features = values
        if own is not None and case.features_problem is None:
            case.features = features.for_sell(own) if order.side == pb.SIDE_SELL else own
        case.budget.charge(pb.STAGE_FEATURES, case.budget.remaining(started), self._clock() - started)

    def _market(self, snapshot: FeatureSnapshot) -> _Market:
        market = self._markets.get(snapshot.instrument)
        if market is None or market.snapshot is not snapshot:
            market = self._markets[snapshot.instrument] = _Market(snapshot)
        return market

    async def _make_durable(
        self, case: Case, answer: Answer, action: pb.Action.ValueType, reasons: list[pb.ReasonCode.ValueType]
    ) -> Decided:
        """Writes the packet and returns the decision once it is on disk; ABSTAIN where that fails or takes too long."""
        started = self._clock()
        durable_until = case.budget.deadline - self._reply_reserve(case.budget.allowed)
        decided = Decided(
            case, answer, action, reasons, self._new_id(), started, self._wall_clock_ns(), self._packets.control_version
        )
        try:
            packet = self._packets.packet(case, answer, decided, started)
            self._replies.owe(decided)
            durable = self._journal.append(packet)
            self._audit_deadlines.watch(durable, durable_until, late=False)
            if not await durable:
                # The packet may still become durable, as the decision that was not given.
                decided.abstain(pb.REASON_CODE_AUDIT_LATE)
        except JournalError:
            self._replies.forget(decided)
            decided.abstain(pb.REASON_CODE_AUDIT_UNAVAILABLE)
        except asyncio.CancelledError:
            self._replies.unheard(decided, "cancelled")
            raise
        now = self._clock()
        self._audit_times.add(now - started)
        decided.charge_audit(case.budget, durable_until - started, started, now)
        if now >= case.budget.deadline:
            self._metrics.late += 1
            self._objective.note(case, by_model=False)
            self._admission.dropped(case.budget.allowed)
            self._replies.unheard(decided, "deadline")
            late = DeadlineError("DEADLINE_EXCEEDED", "the answer was not ready in time")
            late.case = case
            raise late
        return decided

    def heard(self, decided: Decided) -> None:
        """The transport has the decision's bytes, in time."""
        self._replies.heard(decided)

    def unheard(self, decided: Decided, cause: Cause) -> None:
        """The decision was not sent: its caller had gone, or its deadline has passed."""
        if cause == "cancelled":
            self._metrics.cancelled += 1
        else:
            self._metrics.late += 1
        self._replies.unheard(decided, cause)

    def _after(self, case: Case, answer: Answer, decided: Decided) -> None:
        """What can wait until the decision is durable: cached score, mirrored rows, admission, metrics, reports."""
        if answer.source in CHAMPION_SOURCES and _UNAUDITED.isdisjoint(decided.reasons):
            # A score that is used again must be found in the audit, where a replay of its second use looks for it. That
            # of a model on trial is not: its flows are its own.
            self._cached_scores.remember(case, answer, decided.decision_id)
        if case.features is not None and (self._control.shadow or answer.source == pb.SOURCE_CANARY):
            self._shadow.mirror(case, answer, decided.decision_id)
        self._embedded_check.sample(case, answer, decided.decision_id)
        now = self._clock()
        if answer.source not in MODEL_SOURCES and not _OUT_OF_TIME.isdisjoint(case.degradations):
            self._admission.dropped(case.budget.allowed)
        else:
            self._admission.answered(now - case.budget.arrived, case.budget.allowed)
        self._metrics.observe(case, decided, now)
        self._objective.note(case, by_model=answer.source in MODEL_SOURCES)
        self._reports.decided(case, decided, now)


def _cause(error: BaseException) -> Cause:
    """Why a decision is not sent that was made when this was raised."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "deadline" if isinstance(error, TimeoutError) else "failed"
