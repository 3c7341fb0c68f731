"""Access to a port on grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio

from server.errors import PretradeError
from server.rpc import status
from server.security.access import AccessControl, peer_host
from server.security.identity import Attempt
from server.security.methods import HEALTH

_Context = grpc.aio.ServicerContext[Any, Any]
_PEM: Final = "x509_pem_cert"


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks whether a call may pass, before anything of it but its headers is read."""

    def __init__(self, access: AccessControl) -> None:
        self._access = access
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        """By method; there are only as many as the server has."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, for callers who may call it."""
        method = handler_call_details.method
        ours = self._handlers.get(method)
        if ours is None:
            handler = await continuation(handler_call_details)
            if handler is None or method.startswith(HEALTH):
                return handler
            ours = self._handlers[method] = self._behind(handler, method)
        return ours

    def _behind(self, handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
        parse, serialize = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._one(handler.unary_unary, method), parse, serialize)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._one(handler.stream_unary, method), parse, serialize)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._many(handler.unary_stream, method), parse, serialize)
        assert handler.stream_stream is not None
        return grpc.stream_stream_rpc_method_handler(self._many(handler.stream_stream, method), parse, serialize)

    def _one(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        async def admitted(request: Any, context: _Context) -> Any:
            await self._admit(method, context)
            return await behaviour(request, context)

        return admitted

    def _many(self, behaviour: Callable[..., Any], method: str) -> Callable[..., Any]:
        # It writes what it answers itself: cancelled while a slow reader keeps it, it still has the last word.
        async def admitted(request: Any, context: _Context) -> None:
            await self._admit(method, context)
            task, refusal = asyncio.current_task(), None
            assert task is not None

            def end(error: PretradeError) -> None:
                nonlocal refusal
                refusal = error
                task.cancel()

            try:
                with self._access.watched(end):
                    async with contextlib.aclosing(behaviour(request, context)) as answers:
                        async for answer in answers:
                            await context.write(answer)
            except asyncio.CancelledError:
                if refusal is None:
                    raise
                task.uncancel()
                await status.abort(context, refusal)

        return admitted

    async def _admit(self, method: str, context: _Context) -> None:
        attempt = Attempt(method, _authorization(context), lambda: peer_host(context.peer()), lambda: _pem(context))
        try:
            await self._access.admit(attempt)
        except PretradeError as error:
            await status.abort(context, error)


def _authorization(context: _Context) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            return value if isinstance(value, str) else ""
    return ""


def _pem(context: _Context) -> bytes | None:
    return next(iter(context.auth_context().get(_PEM, ())), None)
