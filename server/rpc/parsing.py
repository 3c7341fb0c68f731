"""Turns a request that cannot be parsed into INVALID_ARGUMENT; grpc.aio itself would show the caller our internals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

_MESSAGE: Final = "the request is not a valid message of this method"
_MALFORMED: Final = object()


class ParsingInterceptor(grpc.aio.ServerInterceptor):
    """Parses every request of the server it is given to."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler with a parser that never raises."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        parse = _parser(handler.request_deserializer)
        if handler.unary_unary:
            behaviour = _checked_unary(handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(behaviour, parse, handler.response_serializer)
        if handler.stream_stream:
            return grpc.stream_stream_rpc_method_handler(
                _checked_stream(handler.stream_stream), parse, handler.response_serializer
            )
        return handler


def _parser(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse(wire: bytes) -> Any:
        try:
            return deserialize(wire)
        except DecodeError:
            return _MALFORMED

    return parse


def _checked_unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def checked(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _MALFORMED:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _MESSAGE)
        return await behaviour(request, context)

    return checked


def _checked_stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def checked(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
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
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _MESSAGE)

    return checked
