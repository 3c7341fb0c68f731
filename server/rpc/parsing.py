"""Reads and parses every request, so that a broken one gets a status of ours.

grpc.aio itself would show the caller our internals where a request cannot be parsed, and would leave a unary call
open for ever whose request ends without a message, or never ends.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from server.errors import DeadlineError, InvalidOrderError, PretradeError
from server.rpc import status

_MALFORMED: Final = object()


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Reads and parses every request of the server it is given to.

    Args:
        read_seconds: How long a unary call may take to send its message.
        errors: Counts the calls that end here, by reason.
    """

    def __init__(self, read_seconds: float, errors: Counter[str]) -> None:
        self._read_seconds = read_seconds
        self._errors = errors
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        """By method; there are only as many as the server has."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler with a parser that never raises."""
        ours = self._handlers.get(handler_call_details.method)
        if ours is None:
            handler = await continuation(handler_call_details)
            if handler is None or handler.request_deserializer is None:
                return handler
            ours = self._reading(handler, _parser(handler.request_deserializer))
            self._handlers[handler_call_details.method] = ours
        return ours

    def _reading(
        self, handler: grpc.RpcMethodHandler[Any, Any], parse: Callable[[bytes], Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if handler.unary_unary:
            # The same on the wire; but as a stream the reading is ours.
            behaviour = self._reading_unary(handler.unary_unary)
            return grpc.stream_unary_rpc_method_handler(behaviour, parse, handler.response_serializer)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                self._checked_stream(handler.stream_stream), parse, handler.response_serializer
            )
        return handler

    def _reading_unary(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def reading(_requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                async with asyncio.timeout(self._read_seconds):
                    request = await context.read()
            except TimeoutError:
                slow = DeadlineError("REQUEST_TOO_SLOW", "the request's message did not arrive in time")
                await self._refuse(context, slow)
            if request is grpc.aio.EOF:
                missing = InvalidOrderError("MISSING_REQUEST", "the request ended before its message")
                await self._refuse(context, missing)
            if request is _MALFORMED:
                await self._refuse_malformed(context)
            return await behaviour(request, context)

        return reading

    def _checked_stream(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def checked(
            requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            malformed = False

            async def sound() -> AsyncIterator[Any]:
                nonlocal malformed
                async for request in requests:
                    if request is _MALFORMED:
                        malformed = True
                        return
                    yield request

            async for response in behaviour(sound(), context):
                yield response
            if malformed:
                await self._refuse_malformed(context)

        return checked

    async def _refuse_malformed(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        malformed = InvalidOrderError("MALFORMED_REQUEST", "the request is not a valid message of this method")
        await self._refuse(context, malformed)

    async def _refuse(self, context: grpc.aio.ServicerContext[Any, Any], error: PretradeError) -> NoReturn:
        self._errors[error.reason] += 1
        await status.abort(context, error)


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(wire: bytes) -> Any:
        try:
            return deserialize(wire)
        except DecodeError:
            return _MALFORMED

    return parse
