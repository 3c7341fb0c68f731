"""The edge on grpc.aio: admits calls, reads their requests and maps errors to statuses.

Its counterpart in Envoy is `server/envoy/asgi.py`.

The edge reads and parses every request itself. If grpc.aio parsed them, a request that cannot be parsed would show the
caller our internals, and a unary call whose request never ends, or ends without a message, would stay open for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn, Protocol, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from server.errors import DeadlineError, InternalError, InvalidOrderError, PretradeError, UnknownMethodError
from server.rpc import status
from server.rpc.call import Call
from server.security.access import AccessControl, peer_host
from server.security.identity import Attempt, Caller
from server.security.methods import HEALTH
from server.timing.call_deadlines import CallDeadlines

_log = structlog.get_logger(__name__)

_Context = grpc.aio.ServicerContext[Any, Any]
_Handler = Any
"""A `grpc.RpcMethodHandler`, which is generic for type checkers alone."""
_PEM: Final = "x509_pem_cert"
_MALFORMED: Final = object()


class GrpcCall(Call):
    """A call on grpc.aio."""

    __slots__ = ("_context",)

    def __init__(self, deadline: float | None, context: _Context, caller: Caller | None) -> None:
        super().__init__(deadline, context.invocation_metadata(), caller)
        self._context = context

    async def accept(self) -> None:
        """Sends the initial metadata."""
        await self._context.send_initial_metadata(())


class Delivery(Protocol):
    """Who wants to know what became of unary answers. A servicer knows that of a stream's: it is asked for the next."""

    def sent(self, answer: object) -> None:
        """All of an answer was written before its deadline."""
        ...

    def in_doubt(self, answer: object) -> None:
        """An answer was given to gRPC in time. Nobody knows whether gRPC wrote it in time."""
        ...

    def too_late(self, answer: object) -> DeadlineError:
        """An answer is not given to gRPC any more; returns what its caller hears instead."""
        ...


