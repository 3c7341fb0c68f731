"""`AsyncClient`: the same as `Client` for asyncio, by the same policy."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import grpc

from pretrade.client.asking import (
    DEADLINE_SECONDS,
    HEALTH_SECONDS,
    OPTIONS,
    Asked,
    Asking,
    Batch,
    Metadata,
    Result,
    credentials_of,
    trace_of,
    within,
)
from pretrade.client.decisions import Decision
from pretrade.client.errors import CallError
from pretrade.client.policy import Call
from pretrade.client.shared import AsyncShared
from pretrade.client.streams import AioConnection, AsyncStream, Probes
from pretrade.decision.v1 import decision_pb2 as pb

_Path = str | os.PathLike[str]


class AsyncClient:
    """`Client` for asyncio: one event loop uses it, with any number of tasks. `connect` is called in that loop."""

    def __init__(self, asking: Asking) -> None:
        self._asking: Final = asking
        self._connections: Final = [
            AioConnection(asking.credentials.plain_aio_channel(server.address, OPTIONS))
            for server in asking.policy.servers
        ]
        self._probes: Final = Probes(asking.policy, self._connections)

    @classmethod
    def connect(
        cls,
        *addresses: str,
        ca: _Path | None = None,
        certificate: _Path | None = None,
        key: _Path | None = None,
        tls_name: str | None = None,
        token_file: _Path | None = None,
        token: str | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
        idempotency_keys: bool = True,
    ) -> Self:
        """A client of these servers, as `Client.connect`: same arguments, same errors."""
        credentials = credentials_of(
            ca=ca, certificate=certificate, key=key, tls_name=tls_name, token_file=token_file, token=token
        )
        asking = Asking(addresses, credentials, deadline_seconds=deadline_seconds, idempotency_keys=idempotency_keys)
        return cls(asking)

    async def decide(
        self,
        order: Asked,
        *,
        deadline_seconds: float | None = None,
        explain: bool = False,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Decision:
        """Decides one order, as `Client.decide`: same arguments, same errors."""
        message, trace = self._asking.message(order), trace_of(traceparent, tracestate)
        return await self._decide(message, deadline_seconds, trace, explain=explain)

    async def decide_batch(
        self,
        orders: Iterable[Asked],
        *,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> list[Result]:
        """Decides many orders, as `Client.decide_batch`: same arguments, same errors."""
        return await self._decide_batch(orders, deadline_seconds, trace_of(traceparent, tracestate))

    def stream(self) -> AsyncStream:
        """A stream that any number of tasks share, over the client's connection; an asynchronous context manager."""
        return AsyncStream(self._asking, self._connections)

    def shared(self) -> AsyncShared:
        """Calls that many tasks share: under many callers they cost a fraction of a call for each order."""
        return AsyncShared(self._asking, self._decide, self._decide_batch)

    async def health(self, *, seconds: float = HEALTH_SECONDS) -> Mapping[str, str]:
        """What each server says of itself, as `Client.health`."""
        found = await asyncio.gather(*(connection.health(seconds) for connection in self._connections))
        return {server.address: health for server, health in zip(self._asking.policy.servers, found, strict=True)}

    async def close(self) -> None:
        """Ends the connections, and with them all calls that are under way."""
        self._asking.why_not = "the client was closed"
        await self._probes.close()
        for connection in self._connections:
            await connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _decide(
        self, message: pb.Order, deadline_seconds: float | None, trace: Metadata, *, explain: bool = False
    ) -> Decision:
        """Decides an order, whose message is ours."""
        asking = self._asking
        metadata = asking.metadata(trace, reduce_only=message.reduce_only)
        call = asking.begin(message, within(message, asking.seconds(deadline_seconds)))
        request = pb.DecideRequest(order=message, explain=explain)
        response = await self._ask("decide", request, call, metadata)
        return Decision(response.decision, call.server.address, response.explanation if explain else None)

    async def _decide_batch(
        self, orders: Iterable[Asked], deadline_seconds: float | None, trace: Metadata
    ) -> list[Result]:
        """Decides many orders."""
        asking = self._asking
        batch = Batch(asking, orders)
        metadata = asking.metadata(trace, reduce_only=batch.reduce_only)
        call = asking.policy.begin(asking.seconds(deadline_seconds), repeatable=batch.repeatable)
        while not batch.ended:
            try:
                batch.take(await self._ask("decide_batch", batch.request(), call, metadata), call)
            except CallError as error:
                batch.failed(error)
        return batch.results

    async def _ask(self, method: str, request: Any, call: Call, metadata: Metadata) -> Any:
        """Asks until there is an answer, as the policy says."""
        while True:
            self._probes.look()
            if call.pause:
                await asyncio.sleep(call.pause)
                self._asking.check_open()
            ask = getattr(self._connections[call.server.place], method)
            try:
                response = await ask(
                    request, timeout=call.attempt(), metadata=metadata or None, wait_for_ready=call.wait_for_ready
                )
            except grpc.RpcError as error:
                call.failed(error)
            except BaseException:
                call.abandoned()
                self._asking.check_open()
                raise
            else:
                call.answered()
                return response
