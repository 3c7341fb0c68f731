"""Callers and operators: what they ask, how they misbehave, and the record they keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Final

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from feature_cache import features
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from simulation.calls import Call, Listeners
from simulation.guest import MODEL
from simulation.history import Asked, Handed, History, Operation, Watch
from simulation.machine import SimulatedMachine

if TYPE_CHECKING:
    from simulation.world import World

INSTRUMENT: Final = "BTCUSDT.SIM"
MID: Final = 60_000.0
DECISION_PORT: Final = 7001
ADMIN_PORT: Final = 7002
_SERVICE: Final = "/pretrade.decision.v1.DecisionService/"
_ADMIN: Final = "/pretrade.admin.v1.AdminService/"


class Desk:
    """Calls and operates the servers, from a process of its own that no fault touches.

    Args:
        world: Whose time it lives in.
        machine: Its process.
        listeners: The servers there are.
        history: Where it keeps its record.
        operator_token: What a server asks operators for now.
    """

    def __init__(
        self,
        world: World,
        machine: SimulatedMachine,
        listeners: Listeners,
        history: History,
        operator_token: Callable[[str], str],
    ) -> None:
        self.world = world
        self.machine = machine
        self._listeners = listeners
        self.history = history
        self._operator_token = operator_token
        self._numbers = itertools.count(1)
        self._watching: list[Call] = []
        self.under_way = 0
        """Calls that have no end yet."""

    # Orders.

    def new_order(self, chance: Random, caller: str, **changes: object) -> pb.Order:
        """A sound order with a reference of its own."""
        fields = {
            "order_ref": f"{caller}/{next(self._numbers)}",
            "instrument": INSTRUMENT,
            "side": pb.SIDE_BUY if chance.random() < 0.5 else pb.SIDE_SELL,
            "quantity": 0.01,
            "limit_price": MID,
            "strategy": caller,
        }
        return pb.Order(**(fields | changes))  # type: ignore[arg-type]

    def decide(
        self, server: str, caller: str, order: pb.Order, timeout: float | None, cancel_after: float | None = None
    ) -> Asked:
        """Asks about one order."""
        request = pb.DecideRequest(order=order)
        asked = self._asked(server, caller, "unary", order, timeout)

        def hear(message: bytes) -> None:
            self._heard(asked, pb.DecideResponse.FromString(message).decision)

        self._call(
            server,
            "Decide",
            [request.SerializeToString()],
            timeout,
            cancel_after,
            [asked],
            hear,
            lambda message: [pb.DecideResponse.FromString(message).decision.decision_id],
        )
        return asked

    def decide_batch(
        self, server: str, caller: str, orders: list[pb.Order], timeout: float | None, cancel_after: float | None = None
    ) -> list[Asked]:
        """Asks about many orders at once."""
        request = pb.DecideBatchRequest(orders=orders)
        asked = [self._asked(server, caller, "batch", order, timeout) for order in orders]

        def hear(message: bytes) -> None:
            for one, result in zip(asked, pb.DecideBatchResponse.FromString(message).results, strict=True):
                self._heard_result(one, result)

        self._call(
            server,
            "DecideBatch",
            [request.SerializeToString()],
            timeout,
            cancel_after,
            asked,
            hear,
            lambda message: [
                result.decision.decision_id
                for result in pb.DecideBatchResponse.FromString(message).results
                if result.HasField("decision")
            ],
        )
        return asked

    def decide_stream(
        self,
        server: str,
        caller: str,
        orders: list[pb.Order],
        gaps: Callable[[], float],
        window: float,
        close_after: float | None,
        read_after: float | None,
    ) -> list[Asked]:
        """Asks about orders on a stream, one after another.

        Args:
            server, caller, orders: As elsewhere.
            gaps: Seconds before each next order.
            window: Bytes that are read at first.
            close_after: The stream is given up after so long; None: when everything was heard.
            read_after: Everything is read from then on; None: only what the window lets pass.
        """
        asked: list[Asked] = []
        by_ref: dict[str, Asked] = {}

        def hear(message: bytes) -> None:
            result = pb.DecideStreamResponse.FromString(message).result
            self._heard_result(by_ref[result.order_ref], result)

        call = self._call(
            server,
            "DecideStream",
            [],
            None,
            close_after,
            asked,
            hear,
            lambda message: [
                result.decision.decision_id
                for result in (pb.DecideStreamResponse.FromString(message).result,)
                if result.HasField("decision")
            ],
        )
        call.window = window
        if read_after is not None:
            self.world.after(read_after, call.read_more)
        remaining: Iterator[pb.Order] = iter(orders)

        def send() -> None:
            order = next(remaining, None)
            if call.ended:
                return
            if order is None:
                call.half_close()
                return
            one = by_ref[order.order_ref] = self._asked(server, caller, "stream", order, None)
            asked.append(one)
            call.send(pb.DecideStreamRequest(order=order).SerializeToString())
            self.world.after(gaps(), send)

        send()
        return asked

    def _asked(self, server: str, caller: str, kind: str, order: pb.Order, timeout: float | None) -> Asked:
        now = self.world.now
        deadline = None if timeout is None else now + timeout
        asked = Asked(order.order_ref, caller, server, kind, order, now, deadline)
        self.history.asked.append(asked)
        return asked

    def _heard(self, asked: Asked, decision: pb.Decision) -> None:
        asked.heard_at, asked.decision = self.world.now, decision
        self.world.note("heard", asked.ref, decision.decision_id, decision.action, decision.source)

    def _heard_result(self, asked: Asked, result: pb.OrderResult) -> None:
        if result.HasField("decision"):
            self._heard(asked, result.decision)
        else:
            asked.heard_at, asked.error = self.world.now, result.error.reason
            self.world.note("heard", asked.ref, result.error.reason)

    def _call(
        self,
        server: str,
        method: str,
        messages: list[bytes],
        timeout: float | None,
        cancel_after: float | None,
        asked: list[Asked],
        hear: Callable[[bytes], None],
        ids_in: Callable[[bytes], list[str]],
    ) -> Call:
        call = Call(
            self._listeners.network,
            self.machine,
            self._listeners,
            f"{server}:{DECISION_PORT}",
            _SERVICE + method,
            timeout,
        )
        self.under_way += 1
        call.on_message = hear

        def handed(message: bytes) -> None:
            for decision_id in ids_in(message):
                self.history.handed.append(Handed(self.world.now, decision_id, server))

        call.on_handed = handed

        def ended(code: grpc.StatusCode, _details: str, _trailers: object) -> None:
            self.under_way -= 1
            for one in asked:
                if one.decision is None and not one.error:
                    one.error = "" if code is grpc.StatusCode.OK else code.name
                    one.heard_at = self.world.now
            self.world.note("ended", method, server, code.name)

        call.on_status = ended
        for message in messages:
            call.send(message)
        if messages:
            call.half_close()
        if cancel_after is not None:
            self.world.after(cancel_after, call.cancel)
        return call

    # Operators.

    def set_trading_state(
        self,
        server: str,
        state: str,
        *,
        timeout: float = 5.0,
        expires_in: float | None = None,
        then: Callable[[Operation], None] = lambda operation: None,
    ) -> Operation:
        """Asks for another trading state."""
        reason = f"op-{next(self._numbers)}"
        request = admin_pb2.SetTradingStateRequest(
            state=admin_pb2.TradingState.Value(f"TRADING_STATE_{state}"), author="operator", reason=reason
        )
        if expires_in is not None:
            expiry = Duration()
            expiry.FromNanoseconds(int(expires_in * 1e9))
            request.expires_in.CopyFrom(expiry)
        operation = Operation(reason, server, "trading_state", state, self.world.now, request)
        return self._operate(operation, "SetTradingState", admin_pb2.SetTradingStateResponse, timeout, then)

    def set_flag(self, server: str, name: str, enabled: bool, *, timeout: float = 5.0) -> Operation:
        """Asks for a flag."""
        reason = f"op-{next(self._numbers)}"
        request = admin_pb2.SetFlagRequest(name=name, enabled=enabled, author="operator", reason=reason)
        value = "on" if enabled else "off"
        operation = Operation(reason, server, f"flag/{name}", value, self.world.now, request)
        return self._operate(operation, "SetFlag", admin_pb2.SetFlagResponse, timeout, lambda one: None)

    def set_model_map(self, server: str, strategies: Sequence[str], *, timeout: float = 5.0) -> Operation:
        """Asks for the map that gives these strategies' orders to the second model."""
        reason = f"op-{next(self._numbers)}"
        rules = [admin_pb2.ModelMapRule(strategy=one, model=MODEL) for one in strategies]
        request = admin_pb2.SetModelMapRequest(rules=rules, author="operator", reason=reason)
        operation = Operation(reason, server, "model_map", ",".join(strategies), self.world.now, request)
        return self._operate(operation, "SetModelMap", admin_pb2.SetModelMapResponse, timeout, lambda one: None)

    def _operate(
        self,
        operation: Operation,
        method: str,
        response: type[admin_pb2.SetTradingStateResponse]
        | type[admin_pb2.SetFlagResponse]
        | type[admin_pb2.SetModelMapResponse],
        timeout: float,
        then: Callable[[Operation], None],
    ) -> Operation:
        self.history.operations.append(operation)
        self.world.note("asks", operation.reason, operation.server, operation.subject, operation.value)

        def hear(message: bytes) -> None:
            operation.change = response.FromString(message).change

        def ended(code: grpc.StatusCode, details: str, _trailers: object) -> None:
            operation.ended_at = self.world.now
            if operation.change is None:
                operation.code, operation.details = code, details
            self.world.note("told", operation.reason, code.name, details)
            then(operation)

        self._ask_admin(operation.server, method, operation.request.SerializeToString(), timeout, hear, ended)
        return operation

    def _ask_admin(
        self,
        server: str,
        method: str,
        request: bytes,
        timeout: float,
        hear: Callable[[bytes], None],
        ended: Callable[[grpc.StatusCode, str, object], None],
    ) -> None:
        self.under_way += 1
        call = Call(
            self._listeners.network,
            self.machine,
            self._listeners,
            f"{server}:{ADMIN_PORT}",
            _ADMIN + method,
            timeout,
            (("authorization", f"Bearer {self._operator_token(server)}"),),
        )
        call.on_message = hear

        def end(code: grpc.StatusCode, details: str, trailers: object) -> None:
            self.under_way -= 1
            ended(code, details, trailers)

        call.on_status = end
        call.send(request, last=True)

    def watch_health(self, server: str, service: str, window: float = math.inf) -> None:
        """Watches the health of a service on the decision port; a watcher with a window of 0 never reads."""
        call = Call(
            self._listeners.network,
            self.machine,
            self._listeners,
            f"{server}:{DECISION_PORT}",
            "/grpc.health.v1.Health/Watch",
            None,
        )
        call.window = window
        watch = Watch(server, service, self.world.now)
        if window:
            self.history.watches.append(watch)

        def hear(message: bytes) -> None:
            serving = (
                health_pb2.HealthCheckResponse.FromString(message).status == health_pb2.HealthCheckResponse.SERVING
            )
            watch.heard.append((self.world.now, serving))
            self.world.note("health", server, service, serving)

        def ended(_code: grpc.StatusCode, _details: str, _trailers: object) -> None:
            watch.ended_at = self.world.now

        call.on_message = hear
        call.on_status = ended
        call.send(health_pb2.HealthCheckRequest(service=service).SerializeToString(), last=True)
        self._watching.append(call)

    def stop_watching(self) -> None:
        """Ends every watch of health."""
        for call in self._watching:
            call.cancel()
        self._watching.clear()

    def status(self, server: str, hear: Callable[[admin_pb2.GetStatusResponse | None], None]) -> None:
        """Asks a server how it is; None when it does not say."""
        found: list[admin_pb2.GetStatusResponse] = []
        self._ask_admin(
            server,
            "GetStatus",
            admin_pb2.GetStatusRequest(this_process_only=True).SerializeToString(),
            2.0,
            lambda message: found.append(admin_pb2.GetStatusResponse.FromString(message)),
            lambda code, details, trailers: hear(found[0] if found else None),
        )


def caller_row(chance: Random, book_age_ms: float = 0.0) -> list[float]:
    """A row of features that a caller brings: a tight, calm market."""
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    values[features.INDEX["spread_bps"]] = 0.1
    values[features.INDEX["rv_5s_bps"]] = 1.0
    values[features.INDEX["book_age_ms"]] = book_age_ms
    values[features.INDEX["trade_age_ms"]] = chance.uniform(0, 100)
    return [float(value) for value in values]
