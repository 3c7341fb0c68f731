"""`AsyncStream`: streams that many tasks share, one to each server that is asked.

Every order is a call of the policy, as it would be by itself: where it goes, when it is asked for again, and when it
goes to another server. A stream carries the orders of its server for as long as it lasts.

Threads have none: gRPC's asyncio does not work well in two event loops of one process, and its blocking streams cost a
caller more than single calls do.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import Context
from enum import Enum, auto
from typing import Any, Final, Self

import grpc
import grpc.aio

from pretrade.client.asking import HEALTH, HEALTH_SECONDS, Asked, Asking, allow, health_name, health_without
from pretrade.client.decisions import Decision
from pretrade.client.errors import CallError, ClosedError, DeadlineError, UnavailableError, error_of_order
from pretrade.client.policy import Call, Policy, Server
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_MOST_LEFT: Final = 1_024
"""Orders on a stream whose callers have left without an answer, until it takes no more."""
_CLOSED: Final = "the stream was closed"


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


class _Without(Enum):
    """Why there is no result of an order, where gRPC has no error for it."""

    LATE = auto()
    """Its time was over."""
    ENDED = auto()
    """The server ended the stream."""
    CLOSED = auto()
    """The caller closed the stream or its client."""


_Outcome = pb.OrderResult | grpc.RpcError | _Without


class _Waiting:
    """An order that waits on a stream."""

    __slots__ = ("answer", "until")

    def __init__(self, answer: asyncio.Future[_Outcome], until: float) -> None:
        self.answer: Final = answer
        self.until: Final = until
        """Instant of the loop's clock."""

    def end(self, outcome: _Outcome) -> None:
        """It waits no more."""
        if not self.answer.done():  # its caller has left
            self.answer.set_result(outcome)


