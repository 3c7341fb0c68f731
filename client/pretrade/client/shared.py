"""Calls that many callers share: `Shared` for threads, `AsyncShared` for tasks.

An order that comes while others are under way waits until one of their calls has ended, and then goes with all that
have come meanwhile, in one `DecideBatch`. A lone caller waits for nobody and has calls of its own. In Python a call
costs its caller far more than an order in a call does, and so does a message on a stream.

Orders that can only reduce an exposure go first, and in calls without others: an overloaded server then still takes
them. A call carries the trace of its orders' callers, if all of them have the same one, and none otherwise.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Final, Generic, TypeVar

import grpc

from pretrade.client.asking import Asked, Asking, Metadata, Result, allow, trace_of
from pretrade.client.decisions import Decision
from pretrade.client.errors import DeadlineError, UnavailableError
from pretrade.decision.v1 import decision_pb2 as pb

_CALLS: Final = 4
"""Under way at once. With one, every order would wait for the call before its own; with many, few orders share one."""
_ORDERS: Final = 64
"""In one call: as many as a server decides at a time."""
_GRACE_SECONDS: Final = 0.05
"""After its deadline, for the call that an order went with to say why it has failed."""
_LEAST_SECONDS: Final = 0.001
"""For a call whose orders' deadlines have all but passed."""
Outcome = Decision | Exception


class _Order:
    """An order that waits for its decision."""

    __slots__ = ("deadline", "message", "seconds", "trace")

    def __init__(self, asking: Asking, order: Asked, deadline_seconds: float | None, trace: Metadata) -> None:
        self.message: Final = asking.message(order)
        self.seconds: Final = allow(self.message, asking.seconds(deadline_seconds))
        self.deadline: Final = asking.policy.clock() + self.seconds
        self.trace: Final = trace

    def late(self) -> DeadlineError:
        """There was no answer in time."""
        return DeadlineError(
            f"There was no answer within {self.seconds:g} s. {DeadlineError.advice}", grpc.StatusCode.DEADLINE_EXCEEDED
        )


class _OfThread(_Order):
    """The same, of a thread."""

    __slots__ = ("_latch", "leads", "outcome")

    def __init__(self, asking: Asking, order: Asked, deadline_seconds: float | None, trace: Metadata) -> None:
        super().__init__(asking, order, deadline_seconds, trace)
        self.outcome: Outcome | None = None
        self.leads = False
        """Whether its thread is to make the next call."""
        self._latch = threading.Lock()
        self._latch.acquire()

    def wake(self) -> None:
        """Its thread has its decision, or leads."""
        with suppress(RuntimeError):  # it has been woken already
            self._latch.release()

    def wait(self, seconds: float) -> bool:
        """Waits until it is woken; False if that took too long."""
        return self._latch.acquire(timeout=max(0.0, seconds))


class _OfTask(_Order):
    """The same, of a task."""

    __slots__ = ("answer",)

    def __init__(self, asking: Asking, order: Asked, deadline_seconds: float | None, trace: Metadata) -> None:
        super().__init__(asking, order, deadline_seconds, trace)
        self.answer: Final[asyncio.Future[Decision]] = asyncio.get_running_loop().create_future()


_Waiting = TypeVar("_Waiting", bound=_Order)


class _Queue(Generic[_Waiting]):
    """Orders that are to be asked for: those that reduce an exposure before the others."""

    def __init__(self) -> None:
        self._reducing: Final[deque[_Waiting]] = deque()
        self._others: Final[deque[_Waiting]] = deque()

    def append(self, order: _Waiting) -> None:
        self._of(order).append(order)

    def put_back(self, orders: Sequence[_Waiting]) -> None:
        """Orders that were taken are the first again."""
        for order in reversed(orders):
            self._of(order).appendleft(order)

    def take(self) -> list[_Waiting]:
        """The orders of the next call."""
        queue = self._reducing or self._others
        return [queue.popleft() for _ in range(min(_ORDERS, len(queue)))]

    def discard(self, order: _Waiting) -> None:
        with suppress(ValueError):  # it has been taken
            self._of(order).remove(order)

    def __iter__(self) -> Iterator[_Waiting]:
        yield from self._reducing
        yield from self._others

    def __bool__(self) -> bool:
        return bool(self._reducing or self._others)

    def _of(self, order: _Waiting) -> deque[_Waiting]:
        return self._reducing if order.message.reduce_only else self._others


