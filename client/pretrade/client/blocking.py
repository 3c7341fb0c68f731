"""`Client`: asks a decision server from any number of threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final, Self

import grpc

from pretrade.client.asking import (
    DEADLINE_SECONDS,
    HEALTH,
    HEALTH_SECONDS,
    OPTIONS,
    Asked,
    Asking,
    Batch,
    Metadata,
    Result,
    credentials_of,
    health_name,
    health_without,
    trace_of,
    within,
)
from pretrade.client.decisions import Decision
from pretrade.client.errors import CallError
from pretrade.client.policy import Call, Server
from pretrade.client.shared import Shared
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_Path = str | os.PathLike[str]


class _Connection:
    """A channel to one server, and what is called there."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel: Final = channel
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        self.decide: Final = stub.Decide
        self.decide_batch: Final = stub.DecideBatch
        self.health: Final[grpc.UnaryUnaryMultiCallable[bytes, bytes]] = channel.unary_unary(HEALTH)


class Client:
    """Asks a decision server, or the next one if the first is away. `connect` makes one; use it as a context manager.

    One client serves any number of threads. It does not survive `os.fork`: connect another one in the child.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking: Final = asking
        self._connections: Final = [
            _Connection(asking.credentials.plain_channel(server.address, OPTIONS)) for server in asking.policy.servers
        ]

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
        """A client of these servers. It returns at once; the first call connects.

        Credentials that are not given are those that the environment names: PRETRADE_CLIENT_CA and so on.

        Args:
            addresses: `HOST:PORT` of each server or region, best first. The others are asked while the first is away.
            ca: Authorities that a server's certificate is checked with, a file in PEM. With it, connections are TLS.
            certificate: The caller's own certificate, where the server asks for one; PEM.
            key: Its private key; PEM.
            tls_name: The name in the server's certificate, where it is not the host's.
            token_file: A file with the caller's token. It is read for every call, so that it may be replaced.
            token: The token itself.
            deadline_seconds: What a call may take that names no deadline of its own, all its attempts together.
            idempotency_keys: Whether an order without a key gets one. Without keys, orders are decided faster in
                batches, and a call that was cut off is not made again.

        Raises:
            ValueError: There is no address, or a deadline that is none.
            CredentialsError: The credentials cannot be used: a file cannot be read, or a token would travel in the
                open.
        """
        credentials = credentials_of(
            ca=ca, certificate=certificate, key=key, tls_name=tls_name, token_file=token_file, token=token
        )
        asking = Asking(addresses, credentials, deadline_seconds=deadline_seconds, idempotency_keys=idempotency_keys)
        return cls(asking)

    def decide(
        self,
        order: Asked,
        *,
        deadline_seconds: float | None = None,
        explain: bool = False,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Decision:
        """Decides one order.

        Args:
            order: An `Order`, or the contract's own message, which is left as it is.
            deadline_seconds: For all attempts together; None for the client's.
            explain: Whether to explain the model's score, too: `Decision.explanation`.
            traceparent: W3C trace context of the caller; None for that of OpenTelemetry's current span, if any.
            tracestate: What vendors add to that `traceparent`.

        Raises:
            CallError: There is no decision; its class says why.
            ClosedError: The client was closed.
        """
        message, trace = self._asking.message(order), trace_of(traceparent, tracestate)
        return self._decide(message, deadline_seconds, trace, explain=explain)

    def decide_batch(
        self,
        orders: Iterable[Asked],
        *,
        deadline_seconds: float | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> list[Result]:
        """Decides many orders: one result for each, in their order; a `Decision`, or the `CallError` of that order.

        Args:
            orders: In any number; a call takes up to 1,024, and the next call has those that are left.
            deadline_seconds: For all of them together; None for the client's.
            traceparent: As in `decide`.
            tracestate: As in `decide`.

        Raises:
            CallError: No order has a result.
            ClosedError: The client was closed.
        """
        return self._decide_batch(orders, deadline_seconds, trace_of(traceparent, tracestate))

    def shared(self) -> Shared:
        """Calls that many threads share: under many callers they cost a fraction of a call for each order."""
        return Shared(self._asking, self._decide, self._decide_batch)

    def health(self, *, seconds: float = HEALTH_SECONDS) -> Mapping[str, str]:
        """What each server says of itself, by address: `SERVING`, `NOT_SERVING`, `UNKNOWN`, or `UNREACHABLE`.

        Args:
            seconds: How long to wait for each.
        """
        return {
            server.address: self._health(connection, seconds)
            for server, connection in zip(self._asking.policy.servers, self._connections, strict=True)
        }

    def close(self) -> None:
        """Ends the connections, and with them all calls that are under way."""
        self._asking.why_not = "the client was closed"
        for connection in self._connections:
            connection.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(
        self, message: pb.Order, deadline_seconds: float | None, trace: Metadata, *, explain: bool = False
    ) -> Decision:
        """Decides an order, whose message is ours."""
        asking = self._asking
        metadata = asking.metadata(trace, reduce_only=message.reduce_only)
        call = asking.begin(message, within(message, asking.seconds(deadline_seconds)))
        request = pb.DecideRequest(order=message, explain=explain)
        response = self._ask("decide", request, call, metadata)
        return Decision(response.decision, call.server.address, response.explanation if explain else None)

    def _decide_batch(self, orders: Iterable[Asked], deadline_seconds: float | None, trace: Metadata) -> list[Result]:
        """Decides many orders."""
        asking = self._asking
        batch = Batch(asking, orders)
        metadata = asking.metadata(trace, reduce_only=batch.reduce_only)
        call = asking.policy.begin(asking.seconds(deadline_seconds), repeatable=batch.repeatable)
        while not batch.ended:
            try:
                batch.take(self._ask("decide_batch", batch.request(), call, metadata), call)
            except CallError as error:
                batch.failed(error)
        return batch.results

    def _ask(self, method: str, request: Any, call: Call, metadata: Metadata) -> Any:
        """Asks until there is an answer, as the policy says."""
        while True:
            if (away := self._asking.policy.due()) is not None:
                self._probe(away)
            if call.pause:
                time.sleep(call.pause)
                self._asking.check_open()
            ask = getattr(self._connections[call.server.place], method)
            try:
                response = ask(
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

    def _probe(self, server: Server) -> None:
        """Looks whether a server that is away is well again, without waiting for it."""
        asked = self._connections[server.place].health.future(b"", timeout=HEALTH_SECONDS)
        asked.add_done_callback(partial(_probed, server))

    def _health(self, connection: _Connection, seconds: float) -> str:
        try:
            return health_name(connection.health(b"", timeout=seconds))
        except grpc.RpcError as error:
            return health_without(error)


def _probed(server: Server, asked: Any) -> None:
    """Takes what the health service said."""
    if asked.cancelled():
        return
    error = asked.exception()
    if (health_name(asked.result()) if error is None else health_without(error)) == "SERVING":
        server.is_well()
