"""Calls that many callers share: `Shared` for threads, `AsyncShared` for tasks.

An order that comes while others are under way waits until one of their calls has ended, and then goes with all that
have come meanwhile, in one `DecideBatch`. A lone caller waits for nobody and has calls of its own. In Python a call
costs its caller far more than an order in a call does, and so does a message on a stream.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

import grpc

from pretrade.client.asking import Asked, Asking, Result
from pretrade.client.decisions import Decision
from pretrade.client.errors import DeadlineError, PretradeError
from pretrade.decision.v1 import decision_pb2 as pb

_CALLS: Final = 4
"""Under way at once. With one, every order would wait for the call before its own; with many, few orders share one."""
_ORDERS: Final = 64
"""In one call: as many as a server decides at a time."""
_GRACE_SECONDS: Final = 0.05
"""After its deadline, for the call that an order went with to say why it has failed."""
Outcome = Decision | PretradeError


class _Order:
    """An order that waits for its decision."""

    __slots__ = ("deadline", "leads", "message", "outcome", "seconds")

    def __init__(self, asking: Asking, order: Asked, deadline_seconds: float | None) -> None:
        self.message: Final = asking.message(order)
        self.seconds: Final = asking.seconds(deadline_seconds)
        self.deadline: Final = asking.policy.clock() + self.seconds
        if not self.message.HasField("timeout") or self.message.timeout.ToNanoseconds() > self.seconds * 1e9:
            self.message.timeout.FromNanoseconds(int(self.seconds * 1e9))
        self.outcome: Outcome | None = None
        self.leads = False
        """Whether its thread is to make the next call."""

    def late(self) -> DeadlineError:
        """There was no answer in time."""
        return DeadlineError(
            f"There was no answer within {self.seconds:g} s. {DeadlineError.advice}", grpc.StatusCode.DEADLINE_EXCEEDED
        )


class _Waiting(_Order):
    """The same, of a thread."""

    __slots__ = ("_latch",)

    def __init__(self, asking: Asking, order: Asked, deadline_seconds: float | None) -> None:
        super().__init__(asking, order, deadline_seconds)
        self._latch = threading.Lock()
        self._latch.acquire()

    def wake(self) -> None:
        """Its thread has its decision, or leads."""
        with suppress(RuntimeError):  # it has been woken already
            self._latch.release()

    def wait(self, seconds: float) -> bool:
        """Waits until it is woken; False if that took too long."""
        return self._latch.acquire(timeout=max(0.0, seconds))


class Shared:
    """Shares calls between threads; `Client.shared` makes one. It holds nothing that would have to be closed.

    No thread is started: one of those that wait makes the next call for all.
    """

    def __init__(
        self,
        asking: Asking,
        decide: Callable[[pb.Order, float], Decision],
        decide_batch: Callable[[Sequence[pb.Order], float], list[Result]],
    ) -> None:
        self._asking = asking
        self._decide = decide
        self._decide_batch = decide_batch
        self._lock = threading.Lock()
        self._queue: deque[_Waiting] = deque()
        self._calls = 0

    def decide(self, order: Asked, *, deadline_seconds: float | None = None) -> Decision:
        """Decides one order.

        Args:
            order: An `Order`, or the contract's own message.
            deadline_seconds: Until the answer, the wait for other calls included; None for the client's.

        Raises:
            CallError: There is no decision; its class says why.
            ClosedError: The client was closed.
        """
        mine = _Waiting(self._asking, order, deadline_seconds)
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
            self._leave(mine)
        outcome = mine.outcome or mine.late()
        if isinstance(outcome, Decision):
            return outcome
        raise outcome

    def _lead(self, mine: _Waiting) -> None:
        """Makes calls until there is an answer to this order or nothing to ask; then another thread makes them."""
        try:
            while mine.outcome is None:
                with self._lock:
                    group = [self._queue.popleft() for _ in range(min(_ORDERS, len(self._queue)))]
                if not group:
                    return  # another thread is asking for it
                for one, outcome in zip(group, self._ask(group), strict=True):
                    one.outcome = outcome
                    if one is not mine:
                        one.wake()
        finally:
            with self._lock:
                mine.leads = False
                self._hand_over()

    def _ask(self, group: Sequence[_Waiting]) -> Sequence[Outcome]:
        try:
            if len(group) == 1:
                return [self._decide(group[0].message, _left(self._asking, group))]
            return self._decide_batch([one.message for one in group], _left(self._asking, group))
        except PretradeError as error:
            return [error] * len(group)

    def _hand_over(self) -> None:
        """The next in the queue that makes no call yet makes one. The lock is held."""
        heir = next((one for one in self._queue if not one.leads), None)
        if heir is None:
            self._calls -= 1
        else:
            heir.leads = True
            heir.wake()

    def _leave(self, mine: _Waiting) -> None:
        """It waits no more: it leaves the queue, and the lead, should it have been given that meanwhile."""
        with self._lock:
            if mine.outcome is None and mine in self._queue:
                self._queue.remove(mine)
            if mine.leads:
                self._hand_over()


class AsyncShared:
    """Shares calls between tasks of one event loop; `AsyncClient.shared` makes one. It has nothing to be closed."""

    def __init__(
        self,
        asking: Asking,
        decide: Callable[[pb.Order, float], Awaitable[Decision]],
        decide_batch: Callable[[Sequence[pb.Order], float], Awaitable[list[Result]]],
    ) -> None:
        self._asking = asking
        self._decide = decide
        self._decide_batch = decide_batch
        self._queue: deque[tuple[_Order, asyncio.Future[Decision]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def decide(self, order: Asked, *, deadline_seconds: float | None = None) -> Decision:
        """Decides one order, as `Shared.decide`: same arguments, same errors."""
        mine = _Order(self._asking, order, deadline_seconds)
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._queue.append((mine, answer))
        if len(self._calls) < _CALLS:
            call = asyncio.create_task(self._lead())  # which begins after all orders of this moment have come
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        try:
            async with asyncio.timeout(mine.seconds + _GRACE_SECONDS):
                return await answer
        except TimeoutError as error:
            raise mine.late() from error

    async def _lead(self) -> None:
        """Makes calls while there is anything to ask."""
        while self._queue:
            taken = [self._queue.popleft() for _ in range(min(_ORDERS, len(self._queue)))]
            group = [(order, answer) for order, answer in taken if not answer.done()]  # the others' callers have left
            outcomes = await self._ask([order for order, _ in group])
            for (_, answer), outcome in zip(group, outcomes, strict=True):
                if answer.done():
                    continue
                if isinstance(outcome, Decision):
                    answer.set_result(outcome)
                else:
                    answer.set_exception(outcome)

    async def _ask(self, group: Sequence[_Order]) -> Sequence[Outcome]:
        try:
            if not group:
                return []
            if len(group) == 1:
                return [await self._decide(group[0].message, _left(self._asking, group))]
            return await self._decide_batch([one.message for one in group], _left(self._asking, group))
        except PretradeError as error:
            return [error] * len(group)


def _left(asking: Asking, group: Sequence[_Order]) -> float:
    """How long the call for these orders may take: until the last of their deadlines. Each has a timeout of its own."""
    return max(0.001, max(one.deadline for one in group) - asking.policy.clock())
