"""gRPC over ASGI: serves the servicers of the grpc.aio edge behind Envoy.

Envoy terminates HTTP/2 (flow control, limits, TLS, floods) and hands every call to this application in its own process,
through `pyvoy`; see `server/envoy/edge.py`. gRPC's own framing is in `server/rpc/framing.py`. The steps of a call::

    read the request → the servicer's method → the answer, or a status

A call whose content type is not gRPC's is for the application in `server/http/`.

ASGI reports a disconnect only to a pending `receive()`, and never reports an expired deadline. One task therefore
checks all calls that take longer than most, and cancels those whose caller has gone or whose deadline has passed, as
grpc.aio does. Fast calls cost nothing extra; if the caller of one has gone, sending its answer fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError

from server.envoy.gate import UnderWay
from server.errors import (
    DeadlineError,
    DrainingError,
    InvalidOrderError,
    MessageTooLargeError,
    PretradeError,
    UnknownMethodError,
)
from server.http import transcoding
from server.http.asgi import (
    AsgiCall,
    CallerGoneError,
    Delivery,
    Lateness,
    Receive,
    Scope,
    Send,
    attempt_of,
    deadline_passed,
    failed,
    header,
)
from server.rpc import status
from server.rpc.framing import (
    CONTENT_TYPE,
    ENCODINGS,
    PREFIX_BYTES,
    Header,
    call_headers,
    decompressed,
    framed,
    message_length,
    status_headers,
)
from server.security.access import AccessControl

if TYPE_CHECKING:
    from server.decision.metrics import DecisionMetrics
    from server.http.application import HttpApplication

_LOOK_SECONDS: Final = 0.025
"""How often calls that take longer than this are looked after; asking for one caller costs 0.1 ms."""
_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [CONTENT_TYPE, (b"grpc-accept-encoding", ENCODINGS)],
    "trailers": True,
}
_OK_STATUS: Final = (b"grpc-status", b"0")
_OK: Final = {"type": "http.response.trailers", "headers": [_OK_STATUS], "more_trailers": False}


class UnderWayCall(Protocol):
    """A call that has not ended, as whoever looks after slow calls sees it; see `AsgiCall`."""

    arrived: float
    deadline: float | None
    is_patient: bool
    is_unary: bool
    is_watched: bool
    orders: int

    @property
    def receive(self) -> Receive:
        """Gives what its caller sends next."""
        ...

    def end(self, reason: PretradeError | CallerGoneError) -> None:
        """Ends it."""
        ...


@dataclass(frozen=True, slots=True)
class _Method:
    """A method and who answers it: one of the three.

    What serialises a stream's answers may make several messages of one. They are sent together.
    """

    parse: Any
    serialize: Any
    answer: Any
    answers_one: Any
    answers_stream: Any


class GrpcApplication:
    """Serves method handlers, registered the way generated code does it, as an ASGI application.

    Args:
        max_message_bytes: Largest request.
        read_seconds: How long a unary call may take to send its message.
        delivery: Told what became of every unary answer.
        metrics: Counts the calls that end with an error, by reason.
        clock: Monotonic seconds.
        wall_clock: Seconds of the clock by which Envoy says when a call arrived.
        access: Asked about every call; None for an open port.
        expired: Told of every call that was taken up too late, and how many seconds its caller had allowed.
        http: Answers the calls that are not gRPC; None where there are none.
    """

    def __init__(
        self,
        max_message_bytes: int,
        read_seconds: float,
        delivery: Delivery,
        metrics: DecisionMetrics,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        access: AccessControl | None = None,
        expired: Callable[[float], None] = lambda _: None,
        http: HttpApplication | None = None,
    ) -> None:
        self._max_message_bytes = max_message_bytes
        self._read_seconds = read_seconds
        self._delivery = delivery
        self._metrics = metrics
        self._clock = clock
        self._access = access
        self._lateness = Lateness(metrics, clock, wall_clock, expired)
        self._http = http
        self._methods: dict[str, _Method] = {}
        self._calls: dict[UnderWayCall, None] = {}
        """Those under way, in the order of their arrival."""

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Nothing: the same methods come as registered ones."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Serves the methods of a service."""
        for name, handler in handlers.items():
            self._methods[f"/{service}/{name}"] = _Method(
                handler.request_deserializer,
                handler.response_serializer,
                handler.unary_unary,
                handler.unary_stream,
                handler.stream_stream,
            )

    @property
    def in_flight(self) -> int:
        """Calls under way."""
        return len(self._calls)

    @property
    def unary_under_way(self) -> UnderWay:
        """The unary calls under way."""
        calls = [call for call in self._calls if call.is_unary]
        return UnderWay(
            len(calls),
            sum(call.orders for call in calls),
            sum(call.is_patient and call.orders == 1 for call in calls),
            sum(call.orders > 1 for call in calls),
        )

    async def run(self) -> None:
        """Looks after slow calls, for ever."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for call in self._slow():
                await self._look_after(call)

    def _slow(self) -> list[UnderWayCall]:
        before = self._clock() - _LOOK_SECONDS
        return list(itertools.takewhile(lambda call: call.arrived <= before, self._calls))

    async def _look_after(self, call: UnderWayCall) -> None:
        now = self._clock()
        if call.deadline is not None and now >= call.deadline:
            call.end(deadline_passed())
        elif call.is_watched:
            try:
                message = await call.receive()
            except OSError:
                call.end(CallerGoneError())
            else:
                if message["type"] == "http.disconnect":
                    call.end(CallerGoneError())
        elif call.is_unary and call in self._calls and now - call.arrived >= self._read_seconds:
            call.end(DeadlineError("REQUEST_TOO_SLOW", "the request's message did not arrive in time"))

    def enter(self, call: UnderWayCall) -> None:
        """Counts a call that does not come by ASGI, and looks after it, until it says `leave`."""
        self._calls[call] = None

    def leave(self, call: UnderWayCall) -> None:
        """A call has ended."""
        del self._calls[call]

    def end_all(self) -> None:
        """Ends every call that is still under way with UNAVAILABLE."""
        for call in self._calls:
            call.end(DrainingError("STOPPED", "the server has stopped"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call."""
        call = AsgiCall(receive, scope["headers"], self._clock())
        self.enter(call)
        try:
            if self._http is None or header(scope["headers"], b"content-type").startswith(transcoding.GRPC):
                await self._call(call, scope, send)
            else:
                await self._http.serve(call, scope, send)
        finally:
            self.leave(call)

    async def _call(self, call: AsgiCall, scope: Scope, send: Send) -> None:
        """Serves one call of gRPC."""
        try:
            await self._serve(call, scope, send)
        except PretradeError as error:
            await self._refuse(send, error)
        except CallerGoneError:
            pass
        except asyncio.CancelledError:
            if call.ended is None:
                raise  # not by us
            if isinstance(call.ended, PretradeError):
                await self._refuse(send, call.ended)
        except Exception as error:
            await self._refuse(send, failed(scope["path"], error))

    async def _serve(self, call: AsgiCall, scope: Scope, send: Send) -> None:
        """Answers a call; raises what it ends with instead."""
        method = self._methods.get(scope["path"])
        if method is None:
            raise UnknownMethodError
        timeout, encoding, arrived = call_headers(scope["headers"])
        await self._lateness.set_deadline(call, timeout, arrived)
        if self._access is not None:
            call.caller = await self._access.admit(attempt_of(scope["path"], scope["headers"]))
        if method.answer is not None:
            await self._answer(call, send, method, encoding)
        else:
            with self._watched(call):
                await self._stream(call, scope, send, method, encoding)

    def _watched(self, call: AsgiCall) -> contextlib.AbstractContextManager[None]:
        """Ends a stream whose caller would not be let in any more."""
        if self._access is None:
            return contextlib.nullcontext()
        return self._access.watched(call.caller, call.end)

    async def _answer(self, call: AsgiCall, send: Send, method: _Method, encoding: bytes) -> None:
        """A call with one answer."""
        answer = await method.answer(await self._request(call, method, encoding), call)
        call.is_watched = False
        body = {"type": "http.response.body", "body": framed(method.serialize(answer))}
        try:
            for message in (_START, body, _OK):
                await send(message)
        except (OSError, asyncio.CancelledError):
            self._delivery.not_sent(answer)
            raise CallerGoneError from None
        self._delivery.sent(answer)

    async def _stream(self, call: AsgiCall, scope: Scope, send: Send, method: _Method, encoding: bytes) -> None:
        """A call with a stream of answers."""
        call.is_unary = False
        problem: PretradeError | None = None

        async def write(answer: Any) -> None:
            wire = method.serialize(answer)
            frames = framed(wire) if isinstance(wire, bytes) else b"".join(map(framed, wire))
            try:
                await send({"type": "http.response.body", "body": frames, "more_body": True})
            except (OSError, asyncio.CancelledError):
                raise CallerGoneError from None

        async def requests() -> AsyncIterator[Any]:
            nonlocal problem
            try:
                async for request in self._requests(call, method, encoding):
                    yield request
            except PretradeError as error:
                problem = error  # said after the answers that are due

        if method.answers_stream is not None:
            answers = method.answers_stream(requests(), call)
        else:
            answers = method.answers_one(await self._request(call, method, encoding), call)
        try:
            with contextlib.suppress(OSError):  # then the first answer says so, too
                await send(_START)
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    await write(answer)
            if problem is not None:
                raise problem
        except PretradeError as error:
            trailers = self._status(error)
        except CallerGoneError:
            raise
        except asyncio.CancelledError:
            if not isinstance(call.ended, PretradeError):
                raise
            trailers = self._status(call.ended)
        except Exception as error:
            trailers = self._status(failed(scope["path"], error))
        else:
            trailers = [_OK_STATUS]
        call.is_watched = False
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            await send({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    async def _request(self, call: AsgiCall, method: _Method, encoding: bytes) -> Any:
        """The only request of a call; what follows it is ignored."""
        message = await call.receive()
        body = message.get("body", b"")
        if message.get("more_body"):
            body = await self._rest(call, body)
        elif message["type"] == "http.disconnect":
            raise CallerGoneError
        length = message_length(body)
        self._check_size(length)
        if len(body) < PREFIX_BYTES + length:
            raise InvalidOrderError("MISSING_REQUEST", "the request ended before its message")
        call.is_watched = True
        return self._parsed(method, body[0], body[PREFIX_BYTES : PREFIX_BYTES + length], encoding)

    async def _rest(self, call: AsgiCall, body: bytes) -> bytes:
        """A request's body to its end."""
        whole = bytearray(body)
        while True:
            if len(whole) >= PREFIX_BYTES:
                self._check_size(message_length(whole))
            self._check_size(len(whole) - PREFIX_BYTES)
            message = await call.receive()
            if message["type"] == "http.disconnect":
                raise CallerGoneError
            whole += message["body"]
            if not message.get("more_body"):
                return bytes(whole)

    async def _requests(self, call: AsgiCall, method: _Method, encoding: bytes) -> AsyncIterator[Any]:
        """The requests of a stream."""
        buffer = bytearray()
        more = True
        while more:
            message = await call.receive()
            if message["type"] == "http.disconnect":
                call.end(CallerGoneError())
                return
            buffer += message["body"]
            more = message.get("more_body", False)
            while len(buffer) >= PREFIX_BYTES:
                length = message_length(buffer)
                self._check_size(length)
                end = PREFIX_BYTES + length
                if len(buffer) < end:
                    break
                compressed, payload = buffer[0], bytes(buffer[PREFIX_BYTES:end])
                del buffer[:end]
                yield self._parsed(method, compressed, payload, encoding)
        call.is_watched = True
        if buffer:
            raise InvalidOrderError("MISSING_REQUEST", "the request ended before its message")

    def _parsed(self, method: _Method, compressed: int, payload: bytes, encoding: bytes) -> Any:
        self._check_size(len(payload))
        if compressed:
            payload = decompressed(payload, encoding, self._max_message_bytes)
            self._check_size(len(payload))
        try:
            return method.parse(payload)
        except DecodeError:
            raise InvalidOrderError("MALFORMED_REQUEST", "the request is not a valid message of this method") from None

    def _check_size(self, size: int) -> None:
        if size > self._max_message_bytes:
            raise MessageTooLargeError(size, self._max_message_bytes)

    def refusal(self, error: PretradeError) -> list[Header]:
        """The headers that end a call, of which nothing was answered yet, with a status other than OK."""
        also = status.http_headers(error)
        return [CONTENT_TYPE, (b"grpc-accept-encoding", ENCODINGS), *self._status(error), *also]

    async def _refuse(self, send: Send, error: PretradeError) -> None:
        """Ends a call, of which nothing was answered yet, with a status other than OK."""
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": 200, "headers": self.refusal(error)})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _status(self, error: PretradeError) -> list[Header]:
        """The trailers of a call that fails. Each has its own from here, and is counted here alone."""
        self._metrics.errors[error.reason] += 1
        return status_headers(*status.of(error))
