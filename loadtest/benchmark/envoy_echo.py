"""`loadtest.benchmark.envoy_echo:application`: the bare echo of `echo.py` as an ASGI application inside Envoy.

It shows the best that Envoy with an embedded interpreter can do on this machine: messages are decoded and encoded, and
nothing is decided.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from google.protobuf.message import Message

from pretrade.decision.v1 import decision_pb2 as pb

RESPONSE: Final = "LOADTEST_ECHO_RESPONSE"
"""Variable with a `DecideResponse` in hexadecimal, which is repeated."""
_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}
_PREFIX: Final = 5
"""Bytes before each message."""
_OK: Final = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_response: Final = pb.DecideResponse.FromString(bytes.fromhex(os.environ.get(RESPONSE, "")))


async def application(
    scope: Mapping[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answers every order with the same decision, under the order's reference."""
    answer = _ANSWERS[scope["path"].rsplit("/", 1)[-1]]
    buffer = bytearray()
    more = True
    await send(_START)
    while more:
        message = await receive()
        buffer += message["body"]
        more = message.get("more_body", False)
        answers = bytearray()
        while len(buffer) >= _PREFIX and len(buffer) >= (end := _PREFIX + int.from_bytes(buffer[1:_PREFIX], "big")):
            reply = answer(bytes(buffer[_PREFIX:end])).SerializeToString()
            answers += b"\0" + len(reply).to_bytes(4, "big") + reply
            del buffer[:end]
        if answers or not more:
            await send({"type": "http.response.body", "body": bytes(answers), "more_body": more})
    await send(_OK)


def _decide(body: bytes) -> pb.DecideResponse:
    _response.decision.order_ref = pb.DecideRequest.FromString(body).order.order_ref
    return _response


def _decide_batch(body: bytes) -> pb.DecideBatchResponse:
    orders = pb.DecideBatchRequest.FromString(body).orders
    return pb.DecideBatchResponse(results=[_result(order) for order in orders])


def _decide_stream(body: bytes) -> pb.DecideStreamResponse:
    return pb.DecideStreamResponse(result=_result(pb.DecideStreamRequest.FromString(body).order))


def _result(order: pb.Order) -> pb.OrderResult:
    _response.decision.order_ref = order.order_ref
    return pb.OrderResult(order_ref=order.order_ref, decision=_response.decision)


_ANSWERS: Final[Mapping[str, Callable[[bytes], Message]]] = {
    "Decide": _decide,
    "DecideBatch": _decide_batch,
    "DecideStream": _decide_stream,
}


@asynccontextmanager
async def envoy_echo(response: pb.DecideResponse) -> AsyncIterator[str]:
    """The bare echo inside Envoy, which answers with `response`; yields its `HOST:PORT`."""
    from pyvoy import PyvoyServer  # noqa: PLC0415 - an extra that nothing else here needs

    env = {RESPONSE: response.SerializeToString().hex()}
    async with PyvoyServer(
        "loadtest.benchmark.envoy_echo:application", worker_threads=1, lifespan=False, env=env
    ) as echo:
        yield f"{echo.listener_address}:{echo.listener_port}"