class Shared:
    """Shares calls between threads; `Client.shared` makes one. It holds nothing that would have to be closed.

    No thread is started: one of those that wait makes the next call for all.
    """

    def __init__(
        self,
        asking: Asking,
        decide: Callable[[pb.Order, float, Metadata], Decision],
        decide_batch: Callable[[Sequence[pb.Order], float, Metadata], list[Result]],
    ) -> None:
        self._asking = asking
        self._decide = decide
        self._decide_batch = decide_batch
        self._lock = threading.Lock()
        self._queue: _Queue[_OfThread] = _Queue()
        self._calls = 0

    def decide(
        self,
        order: Asked,
        *,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Decision:
        """Decides one order.

        Args:
            order: An `Order`, or the contract's own message.
            deadline_seconds: Until the answer, the wait for other calls included; None for the client's.
            traceparent: As in `Client.decide`; a call that is shared with callers of other traces carries none.
            tracestate: As in `Client.decide`.

        Raises:
            CallError: There is no decision; its class says why.
            ClosedError: The client was closed.
        """
        mine = _OfThread(self._asking, order, deadline_seconds, trace_of(traceparent, tracestate))
        with self._lock:
            self._queue.append(mine)
            mine.leads = self._calls < _CALLS
            self._calls += mine.leads
        try:
            while mine.outcome is None:
                if mine.leads:
                    self._lead(mine)
                elif not mine.wait(mine.deadline + _GRACE_SECONDS - self._asking.policy.clock()):
                    break
        finally:
            outcome = self._leave(mine)
        if isinstance(outcome, Decision):
            return outcome
        raise outcome

    def _lead(self, mine: _OfThread) -> None:
        """Makes calls until there is an answer to this order or nothing to ask; then another thread makes them."""
        asked: Sequence[_OfThread] = ()
        clock = self._asking.policy.clock
        try:
            while mine.outcome is None and clock() < mine.deadline:
                with self._lock:
                    asked = self._queue.take()
                if not asked:
                    return  # another thread is asking for it
                asked = self._settle(asked, self._ask(asked, mine), mine)
        finally:
            with self._lock:
                mine.leads = False
                if clock() >= mine.deadline:
                    self._queue.discard(mine)
                self._ask_again([one for one in asked if one is not mine])  # some are left, or this was interrupted
                self._hand_over()

    def _ask(self, group: Sequence[_OfThread], mine: _OfThread) -> Sequence[Outcome]:
        """Asks for some orders, for no longer than this thread may wait."""
        deadline = min(mine.deadline, max(one.deadline for one in group))
        seconds = max(_LEAST_SECONDS, deadline - self._asking.policy.clock())
        try:
            if len(group) == 1:
                return [self._decide(group[0].message, seconds, group[0].trace)]
            return self._decide_batch([one.message for one in group], seconds, _trace_of(group))
        except Exception as error:  # each of their callers raises it
            return [error] * len(group)

    def _settle(self, group: Sequence[_OfThread], outcomes: Sequence[Outcome], mine: _OfThread) -> Sequence[_OfThread]:
        """Gives each its outcome. Returns those that have time left when the time of this thread is over."""
        until = self._asking.policy.clock() + _GRACE_SECONDS
        patient = []
        for one, outcome in zip(group, outcomes, strict=True):
            if isinstance(outcome, DeadlineError) and one.deadline > max(until, mine.deadline):
                patient.append(one)
                continue
            one.outcome = outcome
            if one is not mine:
                one.wake()
        return patient

    def _ask_again(self, orders: Sequence[_OfThread]) -> None:
        """Another thread asks for these, under their keys. The lock is held."""
        waiting = [one for one in orders if one.outcome is None]  # the others' threads have left
        self._queue.put_back([one for one in waiting if one.message.idempotency_key])
        for one in waiting:
            if not one.message.idempotency_key:
                words = "The thread that asked for the order has left, and without a key it is not asked for again."
                one.outcome = UnavailableError(words, grpc.StatusCode.CANCELLED)
                one.wake()

    def _hand_over(self) -> None:
        """The next in the queue that makes no call yet makes one. The lock is held."""
        heir = next((one for one in self._queue if not one.leads), None)
        if heir is None:
            self._calls -= 1
        else:
            heir.leads = True
            heir.wake()

    def _leave(self, mine: _OfThread) -> Outcome:
        """It waits no more: it leaves the queue, and the lead, should it have been given that meanwhile."""
        with self._lock:
            if mine.outcome is None:
                mine.outcome = mine.late()
                self._queue.discard(mine)
            if mine.leads:
                self._hand_over()
            return mine.outcome


class AsyncShared:
    """Shares calls between tasks of one event loop; `AsyncClient.shared` makes one. It has nothing to be closed."""

    def __init__(
        self,
        asking: Asking,
        decide: Callable[[pb.Order, float, Metadata], Awaitable[Decision]],
        decide_batch: Callable[[Sequence[pb.Order], float, Metadata], Awaitable[list[Result]]],
    ) -> None:
        self._asking = asking
        self._decide = decide
        self._decide_batch = decide_batch
        self._queue: _Queue[_OfTask] = _Queue()
        self._calls: set[asyncio.Task[None]] = set()

    async def decide(
        self,
        order: Asked,
        *,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Decision:
        """Decides one order, as `Shared.decide`: same arguments, same errors."""
        mine = _OfTask(self._asking, order, deadline_seconds, trace_of(traceparent, tracestate))
        self._queue.append(mine)
        if len(self._calls) < _CALLS:
            # It begins after all orders of this moment have come, and without what only this caller has in its context.
            call = asyncio.create_task(self._lead(), context=Context())
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        try:
            async with asyncio.timeout(mine.seconds + _GRACE_SECONDS):
                return await mine.answer
        except TimeoutError as error:
            raise mine.late() from error

    async def _lead(self) -> None:
        """Makes calls while there is anything to ask."""
        while self._queue:
            group = [one for one in self._queue.take() if not one.answer.done()]  # the others' callers have left
            for one, outcome in zip(group, await self._ask(group), strict=True):
                if one.answer.done():
                    continue
                if isinstance(outcome, Decision):
                    one.answer.set_result(outcome)
                else:
                    one.answer.set_exception(outcome)

    async def _ask(self, group: Sequence[_OfTask]) -> Sequence[Outcome]:
        """Asks for some orders, until the last of their deadlines: each has a timeout of its own."""
        if not group:
            return []
        left = max(one.deadline for one in group) - self._asking.policy.clock()
        seconds = max(_LEAST_SECONDS, left)
        try:
            if len(group) == 1:
                return [await self._decide(group[0].message, seconds, group[0].trace)]
            return await self._decide_batch([one.message for one in group], seconds, _trace_of(group))
        except Exception as error:  # each of their callers raises it
            return [error] * len(group)


def _trace_of(group: Sequence[_Order]) -> Metadata:
    """The trace of a call for these orders."""
    first = group[0].trace
    return first if all(one.trace == first for one in group) else ()
