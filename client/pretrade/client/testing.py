"""`FakeServer`: a decision server for the unit tests of programs that call one. It decides what the test says.

```python
with FakeServer() as server, Client.connect(server.address) as client:
    server.answer("NO_TRADE", score=0.4, reasons=["SCORE_BELOW_THRESHOLD"])
    assert not my_program.wants_to_trade(client)
    server.fail(grpc.StatusCode.UNAVAILABLE, times=2)  # the next two calls
```

It is a real gRPC server on loopback, so that what is tested is what runs. It checks an order's own fields, remembers
idempotency keys, and answers all three methods as a server does; `tests/contract/test_fake_server.py` holds it against
one. It has no features, no models, no guards and no audit.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Final, Self

import grpc

from pretrade.client.errors import CallError, InvalidOrderError, KeyReusedError
from pretrade.client.retries import PUSHBACK
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from pretrade.wire.rpc import status_pb2

Decide = Callable[[pb.Order], pb.Decision]
_HEALTH: Final = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
_MAX_NAME: Final = 64
_MAX_BATCH: Final = 1_024
_WORKERS: Final = 32
"""Calls that are answered at once; an open stream is one."""


def decision(
    action: str = "TRADE",
    *,
    score: float | None = 0.9,
    threshold: float | None = 0.8,
    source: str = "PRIMARY",
    reasons: Sequence[str] = ("SCORE_AT_OR_ABOVE_THRESHOLD",),
    degradations: Sequence[str] = (),
) -> pb.Decision:
    """A decision of the contract, in its words without their prefixes.

    Raises:
        ValueError: The contract has no such word.
    """
    return pb.Decision(
        action=pb.Action.Value(f"ACTION_{action}"),
        score=score,
        threshold=threshold,
        source=pb.Source.Value(f"SOURCE_{source}"),
        reasons=[pb.ReasonCode.Value(f"REASON_CODE_{one}") for one in reasons],
        degradations=[pb.Degradation.Value(f"DEGRADATION_{one}") for one in degradations],
    )


class FakeServer:
    """A decision server that decides what it is told to; a context manager.

    Args:
        port: On loopback; 0 for a free one.
    """

    def __init__(self, port: int = 0) -> None:
        self._lock = threading.Lock()
        self._decide: Decide = lambda order: decision()
        self._failures: list[CallError] = []
        self._kept: dict[tuple[str, str], tuple[bytes, pb.Decision]] = {}
        self._runs = threading.Event()
        self._runs.set()
        self._port = port
        self._server: grpc.Server | None = None
        self.is_healthy = True
        """What its health service says."""
        self.orders: list[pb.Order] = []
        """Every order that it was asked for, in their order, also those that it refused."""
        self.metadata: list[dict[str, str | bytes]] = []
        """What came with every call."""

    @property
    def address(self) -> str:
        """`HOST:PORT`."""
        return f"127.0.0.1:{self._port}"

    def answer(self, action: str = "TRADE", **fields: Any) -> None:
        """From now on every order gets this answer; the arguments are those of `decision`."""
        answer = decision(action, **fields)
        self.decide_by(lambda order: answer)

    def decide_by(self, decide: Decide) -> None:
        """From now on every order is decided by this function, on any thread; it may raise a `CallError`."""
        with self._lock:
            self._decide = decide

    def fail(
        self,
        code: grpc.StatusCode,
        message: str = "the test says so",
        *,
        reason: str = "",
        field: str = "",
        retry_delay_seconds: float | None = None,
        times: int = 1,
    ) -> None:
        """The next calls fail with this status; an open stream ends with it at its next order.

        Args:
            code: The gRPC status.
            message: In the server's words.
            reason: The machine-readable reason; empty for what gRPC's own transport ends.
            field: The order's field that is to blame.
            retry_delay_seconds: After how long to ask again, as an overloaded server says; infinite for never.
            times: How many calls.
        """
        error = CallError(message, code, reason=reason, field=field, retry_delay_seconds=retry_delay_seconds)
        with self._lock:
            self._failures += [error] * times

    def hang(self) -> None:
        """From now on nothing is answered, not even about its health, until `resume`."""
        self._runs.clear()

    def resume(self) -> None:
        """Answers again, what has waited too."""
        self._runs.set()

    def start(self) -> None:
        """Listens, on the port that it had before."""
        server = grpc.server(futures.ThreadPoolExecutor(_WORKERS))
        decision_pb2_grpc.add_DecisionServiceServicer_to_server(_Servicer(self), server)
        check: Any = grpc.unary_unary_rpc_method_handler(self._check)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_HEALTH, {"Check": check}),))
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server

    def stop(self) -> None:
        """Ends at once, with all that is under way, as a process does that is killed. `start` begins again."""
        if self._server is not None:
            runs = self._runs.is_set()
            self._runs.set()  # its threads end with it
            self._server.stop(None).wait()
            self._server = None
            if not runs:
                self._runs.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self, context: grpc.ServicerContext) -> None:
        """A call, or an order of a stream, comes in; it ends here if it is to fail."""
        self._runs.wait()
        with self._lock:
            self.metadata.append(dict(context.invocation_metadata()))
            failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            _abort(context, failure)

    def decided(self, order: pb.Order) -> pb.Decision:
        """The decision of an order.

        Raises:
            CallError: There is none.
        """
        with self._lock:
            self.orders.append(order)
            decide = self._decide
        _check_order(order)
        key, content = (order.strategy, order.idempotency_key), _content(order)
        with self._lock:
            kept = self._kept.get(key) if order.idempotency_key else None
        if kept is None:
            answer = pb.Decision()
            answer.CopyFrom(decide(order))
            answer.decision_id = answer.decision_id or str(uuid.uuid4())
            answer.order_ref = order.order_ref
            answer.decided_at.GetCurrentTime()
            with self._lock:
                kept = self._kept.setdefault(key, (content, answer)) if order.idempotency_key else (content, answer)
        if kept[0] != content:
            raise KeyReusedError(
                "idempotency_key: already used for another order",
                grpc.StatusCode.ALREADY_EXISTS,
                reason="IDEMPOTENCY_KEY_REUSED",
                field="idempotency_key",
            )
        return kept[1]

    def result(self, order: pb.Order) -> pb.OrderResult:
        """What becomes of one order of a batch or stream."""
        try:
            return pb.OrderResult(order_ref=order.order_ref, decision=self.decided(order))
        except CallError as error:
            found = pb.OrderError(code=error.code.value[0], reason=error.reason, field=error.field, message=str(error))
            if error.retry_delay_seconds is not None:
                found.retry_delay.FromNanoseconds(int(error.retry_delay_seconds * 1e9))
            return pb.OrderResult(order_ref=order.order_ref, error=found)

    def _check(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        self._runs.wait()
        return _SERVING if self.is_healthy else _NOT_SERVING


class _Servicer(decision_pb2_grpc.DecisionServiceServicer):
    """The service, in gRPC's terms."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def Decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideResponse:  # noqa: N802
        """One order."""
        self._server.begin(context)
        try:
            answer = self._server.decided(request.order)
        except CallError as error:
            _abort(context, error)
        response = pb.DecideResponse(decision=answer)
        if request.explain:
            response.explanation.status = pb.EXPLANATION_STATUS_NO_MODEL
            response.explanation.message = "a fake server has no model"
        return response

    def DecideBatch(  # noqa: N802
        self, request: pb.DecideBatchRequest, context: grpc.ServicerContext
    ) -> pb.DecideBatchResponse:
        """Many orders."""
        self._server.begin(context)
        if not 1 <= len(request.orders) <= _MAX_BATCH:
            _abort(context, _invalid("INVALID_ORDERS", "orders", f"must be 1 to {_MAX_BATCH}"))
        return pb.DecideBatchResponse(results=[self._server.result(order) for order in request.orders])

    def DecideStream(  # noqa: N802
        self, request_iterator: Iterator[pb.DecideStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DecideStreamResponse]:
        """Orders as they come."""
        for request in request_iterator:
            self._server.begin(context)
            yield pb.DecideStreamResponse(result=self._server.result(request.order))


def _abort(context: grpc.ServicerContext, error: CallError) -> Any:
    """Ends a call as a server does: with a reason in the details, and when to ask again in the metadata."""
    metadata: list[tuple[str, str | bytes]] = []
    if error.reason:
        named = {"field": error.field} if error.field else {}
        info = status_pb2.ErrorInfo(reason=error.reason, domain="pretrade", metadata=named)
        status = status_pb2.Status(code=error.code.value[0], message=str(error))
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
        metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    if (delay := error.retry_delay_seconds) is not None:
        metadata.append((PUSHBACK, "-1" if delay == math.inf else str(math.ceil(delay * 1e3))))
    context.set_trailing_metadata(tuple(metadata))
    context.abort(error.code, str(error))


def _content(order: pb.Order) -> bytes:
    """What makes an order the same as an earlier one with its key."""
    content = pb.Order()
    content.CopyFrom(order)
    content.ClearField("timeout")
    return content.SerializeToString(deterministic=True)


def _check_order(order: pb.Order) -> None:
    """The rules that need no market.

    Raises:
        InvalidOrderError: One is broken.
    """
    if not order.instrument:
        raise _invalid("UNKNOWN_INSTRUMENT", "instrument", "must be SYMBOL.VENUE")
    if order.side not in (pb.SIDE_BUY, pb.SIDE_SELL):
        raise _invalid("UNKNOWN_SIDE", "side", "must be SIDE_BUY or SIDE_SELL")
    if not 0 < order.quantity < math.inf:
        raise _invalid("INVALID_QUANTITY", "quantity", "must be finite and > 0")
    if order.HasField("limit_price") and not 0 < order.limit_price < math.inf:
        raise _invalid("INVALID_LIMIT_PRICE", "limit_price", "must be finite and > 0")
    for field, least in (("strategy", 1), ("order_ref", 0), ("idempotency_key", 0)):
        if not least <= len(getattr(order, field)) <= _MAX_NAME:
            raise _invalid(f"INVALID_{field.upper()}", field, f"must be {least} to {_MAX_NAME} characters")


def _invalid(reason: str, field: str, rule: str) -> InvalidOrderError:
    return InvalidOrderError(f"{field}: {rule}", grpc.StatusCode.INVALID_ARGUMENT, reason=reason, field=field)
