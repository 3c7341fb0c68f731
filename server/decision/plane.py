"""The request path: one order in, one durable decision out. Knows no transport; every edge calls `DataPlane.decide`."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from fallback.budget import Budget, BudgetSettings
from fallback.order import Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.blocks import Blocks
from server.decision.decided_block import OneDecided
from server.decision.following import Following, Observers
from server.decision.gathering import Gathering, Waiting
from server.decision.keyed_orders import KeyedOrders
from server.decision.pending import Joined, Pending, Waited
from server.decision.pending_block import OneCall
from server.decision.pending_slice import PendingSlice
from server.decision.promise import Promise, Promises
from server.decision.record import Decided
from server.decision.recorder import Recorder, Recording, fail
from server.decision.reserves import Reserves
from server.errors import DeadlineError, PretradeError

if TYPE_CHECKING:
    from fallback.chain import Chain
    from fallback.guards import Guards
    from server.control.state import ControlState
    from server.decision.admission import Admission
    from server.decision.decided_block import DecidedBlock
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.markets import Markets
    from server.decision.metrics import Alone
    from server.inference.model_map import ModelMap
    from server.inference.routed import Mirror, Scores
    from server.journal.reply_status import Cause

Deciding: TypeAlias = "asyncio.Future[Decided] | Waited"
"""A decision to come."""
_WAITING_SHARE = 0.5
"""Of the time that a batch, or an order of a stream, has left, for waiting for places. What remains is to suffice."""


class DataPlane:
    """Decides orders.

    Args:
        budget_settings: Cap and reserves of a decision's time.
        clock: Monotonic seconds, the event loop's own.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        models: Says whose order it is; None where there is one model.
        Everything else: the collaborators, one a step.
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
        self._admission = admission
        self._markets = markets
        self._chain = chain
        self._guards = guards
        self._replies = recording.replies
        self._control = control
        self._metrics = observers.metrics
        self._cap_seconds = budget_settings.cap_seconds
        self._clock = clock
        self._reserves = Reserves(budget_settings, observers.loop_lag)
        self._following = Following(cached_scores, shadow, control, admission, observers)
        self._recorder = Recorder(recording, self._reserves, self._following, clock, wall_clock_ns)
        self._keyed = KeyedOrders(
            idempotency=idempotency,
            markets=markets,
            guards=guards,
            recording=recording,
            reserves=self._reserves,
            admission=admission,
            metrics=observers.metrics,
            begin=lambda order, budget: self._arrive(order, budget, "key", has_place=False),
            clock=clock,
        )
        self._blocks = Blocks(
            markets=markets,
            chain=chain,
            guards=guards,
            recorder=self._recorder,
            control=control,
            reserves=self._reserves,
            models=models,
            pending=self._pending,
            left=self._block_left,
            metrics=observers.metrics,
            clock=clock,
        )
        self._promises: Promises[Pending | Joined] = Promises(self._ended)
        self._arrived: list[Pending] = []
        """Orders of this turn of the event loop."""
        self._gathering = Gathering(self._blocks.is_busy, self._take_up)
        """Orders that may be decided in columns."""
        self._will_take_up = False
        """Whether that is scheduled."""
        chain.on_free(self._gathering.freed)
        self._recorder.on_committed(self._gathering.freed)
        self._results: list[Pending] = []
        """Those whose first attempt has ended in this turn."""
        self._answers: list[Pending] = []
        """Those that got their answers by themselves in this turn."""
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

    async def place(self, deadline: float = math.inf) -> None:
        """Waits for a place, as an order without a deadline may, and one of a stream for half of the time it has."""
        await self._admission.place(_WAITING_SHARE * (deadline - self._clock()))

    def has_places_at_once(self, orders: int) -> bool:
        """Whether so many orders that may wait need not."""
        return self._admission.has_places_at_once(orders)

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
        task = asyncio.get_running_loop().create_task(self._keyed.decide(order, Budget(arrived, deadline)))
        task.add_done_callback(self._leave)
        return task

    def begin_each(self, orders: Sequence[Order], arrived: float, deadlines: Sequence[float]) -> Sequence[Waited]:
        """The same for orders of several callers that came together, without keys.

        Nothing, and none of them begun, where there is no place for all: then `begin` says why, for each of them.

        Args:
            orders: What is asked.
            arrived: When they were taken up, in monotonic seconds.
            deadlines: Until when each caller waits, for ever perhaps; none has passed.
        """
        if not self._admission.admit_together(len(orders)):
            return ()
        latest, promises, waiting = arrived + self._cap_seconds, list[Waited](), list[Waiting]()
        for order, deadline in zip(orders, deadlines, strict=True):
            until = latest if deadline > latest else deadline
            why = _why_alone(order)
            if why is None:
                promise = Waiting(self._promises, order, arrived, until)
                waiting.append(promise)
                promises.append(promise)
            else:
                budget = Budget(arrived, until)
                promises.append(self._arrive(order, budget, why, has_place=True, in_company=True))
        self._gathering.add(waiting)
        self._take_up_soon()
        return promises

    def begin_together(self, orders: Sequence[Order], arrived: float, deadline: float | None) -> PendingSlice | None:
        """The same for orders of one call without keys, deadlines, features and a trace of their own.

        None, and none of them begun, where one could not be: then `begin` says why, for each of them.
        """
        deadline = self.capped(arrived, deadline)
        if self._clock() >= deadline or not self._admission.admit_together(len(orders)):
            return None
        begun = PendingSlice(len(orders))
        for model, block, usual, others in self._blocks.begin_call(orders, arrived, deadline):
            if block is not None:
                begun.add(block, usual)
            for place, why in others.items():
                begun.alone[place] = self._arrive(
                    orders[place], Budget(arrived, deadline), why, has_place=True, in_company=True, model=model
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
        else:
            self._take_up_soon()
        return case.future

    def _wait(self, order: Order, arrived: float, deadline: float) -> Waited:
        """The same for an order that may be decided in columns, with others of its time."""
        promise = Waiting(self._promises, order, arrived, deadline)
        self._gathering.add((promise,))
        self._take_up_soon()
        return promise

    def _take_up_soon(self) -> None:
        """Takes up all orders of this turn of the event loop at its end."""
        if not self._will_take_up:
            self._will_take_up = True
            asyncio.get_running_loop().call_soon(self._take_up)

    def _pending(
        self, order: Order, budget: Budget, promise: Waited | None = None, *, has_place: bool = True
    ) -> Pending:
        if promise is None:
            promise = Promise(self._promises)
        case = promise.case = Pending(order, budget, promise, self._answered, has_place)
        return case

    def _take_up(self) -> None:
        """Life of a request, first part: from its arrival until a model is asked."""
        self._will_take_up = False
        arrived, self._arrived = self._arrived, []
        cases = [one for one in arrived if not one.future.done()]
        waiting = [one for one in self._gathering.take() if not one.done()]
        if waiting:
            cases += [
                self._pending(one.order, Budget(one.arrived, one.deadline), one)
                for one in self._blocks.begin_calls(waiting)
            ]
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
                reserve = reserves[allowed] = self._reserves.from_models(allowed, audit_seconds)
            budget.reserve_seconds = reserve
            budget.charge(pb.STAGE_ADMISSION, allowed, now - budget.arrived)
            if stale:
                case.degradations.append(pb.DEGRADATION_CONTROL_STALE)

    def _answered(self, case: Pending) -> None:
        """The model has answered one of those that were begun together, or will not; more may follow at once."""
        self._results.append(case)
        # What is not asked has met a bug of its stage while it was begun: it is not here for good.
        self._settle_soon(at_once=bool(case.asked))

    def _settle_soon(self, *, at_once: bool = True) -> None:
        """Has all cases of this turn go on together, and one that is alone in the server at once."""
        if at_once and self._admission.in_flight == 1:
            self._settle()
        elif len(self._results) + len(self._answers) == 1:
            asyncio.get_running_loop().call_soon(self._settle)

    def _settle(self) -> None:
        """Life of a request, second part: the model's scores become answers. Who got none goes on alone."""
        # What is not asked has met a bug of its stage while it was begun, and is on its way alone.
        cases, self._results = [case for case in self._results if case.asked and not case.future.done()], []
        answers, self._answers = [case for case in self._answers if not case.future.done()], []
        with _failing([*cases, *answers]):
            for case in cases:
                case.answer = self._chain.settle(case.asked, case)
                if case.answer is None:
                    self._go_alone(case)
            self._record([*(case for case in cases if case.answer is not None), *answers])

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
            self._answers.append(case)
            self._settle_soon()

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

    def heard(self, decisions: Sequence[OneDecided | DecidedBlock]) -> None:
        """The transport has the decisions' bytes, in time."""
        self._replies.heard(decisions)

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


def _why_alone(order: Order) -> Alone | None:
    """Why an order without a key cannot be decided in columns; None if it can."""
    if order.context.trace_id:
        return "trace"
    return "features" if order.brings_features else None