class _Stream:
    """One `DecideStream` to one server, until it ends. Everything runs in one event loop.

    Args:
        call: The stream of gRPC.
        ended: Is told when it has ended.
    """

    def __init__(self, call: Any, ended: Callable[[_Stream], object]) -> None:
        self._call = call
        self._ended = ended
        self._waiting: dict[str, _Waiting] = {}
        self._left: set[str] = set()
        """The references of orders whose callers have left without an answer: it may still come."""
        self._unsent: deque[pb.DecideStreamRequest] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._is_last = False
        """Whether it takes no more orders."""
        self._loop: Final = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        """For the order whose time is over first; one for each order would cost more than all else here."""
        self._reading = asyncio.create_task(self._read(), context=Context())

    def takes(self, ref: str) -> bool:
        """Whether an order with this reference may be sent on it."""
        return not self._is_last and ref not in self._left

    async def ask(self, message: pb.Order, seconds: float) -> _Outcome:
        """Asks for an order that it `takes`, for so long."""
        ref = message.order_ref
        asked = self._waiting[ref] = _Waiting(self._loop.create_future(), self._loop.time() + seconds)
        self._unsent.append(pb.DecideStreamRequest(order=message))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), context=Context())
        if self._timer is None or asked.until < self._timer.when():
            self._wait_until(asked.until)
        try:
            return await asked.answer
        finally:
            if self._waiting.pop(ref, None) is not None:
                self._left.add(ref)
                self._is_last |= len(self._left) >= _MOST_LEFT
            if self._is_last:
                self._end_if_over()

    def retire(self) -> None:
        """Takes no more orders; those that are under way are still answered."""
        self._is_last = True
        self._end_if_over()

    async def close(self) -> None:
        """Ends it. Orders without an answer get a `ClosedError`."""
        self._call.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _write(self) -> None:
        """Sends what is to be sent. Why a stream takes no more is for its reader to say."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            while self._unsent:
                await self._call.write(self._unsent.popleft())

    async def _read(self) -> None:
        """Hands out the answers, and in the end what became of the stream to all that have none."""
        outcome: _Outcome = _Without.ENDED
        try:
            async for response in self._call:
                result = response.result
                asked = self._waiting.pop(result.order_ref, None)
                if asked is None:
                    self._left.discard(result.order_ref)
                else:
                    asked.end(result)
        except grpc.RpcError as error:
            if not _was_cut_off_while_writing(error):
                outcome = error
        except asyncio.CancelledError:
            outcome = _Without.CLOSED
        self._is_last = True
        for asked in self._waiting.values():
            asked.end(outcome)
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._ended(self)

    def _wait_until(self, instant: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(instant, self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        """Ends the orders whose time is over."""
        now, self._timer = self._loop.time(), None
        for asked in self._waiting.values():
            if asked.until <= now:
                asked.end(_Without.LATE)
        left = [asked.until for asked in self._waiting.values() if asked.until > now]
        if left:
            self._wait_until(min(left))

    def _end_if_over(self) -> None:
        if self._is_last and not self._waiting:
            self._call.cancel()


def _was_cut_off_while_writing(error: Any) -> bool:
    """Whether gRPC only says that it could not write any more: it hides the status that the stream ended with."""
    return error.code() is grpc.StatusCode.INTERNAL and "execute_batch" in (error.debug_error_string() or "")


class AsyncStream:
    """A stream that any number of tasks share; `AsyncClient.stream` makes one. Leave its context to end it."""

    def __init__(self, asking: Asking, connections: Sequence[AioConnection]) -> None:
        self._asking = asking
        self._connections = connections
        self._probes = Probes(asking.policy, connections)
        self._streams: dict[Server, _Stream] = {}
        """The last one to each server."""
        self._open: set[_Stream] = set()
        """All that have not ended."""
        self._refs: set[str] = set()
        """Of the orders that are under way."""
        self._made = 0
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
        message, seconds = self._asking.message(order), self._asking.seconds(deadline_seconds)
        if not message.order_ref:
            self._made += 1
            message.order_ref = f"stream-{self._made}"
        ref = message.order_ref
        if ref in self._refs:
            raise ValueError(
                f"an order with order_ref {ref!r} is under way on this stream: references must be distinct"
            )
        self._refs.add(ref)
        try:
            return await self._decide(message, self._asking.begin(message, allow(message, seconds)))
        finally:
            self._refs.discard(ref)

    async def close(self) -> None:
        """Ends the stream. Orders without an answer get a `ClosedError`."""
        self._is_closed = True
        await self._probes.close()
        await asyncio.gather(*(stream.close() for stream in self._open))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _decide(self, message: pb.Order, call: Call) -> Decision:
        """Asks until there is an answer, as the policy says."""
        while True:
            if call.pause:
                await asyncio.sleep(call.pause)
            if self._is_closed:
                raise ClosedError(_CLOSED)
            self._probes.look()
            server = call.server
            stream = self._stream_to(server, message.order_ref, wait_for_ready=call.wait_for_ready)
            seconds = call.attempt()
            try:
                outcome = await stream.ask(message, seconds)
                if isinstance(outcome, pb.OrderResult) and outcome.HasField("decision"):
                    call.answered()
                    return Decision(outcome.decision, server.address)
                failure = self._failure(outcome, message, server)
            except BaseException:
                call.abandoned()
                raise
            if isinstance(failure, UnavailableError):
                stream.retire()  # its server is about to stop
            call.failed(failure)

    def _stream_to(self, server: Server, ref: str, *, wait_for_ready: bool) -> _Stream:
        """The stream to a server that takes an order with this reference."""
        stream = self._streams.get(server)
        if stream is None or not stream.takes(ref):
            metadata = self._asking.credentials.metadata()
            if stream is not None:
                stream.retire()
            decide = self._connections[server.place].decide_stream
            stream = _Stream(decide(metadata=metadata or None, wait_for_ready=wait_for_ready), self._open.discard)
            self._streams[server] = stream
            self._open.add(stream)
        return stream

    def _failure(self, outcome: _Outcome, message: pb.Order, server: Server) -> grpc.RpcError | CallError:
        """What it means for an order that there is no decision of it.

        Raises:
            ClosedError: The stream or its client was closed.
        """
        if outcome is _Without.CLOSED:
            raise ClosedError(self._asking.why_not or _CLOSED)
        if outcome is _Without.LATE:
            words = f"{server.address} gave no answer for order {message.order_ref!r} in time."
            return DeadlineError(f"{words} {DeadlineError.advice}", grpc.StatusCode.DEADLINE_EXCEEDED)
        if outcome is _Without.ENDED:
            words = f"{server.address} ended the stream. {UnavailableError.advice}"
            return UnavailableError(words, grpc.StatusCode.UNAVAILABLE)
        return error_of_order(outcome.error) if isinstance(outcome, pb.OrderResult) else outcome
