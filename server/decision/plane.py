"""The request path: one order in, one durable decision out. Knows no transport; every edge calls `DataPlane.decide`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from fallback.block import Own
from fallback.budget import Budget, BudgetSettings
from fallback.order import CHAMPION_SOURCES, MODEL_SOURCES, NO_CONTEXT, Case, Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.decided_block import OneDecided
from server.decision.idempotency import ClaimLostError, identify
from server.decision.many_calls import ManyCalls
from server.decision.pending import Joined, Pending, Waited
from server.decision.pending_block import OneCall, Parts, PendingBlock
from server.decision.pending_slice import PendingSlice
from server.decision.promise import Promise, Promises
from server.decision.record import Decided
from server.decision.recorder import Recorder, Recording, fail
from server.errors import DeadlineError, JournalError, OverloadedError, PretradeError
from server.journal.reply_status import unconfirmed
from server.timing.deadlines import Deadlines

if TYPE_CHECKING:
    from fallback.block import View
    from fallback.chain import Chain
    from fallback.guards import Guards
    from server.canary.burn import Notes
    from server.control.state import ControlState
    from server.decision.admission import Admission
    from server.decision.decided_block import DecidedBlock
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.markets import Markets
    from server.decision.metrics import Alone, DecisionMetrics
    from server.decision.reports import DecisionReports
    from server.decision.shared_keys import KeyedOrder, Remembered
    from server.inference.model_map import ModelMap
    from server.inference.routed import Check, Mirror, Scores
    from server.journal.reply_status import Cause
    from server.timing.loop_lag import LoopLag

T = TypeVar("T")
BlockT = TypeVar("BlockT", bound=PendingBlock)
Deciding: TypeAlias = "asyncio.Future[Decided] | Waited"
"""A decision to come."""
_NOT_AGAIN = frozenset((pb.REASON_CODE_AUDIT_UNAVAILABLE, pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_OUT_OF_DOMAIN))
"""Scores that are not used for a later order: those that the audit does not hold, and of features no model has seen."""
_WAITING_SHARE = 0.5
"""Of the time that a batch has left, for waiting for places. What remains is to suffice for some of its orders."""
_LEAST_IN_BLOCK = 10
"""Orders with callers of their own that are decided in columns: fewer take less time one by one."""
_MOST_IN_BLOCK = 64
"""More would wait for each other where the model gets them in several batches."""
_NEAR_SECONDS = 0.002
"""By how much their deadlines may differ: a block goes by its earliest one."""
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


class Waiting(NamedTuple):
    """An order that is decided with those that come in the same turn of the event loop."""

    order: Order
    arrived: float
    deadline: float
    """Both in monotonic seconds."""
    promise: Waited


@dataclass(frozen=True, slots=True)
class Observers:
    """What counts decisions and tells of them."""

    metrics: DecisionMetrics
    objective: Notes
    reports: DecisionReports
    loop_lag: LoopLag
    """How late the event loop is."""
    embedded_check: Check
    """Has the primary score a sample of what the embedded model decided."""


class DataPlane:
    """Decides orders.

    Args:
        budget_settings: Cap and reserves of a decision's time.
        clock: Monotonic seconds, the event loop's own.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        models: Says whose order it is; None where there is one model.
        Everything else: the collaborators, one a step of `_decide`.
    """

    def __init__(
        self,
        *,
        admission: Admission,
        idempotency: IdempotencyWindow,
        markets: Markets,
        chain: Chain,
        cached_scores: Scores,
        guards: Guards,
        recording: Recording,
        shadow: Mirror,
        control: ControlState,
        observers: Observers,
        budget_settings: BudgetSettings,
        clock: Callable[[], float],
        wall_clock_ns: Callable[[], int] = time.time_ns,
        models: ModelMap | None = None,
    ) -> None:
        self._models = models
        self._admission = admission
        self._idempotency = idempotency
        self._markets = markets
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
        self._note_deadlines = Deadlines(clock)
        self._reports = observers.reports
        self._loop_lag = observers.loop_lag
        self._reply_reserve_seconds = budget_settings.reply_reserve_seconds
        self._clock = clock
        self._recorder = Recorder(
            recording, self._reply_reserve, self._after, self._after_block, self._too_late, clock, wall_clock_ns
        )
        self._promises: Promises[Pending | Joined] = Promises(self._ended)
        self._arrived: list[Pending | Waiting] = []
        """Orders of this turn of the event loop."""
        self._results: list[Pending] = []
        """Those whose first attempt has ended in this turn."""
        self._alone: set[asyncio.Task[None]] = set()
        """Of cases that ask the stages by themselves."""

    def capped(self, arrived: float, deadline: float | None) -> float:
        """The monotonic instant before which an order's decision must be sent; its arguments are those of `decide`."""
        latest = arrived + self._cap_seconds
        return latest if deadline is None or deadline > latest else deadline

    @property
    def must_wait(self) -> bool:
        """Whether an order without a deadline that comes now has to wait for a place."""
        return self._admission.must_wait

    async def place(self) -> None:
        """Waits for a place, as an order without a deadline may."""
        await self._admission.place()

    def has_places(self, orders: int) -> bool:
        """Whether so many orders may begin before others of their call have ended."""
        return self._admission.has_places(orders)

    async def places(self, orders: int, deadline: float | None, *, has_begun: bool) -> int:
        """Waits until some orders of a batch may begin, and for half of the time until its deadline at most; how many.

        None where there was no place for them. `has_begun` says that others of the batch have begun.
        """
        left = math.inf if deadline is None else deadline - self._clock()
        return await self._admission.places(orders, _WAITING_SHARE * left, has_begun=has_begun)

    def refused(self, orders: int) -> PretradeError:
        """Why so many orders are not admitted, which are counted as shed."""
        return self._admission.refused(orders)

    async def decide(self, order: Order, arrived: float, deadline: float | None) -> OneDecided:
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
        future = self.begin(order, arrived, deadline)
        try:
            return await future
        except asyncio.CancelledError:
            self.give_up(future)
            raise

    def begin(self, order: Order, arrived: float, deadline: float | None, *, in_company: bool = False) -> Deciding:
        """Begins with an order; its decision, once it is there, is what `decide` returns or raises.

        `in_company` says that more orders follow in this turn of the event loop, which it is to be decided with.
        Raises at once what needs no waiting. Who stops waiting says `give_up`.
        """
        deadline = self.capped(arrived, deadline)
        if self._clock() >= deadline:
            self._metrics.late += 1
            raise DeadlineError("DEADLINE_EXPIRED", "the deadline had passed on arrival")
        self._admission.admit(order.reduce_only)
        if not order.idempotency_key:
            why = _why_alone(order)
            if why is None:
                if in_company or self._admission.in_flight > 1:
                    return self._wait(order, arrived, deadline)
                why = "lone"
            return self._arrive(order, Budget(arrived, deadline), why, has_place=True, in_company=in_company)
        task = asyncio.get_running_loop().create_task(self._decide_keyed(order, Budget(arrived, deadline)))
        task.add_done_callback(self._leave)
        return task

    def begin_together(self, orders: Sequence[Order], arrived: float, deadline: float | None) -> PendingSlice | None:
        """The same for orders of one call without keys, deadlines, features and a trace of their own.

        None, and none of them begun, where one could not be: then `begin` says why, for each of them.
        """
        deadline = self.capped(arrived, deadline)
        if self._clock() >= deadline or not self._admission.admit_together(len(orders)):
            return None
        begun, now = PendingSlice(len(orders)), self._clock()
        groups = self._groups(orders)
        views = self._views(orders, groups, now)
        for model, places in groups.items():
            usual = [place for place in places if views[place] is not None]
            block = self._begin_block(orders, views, usual, Budget(arrived, deadline), model, now, self._of_one_call)
            if block is not None:
                begun.add(block, usual)
                if len(usual) == len(places):
                    continue
            for place in places:
                if block is None or views[place] is None:
                    begun.alone[place] = self._arrive(
                        orders[place],
                        Budget(arrived, deadline),
                        "stage" if views[place] is not None else self._why_no_view(),
                        has_place=True,
                        in_company=True,
                        model=model,
                    )
        return begun

    def give_up(self, future: Deciding) -> None:
        """The caller of an order that was begun does not wait any more."""
        if not future.done():
            future.cancel()
        elif not future.cancelled() and future.exception() is None:  # it was decided before that was known
            self.unheard(future.result(), "cancelled")

    def give_up_together(self, begun: PendingSlice) -> None:
        """The same for orders that were begun together."""
        for promise in begun.alone.values():
            self.give_up(promise)
        for block in begun.blocks:
            if not block.future.cancel() and not block.future.cancelled():  # they were decided before that was known
                for decided in block.decisions():
                    self.unheard(decided, "cancelled")

    def _leave(self, future: asyncio.Future[Decided]) -> None:
        """An admitted order with a key needs its place no more."""
        self._admission.leave()
        if future.cancelled():
            self._metrics.cancelled += 1

    def _ended(self, promises: Sequence[Waited]) -> None:
        """These have their decisions, or an error, or their callers have gone."""
        places = 0
        for promise in promises:
            case = promise.case
            if isinstance(case, Pending):
                places += case.has_place
                if promise.cancelled():
                    self._metrics.cancelled += case.has_place
                    self._left(case.decided)
            elif promise.cancelled():  # else its block has given its place back
                places += 1
                self._metrics.cancelled += 1
                if case is not None:
                    self._left(case.leave(promise))
        if places:
            self._admission.leave(places)

    async def _decide_keyed(self, order: Order, budget: Budget) -> Decided:
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
            promise = self._arrive(order, budget, "key", has_place=False)
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
        durable_until = budget.deadline - self._reply_reserve(budget.allowed)
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

    def _reserve(self, allowed_seconds: float, audit_seconds: float) -> float:
        """What model attempts may not touch.

        The audit's share is the seconds that it recently took in 19 of 20 cases, and the reply's reserve: where the
        disk or the machine is slow, a model's score that could no longer be made durable in time would be worth
        nothing. An attempt whose time is up ends as late as the event loop is. At least the reserve of the settings, at
        most half of what is allowed.
        """
        needed = audit_seconds + self._reply_reserve(allowed_seconds) + self._loop_lag.p99
        return self._fallback_reserve_seconds + max(self._audit_reserve_seconds, min(needed, allowed_seconds / 2))

    def _reply_reserve(self, allowed_seconds: float) -> float:
        """The time that waiting for the audit must leave for the reply: the setting plus the event loop's delay.

        It is at most a quarter of the allowed time. A reply that is not sent by then comes too late.
        """
        late = self._reply_reserve_seconds + self._loop_lag.p95
        return max(self._reply_reserve_seconds, min(late, allowed_seconds / 4))

    def _arrive(
        self, order: Order, budget: Budget, why: Alone, *, has_place: bool, in_company: bool = False, model: str = ""
    ) -> Waited:
        """Decides one order, together with those that arrive in the same turn of the event loop.

        `why` says why it is not decided in columns, and `model` whose order it is, where that is known by now.
        """
        self._metrics.alone[why] += 1
        case = self._pending(order, budget, has_place=has_place)
        case.model = model
        self._arrived.append(case)
        if not in_company and self._admission.in_flight == 1:
            self._take_up()  # nobody else is here to be decided with
        elif len(self._arrived) == 1:
            asyncio.get_running_loop().call_soon(self._take_up)
        return case.future

    def _wait(self, order: Order, arrived: float, deadline: float) -> Waited:
        """The same for an order that may be decided in columns."""
        promise: Waited = Promise(self._promises)
        self._arrived.append(Waiting(order, arrived, deadline, promise))
        if len(self._arrived) == 1:
            asyncio.get_running_loop().call_soon(self._take_up)
        return promise

    def _pending(
        self, order: Order, budget: Budget, promise: Waited | None = None, *, has_place: bool = True
    ) -> Pending:
        if promise is None:
            promise = Promise(self._promises)
        case = promise.case = Pending(order, budget, promise, self._answered, has_place)
        return case

    def _groups(self, orders: Sequence[Order]) -> Mapping[str, Sequence[int]]:
        """The places of the orders by their models; one without a name where there is one model."""
        return {"": range(len(orders))} if self._models is None else self._models.groups(orders)

    def _views(self, orders: Sequence[Order], groups: Mapping[str, Sequence[int]], now: float) -> Sequence[View | None]:
        """What is known of the orders' instruments; None of those that cannot be decided in columns."""
        if self._chain.for_blocks()[0] is None or self._control.stale:
            return [None] * len(orders)
        try:
            return self._markets.views(orders, groups, now)
        except Exception:  # each meets it by itself, and tells of it
            return [None] * len(orders)

    def _why_no_view(self) -> Alone:
        """Why `_views` has none of an order."""
        if self._chain.for_blocks()[0] is None:
            return "chain"
        return "control" if self._control.stale else "market"

    def _of_one_call(self, parts: Parts) -> OneCall:
        return OneCall(parts, self._pending, self._block_left, asyncio.get_running_loop().create_future())

    def _begin_block(
        self,
        orders: Sequence[Order],
        views: Sequence[View | None],
        places: Sequence[int],
        budget: Budget,
        model: str,
        now: float,
        made: Callable[[Parts], BlockT],
    ) -> BlockT | None:
        """Life of a request in columns, first part, of the orders at these places.

        None where something about it is not the usual. `made` makes the block.
        """
        stage, asked = self._chain.for_blocks()
        if stage is None or not places:
            return None
        allowed = budget.deadline - budget.arrived
        budget.reserve_seconds = self._reserve(allowed, self._recorder.times.p95)
        budget.charge(pb.STAGE_ADMISSION, allowed, now - budget.arrived)
        budget.charge(pb.STAGE_FEATURES, budget.deadline - now, self._clock() - now)
        block = made(
            Parts(
                [orders[place] for place in places],
                [view for place in places if (view := views[place]) is not None],
                budget,
                model,
                stage,
                asked,
                self._block_answered,
                self._went_alone,
            )
        )
        try:
            begun = stage.begin_block(block)
        except Exception:
            self._chain.broke(asked[0][0])
            begun = False
        if not begun:
            block.give_up()
            return None
        return block

    def _went_alone(self, why: Alone, orders: int) -> None:
        """So many orders have left their block."""
        self._metrics.alone[why] += orders

    def _block_answered(self, block: PendingBlock) -> None:
        """The model has answered all orders of a block, or will not."""
        asyncio.get_running_loop().call_soon(self._settle_block, block)

    def _settle_block(self, block: PendingBlock) -> None:
        """Life of a request in columns, the rest; an order that a guard objects to goes on alone."""
        if block.is_left():
            return
        try:
            block.drop_failures()
            if not block or not block.stage.settle_block(block):
                block.go_on_with((), "mixed")
                return
            started = self._clock()
            block.go_on_with(self._guards.clear_of(block), "guards")
            if not block:
                return
            block.stage.count_block(block)
            left = block.budget.deadline - started
            block.budget.charge(pb.STAGE_GUARDS, left if left > 0.0 else 0.0, self._clock() - started)
        except Exception:
            self._chain.broke(block.asked[0][0])
            block.go_on_with((), "bug")  # each finds out by itself
            return
        try:
            self._recorder.record_block(block)
        except Exception as error:
            self._fail_block(block, error)

    def _fail_block(self, block: PendingBlock, error: Exception) -> None:
        if block.decided is None:
            block.go_on_with((), "audit")
        else:
            for case in block.part():
                fail(case, error)

    def _block_left(self, block: OneCall) -> None:
        """The one caller of a block has gone: what is written of the decisions has not been heard."""
        for promise in block.apart.values():
            self.give_up(promise)
        if block.in_block:
            self._metrics.cancelled += block.in_block
            if not block.has_ended:
                self._admission.leave(block.in_block)
            if block.decided is not None:
                self._replies.unheard(block.decided, "cancelled")

    def _left(self, decided: Decided | None) -> None:
        """A caller has gone: what is written of the decision has not been heard."""
        if decided is not None:
            self._replies.unheard(decided, "cancelled")

    def _take_up(self) -> None:
        """Life of a request, first part: from its arrival until a model is asked."""
        arrived, self._arrived = self._arrived, []
        cases = [one for one in arrived if isinstance(one, Pending) and not one.future.done()]
        cases += self._join([one for one in arrived if isinstance(one, Waiting) and not one.promise.done()])
        if not cases:
            return
        with _failing(cases):
            self._take_over(cases)
            self._markets.look_up(cases)
            begun, asked = self._chain.begin([case for case in cases if _goes_the_usual_way(case)])
            for case in begun:
                case.asked = asked
            for case in cases:
                if not case.asked:
                    self._go_alone(case)

    def _join(self, waiting: list[Waiting]) -> list[Pending]:
        """Begins with orders in columns, as far as they can be; the others are cases from now on."""
        alone = self._metrics.alone
        if len(waiting) < _LEAST_IN_BLOCK:
            alone["few"] += len(waiting)
        else:
            now, orders = self._clock(), [one.order for one in waiting]
            groups = self._groups(orders)
            views = self._views(orders, groups, now)
            if unseen := views.count(None):
                alone[self._why_no_view()] += unseen
            for model, places in groups.items():
                usual = [place for place in places if views[place] is not None]
                left = len(usual)
                for near in _near(usual, waiting):
                    left -= len(near)
                    if not self._begin_joint(waiting, orders, views, near, model, now):
                        alone["stage"] += len(near)
                alone["deadlines" if len(usual) >= _LEAST_IN_BLOCK else "few"] += left
        return [
            self._pending(order, Budget(arrived, deadline), promise)
            for order, arrived, deadline, promise in waiting
            if promise.case is None
        ]

    def _begin_joint(
        self,
        waiting: Sequence[Waiting],
        orders: Sequence[Order],
        views: Sequence[View | None],
        places: Sequence[int],
        model: str,
        now: float,
    ) -> bool:
        """Begins with the orders at these places, the one with the earliest deadline first; whether it could."""
        joined = [waiting[place] for place in places]
        own = [
            Own(arrived, deadline, (pb.STAGE_ADMISSION, deadline - arrived, now - arrived, pb.DEGRADATION_UNSPECIFIED))
            for _, arrived, deadline, _ in joined
        ]
        promises = [one.promise for one in joined]
        block = self._begin_block(
            orders,
            views,
            places,
            Budget(own[0].arrived, own[0].deadline),
            model,
            now,
            lambda parts: ManyCalls(parts, own, self._pending, promises),
        )
        return block is not None

    def _take_over(self, cases: Sequence[Pending]) -> None:
        """Charges the way until here, and says what models may not touch of the time."""
        now, stale = self._clock(), self._control.stale
        audit_seconds = self._recorder.times.p95
        reserves: dict[float, float] = {}
        for case in cases:
            budget = case.budget
            allowed = budget.deadline - budget.arrived
            reserve = reserves.get(allowed)
            if reserve is None:  # most orders that arrive together are allowed the same
                reserve = reserves[allowed] = self._reserve(allowed, audit_seconds)
            budget.reserve_seconds = reserve
            budget.charge(pb.STAGE_ADMISSION, allowed, now - budget.arrived)
            if stale:
                case.degradations.append(pb.DEGRADATION_CONTROL_STALE)

    def _answered(self, case: Pending) -> None:
        """The model has answered one of those that were begun together, or will not; more may follow at once."""
        self._results.append(case)
        if self._admission.in_flight == 1 and case.asked:
            self._settle()  # nobody else is here, and this one has been begun for good
        elif len(self._results) == 1:
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        """Life of a request, second part: the model's scores become answers. Who got none goes on alone."""
        # What is not asked has met a bug of its stage while it was begun, and is on its way alone.
        cases, self._results = [case for case in self._results if case.asked and not case.future.done()], []
        with _failing(cases):
            for case in cases:
                case.answer = self._chain.settle(case.asked, case)
                if case.answer is None:
                    self._go_alone(case)
            self._record([case for case in cases if case.answer is not None])

    def _go_alone(self, case: Pending) -> None:
        """Has a case ask the stages by itself, until its caller has gone."""
        task = asyncio.get_running_loop().create_task(self._ask(case))
        self._alone.add(task)
        task.add_done_callback(self._alone.discard)
        case.future.add_done_callback(lambda future: task.cancel() if future.cancelled() else None)

    async def _ask(self, case: Pending) -> None:
        with _failing((case,)):
            chain = self._chain
            case.answer = await (chain.go_on(case.asked, case) if case.asked else chain.decide(case))
            self._record((case,))

    def _record(self, cases: Sequence[Pending]) -> None:
        """Life of a request, last part: the guards, the audit, and then the reply."""
        answers = [case.answer for case in cases if case.answer is not None]
        guarded = []
        for case, found in zip(cases, self._guards.apply_together(cases, answers), strict=True):
            if isinstance(found, Exception):
                fail(case, found)
            else:
                guarded.append((case, *found))
        self._recorder.record(guarded)

    def _too_late(self, case: Pending) -> None:
        """A decision became durable when its deadline had passed."""
        self._metrics.late += 1
        self._objective.note(case, by_model=False)
        self._admission.dropped(case.budget.allowed)

    def heard(self, decisions: Sequence[OneDecided | DecidedBlock]) -> None:
        """The transport has the decisions' bytes, in time."""
        for decided in decisions:
            self._replies.heard(decided)

    def in_doubt(self, decisions: Sequence[OneDecided | DecidedBlock]) -> None:
        """The transport was given the decisions' bytes in time; nobody knows whether it wrote them in time."""
        for decided in decisions:
            self._replies.in_doubt(decided)

    def unheard(self, decided: OneDecided | DecidedBlock, cause: Cause) -> None:
        """The decision was not sent: its caller had gone, or its deadline has passed."""
        if cause == "cancelled":
            self._metrics.cancelled += decided.count
        else:
            self._metrics.late += decided.count
        self._replies.unheard(decided, cause)

    def _after(self, cases: Sequence[Pending], now: float) -> Mapping[Pending, Exception]:
        """What can wait until decisions are durable: cached scores, mirrored rows, admission, metrics, reports.

        Returns:
            The cases that a bug was met with.
        """
        failed = dict[Pending, Exception]()
        is_mirrored, mirrored = self._control.shadow, []
        in_time: list[tuple[float, float]] = []
        for case in cases:
            answer, decided, budget = case.answer, case.decided, case.budget
            assert answer is not None
            assert decided is not None
            source = answer.source
            by_model, allowed = source in MODEL_SOURCES, budget.deadline - budget.arrived
            try:
                if source in CHAMPION_SOURCES and _NOT_AGAIN.isdisjoint(decided.reasons):
                    # A score that is used again must be found in the audit, where a replay of its second use looks for
                    # it. That of a model on trial is not: its flows are its own.
                    self._cached_scores.remember(case, answer, decided.decision_id)
                if source == pb.SOURCE_EMBEDDED:
                    self._embedded_check.sample(case, answer, decided.decision_id)
                self._objective.note(case, by_model)
            except Exception as error:  # a bug that one order meets is none of the others' business
                failed[case] = error
                continue
            if case.features is not None and (is_mirrored or source == pb.SOURCE_CANARY):
                mirrored.append((case, answer, decided.decision_id))
            if by_model or _OUT_OF_TIME.isdisjoint(case.degradations):
                in_time.append((now - budget.arrived, allowed))
            else:
                self._admission.dropped(allowed)
        self._admission.answered(in_time)
        sound = [case for case in cases if case not in failed] if failed else cases
        _all_or_each(self._shadow.mirror, mirrored, itemgetter(0), failed)
        _all_or_each(lambda some: self._reports.decided(some, now), sound, _itself, failed)
        _all_or_each(lambda some: self._metrics.observe(some, now), sound, _itself, failed)
        return failed

    def _after_block(self, decided: DecidedBlock, now: float) -> None:
        """The same for decisions that were made in columns."""
        block, count = decided.block, len(decided)
        self._cached_scores.remember_block(block, decided.ids)
        if self._control.shadow:
            self._shadow.mirror_block(block, decided.ids)
        self._embedded_check.sample_block(block, decided.ids)
        self._reports.decided_block(decided, now)
        # Where all this met no bug, nothing is counted twice.
        self._objective.note_block(block)
        self._admission.answered([(now - arrived, deadline - arrived) for arrived, deadline in block.times()])
        self._metrics.observe_block(decided, now)
        self._admission.leave(count)


