"""`AsyncStream`: a stream that many tasks share.

Threads have none: gRPC's asyncio does not work well in two event loops of one process, and its blocking streams cost a
caller more than single calls do.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Self

import grpc
import grpc.aio

from pretrade.client.asking import HEALTH, HEALTH_SECONDS, Asked, Asking, health_name, health_without
from pretrade.client.decisions import Decision
from pretrade.client.errors import (
    CallError,
    ClosedError,
    DeadlineError,
    PretradeError,
    UnavailableError,
    error_of_order,
)
from pretrade.client.policy import Call, Policy, Server
from pretrade.client.retries import LONGEST_PAUSE_SECONDS
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_SHARE: Final = 0.5
"""Of its deadline, after which an order without answer speaks against its server."""


class AioConnection:
    """A channel to one server, and what is called there."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel: Final = channel
        stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)
        self.decide: Final = stub.Decide
        self.decide_batch: Final = stub.DecideBatch
        self.decide_stream: Final = stub.DecideStream
        self._health: Final[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = channel.unary_unary(HEALTH)

    async def health(self, seconds: float) -> str:
        """What the server says of itself within so many seconds."""
        try:
            return health_name(await self._health(b"", timeout=seconds))
        except grpc.RpcError as error:
            return health_without(error)


class Probes:
    """Looks whether servers that are away are well again, without anybody waiting for it.

    Args:
        policy: Of the client.
        connections: To each server.
    """

    def __init__(self, policy: Policy, connections: Sequence[AioConnection]) -> None:
        self._policy = policy
        self._connections = connections
        self._tasks: set[asyncio.Task[None]] = set()

    def look(self) -> None:
        """Asks a server for its health, if that is due."""
        away = self._policy.due()
        if away is not None:
            task = asyncio.create_task(self._look(away))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _look(self, away: Server) -> None:
        if await self._connections[away.place].health(HEALTH_SECONDS) == "SERVING":
            away.is_well()


class _Waiting:
    """An order without an answer."""

    __slots__ = ("answer", "deadline", "request", "seconds", "timers", "was_lost")

    def __init__(
        self, request: pb.DecideStreamRequest, answer: asyncio.Future[Decision], deadline: float, seconds: float
    ) -> None:
        self.request = request
        self.answer = answer
        self.deadline = deadline
        self.seconds = seconds
        self.timers: tuple[asyncio.TimerHandle, ...] = ()
        self.was_lost = False
        """Whether it was under way when a stream was lost."""


class _Multiplexer:
    """One `DecideStream` for many orders, opened again as the policy says; orders without answers are then asked again.

    Everything but the constructor runs in one event loop.

    Args:
        asking: What asks.
        connections: To each server.
    """

    def __init__(self, asking: Asking, connections: Sequence[AioConnection]) -> None:
        self._asking = asking
        self._policy = asking.policy
        self._connections = connections
        self._probes = Probes(asking.policy, connections)
        self._waiting: dict[str, _Waiting] = {}
        self._unsent: deque[str] = deque()
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self._call: Call | None = None
        self._stream: Any = None
        self._moves: CallError | None = None
        """Why the stream is to be opened elsewhere."""
        self._trouble: CallError | None = None
        """Why the stream was lost, until there is an answer again."""
        self._made = 0

    def ask(self, message: pb.Order, deadline: float, seconds: float, answer: asyncio.Future[Decision]) -> None:
        """Asks for an order, whose answer goes to `answer`.

        Args:
            message: It belongs to this call.
            deadline: Instant of the policy's clock.
            seconds: What the caller allowed, for people.
            answer: Of the caller.
        """
        if not message.order_ref:
            self._made += 1
            message.order_ref = f"stream-{self._made}"
        ref = message.order_ref
        if ref in self._waiting:
            answer.set_exception(
                ValueError(f"an order with order_ref {ref!r} is under way on this stream: references must be distinct")
            )
            return
        if not message.HasField("timeout") or message.timeout.ToNanoseconds() > seconds * 1e9:
            message.timeout.FromNanoseconds(int(seconds * 1e9))
        waiting = _Waiting(pb.DecideStreamRequest(order=message), answer, deadline, seconds)
        loop, left = asyncio.get_running_loop(), deadline - self._policy.clock()
        waiting.timers = (loop.call_later(left, self._expired, ref),)
        if self._asking.several:
            waiting.timers += (loop.call_later(_SHARE * left, self._is_slow, ref),)
        self._waiting[ref] = waiting
        self._unsent.append(ref)
        self._wake.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends the stream; orders without answers get a `ClosedError`."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await self._probes.close()
        self._end_all(ClosedError("the stream was closed"))

    async def _run(self) -> None:
        """Keeps a stream open while anybody waits."""
        call = self._policy.begin(math.inf, repeatable=True)
        try:
            while self._waiting:
                if await self._exchange(call):
                    call = self._policy.begin(math.inf, repeatable=True)
                if call.pause:
                    await asyncio.sleep(call.pause)
        except PretradeError as error:
            self._end_all(error)

    async def _exchange(self, call: Call) -> bool:
        """One stream, until it ends. Returns whether it had answers.

        Raises:
            PretradeError: There is not to be another one.
        """
        self._probes.look()
        metadata = self._asking.credentials.metadata()
        call.attempt()
        self._call, self._moves, answered = call, None, False
        stream = self._stream = self._connections[call.server.place].decide_stream(
            metadata=metadata or None, wait_for_ready=call.wait_for_ready
        )
        self._unsent = deque(self._waiting)
        writing = asyncio.create_task(self._write(stream))
        lost: grpc.RpcError | CallError = UnavailableError(
            f"{call.server.address} ended the stream. {UnavailableError.advice}", grpc.StatusCode.UNAVAILABLE
        )
        try:
            async for response in stream:
                answered = True
                self._trouble = None
                self._take(response.result, call)
                if self._why_it_moves() is not None:
                    break
        except grpc.RpcError as error:
            if not _was_cut_off_while_writing(error):
                lost = error
        except asyncio.CancelledError:
            if self._why_it_moves() is None:
                call.abandoned()
                raise
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            stream.cancel()
        if not self._waiting:
            call.abandoned()
            return answered
        call.failed(self._why_it_moves() or lost)
        self._trouble = call.earlier
        for waiting in self._waiting.values():
            waiting.was_lost = True
        return answered

    def _why_it_moves(self) -> CallError | None:
        return self._moves

    async def _write(self, stream: Any) -> None:
        """Sends what is to be sent, until it is cancelled. Why a stream takes no more is for its reader to say."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            while True:
                while self._unsent:
                    waiting = self._waiting.get(self._unsent.popleft())
                    if waiting is not None:
                        await stream.write(waiting.request)
                self._wake.clear()
                await self._wake.wait()

    def _take(self, result: pb.OrderResult, call: Call) -> None:
        """Gives an order its answer, or asks for it again."""
        waiting = self._waiting.get(result.order_ref)
        if waiting is None:
            return  # nobody waits for it any more
        if result.HasField("decision"):
            self._end(result.order_ref, Decision(result.decision, call.server.address))
            return
        error = error_of_order(result.error)
        if error.code is grpc.StatusCode.UNAVAILABLE:
            self._moves = error  # the server is about to stop
        elif error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self._may_wait(waiting, error, call):
            assert error.retry_delay_seconds is not None
            asyncio.get_running_loop().call_later(error.retry_delay_seconds, self._again, result.order_ref)
        elif error.code is grpc.StatusCode.DEADLINE_EXCEEDED and waiting.was_lost:  # its cap; see `policy`
            asyncio.get_running_loop().call_later(LONGEST_PAUSE_SECONDS, self._again, result.order_ref)
        else:
            self._end(result.order_ref, error)

    def _may_wait(self, waiting: _Waiting, error: CallError, call: Call) -> bool:
        delay = error.retry_delay_seconds
        return call.waits(delay) and delay is not None and self._policy.clock() + delay < waiting.deadline

    def _again(self, ref: str) -> None:
        self._unsent.append(ref)
        self._wake.set()

    def _is_slow(self, ref: str) -> None:
        """An order has had no answer for half of its time: a server of which several say so is left."""
        if ref not in self._waiting or self._call is None or self._moves is not None:
            return
        server = self._call.server
        server.slow()
        if server.is_away and self._policy.best((server,), well=True) is not None:
            self._moves = DeadlineError(f"{server.address} does not answer.", grpc.StatusCode.DEADLINE_EXCEEDED)
            self._stream.cancel()

    def _expired(self, ref: str) -> None:
        """The time of an order is over."""
        waiting = self._waiting[ref]
        words = f"no answer to order {ref!r} within {waiting.seconds:g} s"
        error: CallError
        if self._trouble is not None and self._trouble.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            error = UnavailableError(f"There was {words}: {self._trouble}", grpc.StatusCode.UNAVAILABLE)
        else:
            error = DeadlineError(f"There was {words}. {DeadlineError.advice}", grpc.StatusCode.DEADLINE_EXCEEDED)
        error.__cause__ = self._trouble
        self._end(ref, error)

    def _end(self, ref: str, result: Decision | PretradeError) -> None:
        waiting = self._waiting.pop(ref)
        for timer in waiting.timers:
            timer.cancel()
        if waiting.answer.done():
            return  # its caller has left
        if isinstance(result, Decision):
            waiting.answer.set_result(result)
        else:
            waiting.answer.set_exception(result)

    def _end_all(self, error: PretradeError) -> None:
        for ref in list(self._waiting):
            self._end(ref, error)


def _was_cut_off_while_writing(error: Any) -> bool:
    """Whether gRPC only says that it could not write any more: it hides the status that the stream ended with."""
    return error.code() is grpc.StatusCode.INTERNAL and "execute_batch" in (error.debug_error_string() or "")


class AsyncStream:
    """A stream that any number of tasks share; `AsyncClient.stream` makes one. Leave its context to end it."""

    def __init__(self, asking: Asking, connections: Sequence[AioConnection]) -> None:
        self._asking = asking
        self._multiplexer = _Multiplexer(asking, connections)
        self._is_closed = False

    async def decide(self, order: Asked, *, deadline_seconds: float | None = None) -> Decision:
        """Decides one order.

        Args:
            order: Its `order_ref` must be distinct among those that are under way here; empty, the client makes one.
            deadline_seconds: Until the answer; None for the client's.

        Raises:
            CallError: There is no decision; its class says why.
            ClosedError: The stream or its client was closed.
            ValueError: An order with this reference is under way.
        """
        if self._is_closed:
            raise ClosedError("the stream was closed")
        message, seconds = self._asking.message(order), self._asking.seconds(deadline_seconds)
        answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._multiplexer.ask(message, self._asking.policy.clock() + seconds, seconds, answer)
        return await answer

    async def close(self) -> None:
        """Ends the stream. Orders without an answer get a `ClosedError`."""
        self._is_closed = True
        await self._multiplexer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