class GrpcEdge(grpc.aio.ServerInterceptor):
    """Stands between grpc.aio and the servicers of one port.

    gRPC ends a call by itself when its deadline passes, also between the moment at which it is given the answer and the
    moment at which it writes it. It does not tell. But it writes an answer as a whole, with its status, and ends no
    call before its deadline. An answer whose writing has ended before the deadline was therefore written.

    The message could also be written first (`context.write`), which does tell. But its status would follow an instant
    later, and a caller whose deadline passes in between has the answer and hears DEADLINE_EXCEEDED.

    Args:
        read_seconds: How long a call may take to send its only message.
        errors: Counts the calls that end with an error, by reason.
        deadlines: Knows when callers stop waiting.
        access: Asked about every call but health checks; None for an open port.
        delivery: Told what became of every unary answer; None if nobody wants to know.
    """

    def __init__(
        self,
        read_seconds: float,
        errors: Counter[str],
        deadlines: CallDeadlines,
        access: AccessControl | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self._read_seconds = read_seconds
        self._errors = errors
        self._deadlines = deadlines
        self._access = access
        self._delivery = delivery
        self._handlers: dict[str, _Handler] = {}
        """By method; there are only as many as the server has."""
        self._unknown: _Handler = grpc.stream_unary_rpc_method_handler(self._refuse_unknown)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """The method's handler, behind this edge."""
        method = handler_call_details.method
        ours = self._handlers.get(method)
        if ours is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return self._unknown
            ours = self._handlers[method] = self._behind(handler, method)
        return ours

    def _behind(self, handler: _Handler, method: str) -> _Handler:
        access = None if method.startswith(HEALTH) else self._access
        parse, serialize = _parser(handler.request_deserializer), handler.response_serializer
        # With one request or many, the wire is the same; but as a stream the reading is ours.
        if not handler.response_streaming:
            one = self._one_answer(handler.unary_unary, method, access)
            return grpc.stream_unary_rpc_method_handler(one, parse, serialize)
        many = self._many_answers(handler, method, access)
        return grpc.stream_stream_rpc_method_handler(many, parse, serialize)

    def _one_answer(self, answer: Any, method: str, access: AccessControl | None) -> Callable[..., Any]:
        async def call(_requests: AsyncIterator[Any], context: _Context) -> Any:
            try:
                caller = None if access is None else await _admit(access, method, context)
                request = await self._only_request(context)
                deadline = self._deadlines.deadline(context.time_remaining())
                made = await answer(request, GrpcCall(deadline, context, caller))
                if self._delivery is not None:
                    self._hand_over(self._delivery, made, deadline, context)
                return made
            except Exception as error:
                await self._fail(context, method, error)

        return call

    def _hand_over(self, delivery: Delivery, answer: object, deadline: float | None, context: _Context) -> None:
        """Has it told what becomes of an answer that gRPC gets next.

        Raises:
            DeadlineError: It comes too late for that.
        """
        if self._deadlines.has_passed(deadline):
            raise delivery.too_late(answer)

        def written(_context: object) -> None:
            if self._deadlines.has_passed(deadline):
                delivery.in_doubt(answer)
            else:
                delivery.sent(answer)

        context.add_done_callback(cast("Any", written))  # the stubs have a class in the place of a callable

    def _many_answers(self, handler: _Handler, method: str, access: AccessControl | None) -> Callable[..., Any]:
        # It writes what it answers itself: cancelled while a slow reader keeps it, it still has the last word.
        async def call(requests: AsyncIterator[Any], context: _Context) -> None:
            try:
                if access is None:
                    await self._answer(handler, requests, context, None)
                else:
                    caller = await _admit(access, method, context)
                    await self._answer_watched(access, handler, requests, context, caller)
            except Exception as error:
                await self._fail(context, method, error)

        return call

    async def _answer(
        self, handler: _Handler, requests: AsyncIterator[Any], context: _Context, caller: Caller | None
    ) -> None:
        """Writes the answers of a stream."""
        call = GrpcCall(self._deadlines.deadline(context.time_remaining()), context, caller)
        malformed = False

        async def sound() -> AsyncIterator[Any]:
            nonlocal malformed
            async for request in requests:
                if request is _MALFORMED:
                    malformed = True
                    return
                yield request

        streams: Any = handler.stream_stream
        if streams is not None:
            answers = streams(sound(), call)
        else:
            answer: Any = handler.unary_stream
            answers = answer(await self._only_request(context), call)
        async with contextlib.aclosing(answers):
            async for one in answers:
                await _write(context, one)
        if malformed:  # said after the answers that are due
            raise _malformed()

    async def _answer_watched(
        self,
        access: AccessControl,
        handler: _Handler,
        requests: AsyncIterator[Any],
        context: _Context,
        caller: Caller | None,
    ) -> None:
        """The same, until its caller would not be let in any more."""
        task, refusal = asyncio.current_task(), None
        assert task is not None

        def end(error: PretradeError) -> None:
            nonlocal refusal
            refusal = error
            task.cancel()

        try:
            with access.watched(caller, end):
                await self._answer(handler, requests, context, caller)
        except asyncio.CancelledError:
            if refusal is None:
                raise
            task.uncancel()
            raise refusal from None

    async def _only_request(self, context: _Context) -> Any:
        """The request of a call that has one; what follows it is ignored."""
        try:
            async with asyncio.timeout(self._read_seconds):
                request = await context.read()
        except TimeoutError:
            raise DeadlineError("REQUEST_TOO_SLOW", "the request's message did not arrive in time") from None
        if request is grpc.aio.EOF:
            raise InvalidOrderError("MISSING_REQUEST", "the request ended before its message")
        if request is _MALFORMED:
            raise _malformed()
        return request

    async def _refuse_unknown(self, _requests: AsyncIterator[Any], context: _Context) -> NoReturn:
        await self._fail(context, "", UnknownMethodError())

    async def _fail(self, context: _Context, method: str, error: Exception) -> NoReturn:
        """Ends a call with an error's status. Every call that fails ends here, and is counted here alone."""
        if isinstance(error, grpc.aio.BaseError):
            raise error  # grpc.aio's own word that the call is over
        if not isinstance(error, PretradeError):
            _log.error("call failed", method=method, exc_info=error)
            error = InternalError("the call failed; see the server's log")
        self._errors[error.reason] += 1
        await context.abort(*status.of(error))


async def _write(context: _Context, answer: object) -> None:
    """Writes an answer of a stream.

    If its task is cancelled when gRPC has just taken the answer, it returns, and the task is cancelled at what it waits
    for next: such an answer is heard, and its servicer has to know. It is a task of its own for that reason alone.
    """
    writing = asyncio.ensure_future(context.write(answer))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        if not writing.done() or writing.cancelled() or writing.exception() is not None:
            writing.cancel()
            raise
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
        task.cancel()


def _malformed() -> InvalidOrderError:
    return InvalidOrderError("MALFORMED_REQUEST", "the request is not a valid message of this method")


def _parser(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A parser that never raises; None for requests that are bytes."""
    if deserialize is None:
        return None

    def parse(wire: bytes) -> Any:
        try:
            return deserialize(wire)
        except DecodeError:
            return _MALFORMED

    return parse


async def _admit(access: AccessControl, method: str, context: _Context) -> Caller | None:
    """Asks whether a call may pass, before anything of it but its headers is read."""
    return await access.admit(
        Attempt(method, _authorization(context), lambda: peer_host(context.peer()), lambda: _pem(context))
    )


def _authorization(context: _Context) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            return value if isinstance(value, str) else ""
    return ""


def _pem(context: _Context) -> bytes | None:
    return next(iter(context.auth_context().get(_PEM, ())), None)