def _all_or_each(
    step: Callable[[Sequence[T]], None],
    items: Sequence[T],
    case_of: Callable[[T], Pending],
    failed: dict[Pending, Exception],
) -> None:
    """Does something for all, or, where a bug is met, for each by itself, and notes the cases that meet it then.

    The step must meet a bug before it counts anything, or what it has counted counts twice.
    """
    try:
        step(items)
    except Exception:
        for item in items:
            try:
                step((item,))
            except Exception as error:
                failed[case_of(item)] = error


def _itself(case: Pending) -> Pending:
    return case


@contextmanager
def _failing(cases: Sequence[Pending]) -> Iterator[None]:
    """Ends the cases with the error that is raised inside: nobody else is there to hear of it."""
    try:
        yield
    except Exception as error:
        for case in cases:
            fail(case, error)


def _goes_the_usual_way(case: Pending) -> bool:
    """False for an order whose attempts are its own affair: they are in its trace, or may fail through its features."""
    return case.order.caller_features is None and not case.order.context.trace_id


def _by_itself(decided: OneDecided) -> Decided:
    """The decision of an order that was in no block."""
    assert isinstance(decided, Decided)
    return decided


def _why_alone(order: Order) -> Alone | None:
    """Why an order without a key cannot be decided in columns; None if it can."""
    if order.context is not NO_CONTEXT:  # a trace or a correlation id of its own
        return "context"
    return "features" if order.brings_features else None


def _near(places: list[int], waiting: Sequence[Waiting]) -> Iterator[list[int]]:
    """Those of some orders that are decided in one block: their deadlines are near each other."""
    places.sort(key=lambda place: waiting[place].deadline)
    first = 0
    while len(places) - first >= _LEAST_IN_BLOCK:
        latest = waiting[places[first]].deadline + _NEAR_SECONDS
        last = first + 1
        while last < len(places) and last - first < _MOST_IN_BLOCK and waiting[places[last]].deadline <= latest:
            last += 1
        if last - first >= _LEAST_IN_BLOCK:
            yield places[first:last]
        first = last


def _cause(error: BaseException) -> Cause:
    """Why a decision is not sent that was made when this was raised."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return "deadline" if isinstance(error, TimeoutError) else "failed"
