"""`loadtest.envoy_echo:application`: the bare echo of `loadtest.echo` as an ASGI application inside Envoy.

What Envoy with an embedded interpreter can do at best on this machine: one message decoded, one encoded, `Decide` only.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from pretrade.decision.v1 import decision_pb2 as pb

RESPONSE: Final = "LOADTEST_ECHO_RESPONSE"
"""Variable with a `DecideResponse` in hexadecimal, which is repeated."""
_START: Final = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}
_OK: Final = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_response: Final = pb.DecideResponse.FromString(bytes.fromhex(os.environ.get(RESPONSE, "")))


async def application(
    scope: Mapping[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answers every order with the same decision, under the order's reference."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    _response.decision.order_ref = pb.DecideRequest.FromString(bytes(body[5:])).order.order_ref
    answer = _response.SerializeToString()
    await send(_START)
    await send({"type": "http.response.body", "body": b"\0" + len(answer).to_bytes(4, "big") + answer})
    await send(_OK)
