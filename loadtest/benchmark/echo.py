"""`python -m loadtest.benchmark.echo`: a bare grpc.aio server with the contract's messages that decides nothing.

It shows what the transport alone can do on this machine, and is the yardstick of the benchmark: same stubs, same
requests, same responses in content and size, same event loop.

It talks to its parent over pipes: one line with a `DecideResponse` in hexadecimal on standard input, one line with its
port on standard output. It ends when standard input does, so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import uvloop

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc


class EchoServicer(decision_pb2_grpc.DecisionServiceServicer):
    """Answers every order with the same decision, under the order's reference."""

    def __init__(self, response: pb.DecideResponse) -> None:
        self._decision = response.decision

    async def Decide(  # noqa: N802  the contract names the methods
        self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DecideResponse:
        """One order."""
        self._decision.order_ref = request.order.order_ref
        return pb.DecideResponse(decision=self._decision)

    async def DecideBatch(  # noqa: N802  the contract names the methods
        self, request: pb.DecideBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DecideBatchResponse:
        """Many orders."""
        return pb.DecideBatchResponse(results=[self._result(order) for order in request.orders])

    async def DecideStream(  # noqa: N802  the contract names the methods
        self,
        request_iterator: AsyncIterator[pb.DecideStreamRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecideStreamResponse]:
        """Orders as they come."""
        async for request in request_iterator:
            yield pb.DecideStreamResponse(result=self._result(request.order))

    def _result(self, order: pb.Order) -> pb.OrderResult:
        self._decision.order_ref = order.order_ref
        return pb.OrderResult(order_ref=order.order_ref, decision=self._decision)


async def serve() -> None:
    """Serves on a free loopback port until standard input ends."""
    loop = asyncio.get_running_loop()
    response = pb.DecideResponse.FromString(bytes.fromhex(await loop.run_in_executor(None, sys.stdin.readline)))
    server = grpc.aio.server()
    decision_pb2_grpc.add_DecisionServiceServicer_to_server(EchoServicer(response), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    await server.stop(None)


@asynccontextmanager
async def echo_server(response: pb.DecideResponse) -> AsyncIterator[str]:
    """An echo server in a process of its own that answers with `response`; yields its `HOST:PORT`.

    Raises:
        RuntimeError: It did not start.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.benchmark.echo", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(response.SerializeToString().hex().encode() + b"\n")
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise RuntimeError("the echo server did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    uvloop.run(serve())
