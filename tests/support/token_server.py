"""A server of echoed decisions over TLS that wants a token; run as a module, callers with a token come and go."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from loadtest.benchmark.echo import EchoServicer
from loadtest.generators.channel import connected
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.trial import TrialAuthority


@dataclass(frozen=True)
class TokenServer:
    """Where it is, and how its certificate is checked."""

    address: str
    ca: bytes
    name: str


class _Asking(EchoServicer):
    """Answers those who show the token."""

    def __init__(self, response: pb.DecideResponse, token: str) -> None:
        super().__init__(response)
        self._shown = ("authorization", f"Bearer {token}")

    async def Decide(self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DecideResponse:
        await self._check(context)
        return await super().Decide(request, context)

    async def DecideStream(
        self, request_iterator: AsyncIterator[pb.DecideStreamRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DecideStreamResponse]:
        await self._check(context)
        async for response in super().DecideStream(request_iterator, context):
            yield response

    async def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self._shown not in tuple(context.invocation_metadata() or ()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")


@asynccontextmanager
async def server_with_a_token(response: pb.DecideResponse, token: str) -> AsyncIterator[TokenServer]:
    """Serves while the context is open."""
    authority, name = TrialAuthority(), "server.test"
    own = authority.certify("server", dns=[name])
    server = grpc.aio.server()
    decision_pb2_grpc.add_DecisionServiceServicer_to_server(_Asking(response, token), server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(own.key, own.certificate)]))
    await server.start()
    try:
        yield TokenServer(f"127.0.0.1:{port}", authority.pem, name)
    finally:
        await server.stop(None)


async def _call_once(directory: Path) -> None:
    async with server_with_a_token(pb.DecideResponse(), "secret") as server:
        ca = directory / "ca.pem"
        ca.write_bytes(server.ca)
        os.environ |= {
            "PRETRADE_CLIENT_CA": str(ca),
            "PRETRADE_CLIENT_TLS_NAME": server.name,
            "PRETRADE_CLIENT_TOKEN": "secret",
        }
        async with connected(server.address) as stub:
            await stub.Decide(pb.DecideRequest(), timeout=10)


def main(directory: str, rounds: str) -> None:
    """A server, a caller and an event loop of its own in each round."""
    for _ in range(int(rounds)):
        asyncio.run(_call_once(Path(directory)))


if __name__ == "__main__":
    main(*sys.argv[1:])
