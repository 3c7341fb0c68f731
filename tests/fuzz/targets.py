"""What is fuzzed, and what must hold for any input. A target raises only when that is broken."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from support.fake_envoy import fake_envoy_here

from fallback.order import Order
from local.bench.fake_envoy import DROP, PLAIN, STOP
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader, order_timeout_seconds
from server.decision.metrics import DecisionMetrics
from server.envoy.asgi import GrpcApplication
from server.errors import InvalidOrderError, PretradeError
from server.http import problems, query, transcoding
from server.rpc import status
from server.rpc.framing import call_headers, decompressed, framed, message_length, status_headers

_INSTRUMENT: Final = "BTCUSDT.SIM"
_MAX_BYTES: Final = 4_096
_NAMES: Final = (b"grpc-timeout", b"grpc-encoding", b"content-type", b"te", b"x-correlation-id", b"traceparent")
_ENCODINGS: Final = (b"identity", b"gzip", b"deflate", b"br", b"")


class Bytes:
    """Takes an input apart, piece by piece; an input that is used up goes on with zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, below: int) -> int:
        """From 0 to below that."""
        found = int.from_bytes(self.take(2), "little")
        return found % below

    def take(self, size: int) -> bytes:
        """So many bytes."""
        found = self._data[self._at : self._at + size]
        self._at += size
        return found + bytes(size - len(found))

    def piece(self, most: int) -> bytes:
        """Some bytes that are there."""
        size = min(self.number(most + 1), max(0, len(self._data) - self._at))
        return self.take(size)

    def rest(self) -> bytes:
        """All that is left."""
        return self.piece(len(self._data))


def _headers(source: Bytes) -> list[tuple[bytes, bytes]]:
    return [(_NAMES[source.number(len(_NAMES))], source.piece(40)) for _ in range(source.number(5))]


def framing(data: bytes) -> None:
    """Headers, lengths and compressed messages are read, or refused with a status that can be sent."""
    source = Bytes(data)
    try:
        found = call_headers(_headers(source))
    except PretradeError as refused:
        _check_status(refused)
    else:
        assert found.timeout is None or found.timeout >= 0.0
    encoding = _ENCODINGS[source.number(len(_ENCODINGS))]
    payload = source.rest()
    assert message_length(framed(payload)) == len(payload)
    try:
        plain = decompressed(payload, encoding, _MAX_BYTES)
    except PretradeError as refused:
        _check_status(refused, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED)
    else:
        assert len(plain) <= _MAX_BYTES + 1


def _check_status(error: PretradeError, *among: grpc.StatusCode) -> None:
    """An error has a status that can be sent: one of these, where any are given."""
    code, details, trailing_metadata = status.of(error)
    assert not among or code in among
    assert status_headers(code, details, trailing_metadata)


def orders(data: bytes) -> None:
    """An order is read whole, with every number in its range, or refused with the field and the rule."""
    try:
        message = pb.Order.FromString(data)
    except DecodeError:
        return
    for one in (message, _usable(message)):
        try:
            timeout = order_timeout_seconds(one)
            order = OrderReader((_INSTRUMENT,)).read(one)
        except InvalidOrderError as error:
            _check_status(error)
            continue
        assert timeout is None or timeout > 0
        plain = OrderReader((_INSTRUMENT,)).request(pb.DecideRequest(order=one).SerializeToString())
        if isinstance(plain, Order):
            assert plain.message == one
            assert repr(replace(plain, wire=order.wire)) == repr(order)
        assert 0 < order.quantity < math.inf
        assert math.isnan(order.limit_price) or 0 < order.limit_price < math.inf
        if order.caller_features is not None:
            assert all(map(math.isfinite, order.caller_features.tolist()))


def _usable(message: pb.Order) -> pb.Order:
    """The same order, as far as it passes the first rules: those behind them are to be reached as well."""
    usable = pb.Order()
    usable.CopyFrom(message)
    usable.instrument = _INSTRUMENT
    usable.side = pb.SIDE_BUY
    if not 0 < usable.quantity < math.inf:
        usable.quantity = 1.0
    usable.strategy = usable.strategy[:64] or "s"
    return usable


def asgi(data: bytes) -> None:
    """Every call ends, with one status or with a caller who has gone, and nothing fails unexpectedly."""
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(_call(Bytes(data)), 5.0))
    finally:
        loop.close()


class _Nobody:
    """Wants to know nothing of what becomes of answers."""

    def sent(self, answer: object) -> None: ...
    def not_sent(self, answer: object) -> None: ...


async def _call(source: Bytes) -> None:
    metrics = DecisionMetrics()
    application = GrpcApplication(_MAX_BYTES, 1.0, _Nobody(), metrics, asyncio.get_running_loop().time, lambda: 0.0)
    reader = OrderReader((_INSTRUMENT,))

    async def one(request: pb.DecideRequest, _context: Any) -> bytes:
        return _read(reader, request.order)

    async def many(requests: Any, _context: Any) -> Any:
        async for request in requests:
            yield _read(reader, request.order)

    handlers: dict[str, Any] = {
        "Decide": grpc.unary_unary_rpc_method_handler(one, pb.DecideRequest.FromString, bytes),
        "DecideStream": grpc.stream_stream_rpc_method_handler(many, pb.DecideStreamRequest.FromString, bytes),
    }
    application.add_registered_method_handlers("s", handlers)
    path = ("/s/Decide", "/s/DecideStream", "/s/None", source.piece(20).decode("latin-1"))[source.number(4)]
    headers = [(b"content-type", b"application/grpc"), *_headers(source)]
    parts = [_part(source) for _ in range(source.number(6))]
    leaves = source.number(3) == 0
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            body = parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(parts) or leaves}
        if leaves:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    # As pyvoy does it: a task for each call, which the application may cancel when the caller has gone.
    scope = {"type": "http", "path": path, "headers": headers}
    task = asyncio.ensure_future(application(scope, receive, send))
    await asyncio.wait((task,))
    assert task.cancelled() or task.exception() is None
    assert not application.in_flight
    assert not metrics.errors["INTERNAL"], "the call failed"
    statuses = Counter(name for message in sent for name, _ in message.get("headers", ()) if name == b"grpc-status")
    assert statuses[b"grpc-status"] == 1 or (leaves and statuses[b"grpc-status"] == 0)


def _read(reader: OrderReader, message: pb.Order) -> bytes:
    try:
        reader.read(message)
    except InvalidOrderError:
        return b"refused"
    return b"read"


def _part(source: Bytes) -> bytes:
    """A part of a body: framed properly, or not."""
    payload = source.piece(60)
    match source.number(4):
        case 0:
            return framed(pb.DecideRequest(order=pb.Order(instrument=_INSTRUMENT)).SerializeToString())
        case 1:
            return b"\1" + framed(payload)[1:]
        case 2:
            return payload
        case _:
            return framed(payload)


def requests_in_json(data: bytes) -> None:
    """A request in JSON is read whole and can be written down again, or refused with an answer that is JSON."""
    for kind in (pb.DecideRequest, pb.DecideBatchRequest):
        try:
            request: Any = asyncio.run(transcoding.request_of(data, kind))
        except InvalidOrderError as error:
            _check_refusal(error)
            continue
        again = asyncio.run(transcoding.request_of(asyncio.run(transcoding.answer_of(request)), kind))
        assert again.SerializeToString(deterministic=True) == request.SerializeToString(deterministic=True)


def queries(data: bytes) -> None:
    """The query of a GET is a request in JSON, which is read, or refused as such."""
    for kind in (audit_pb2.WatchDecisionsRequest, admin_pb2.WatchFeaturesRequest, admin_pb2.ListSignalsRequest):
        try:
            document = query.document_of(data, kind.DESCRIPTOR)
            request: Any = asyncio.run(transcoding.request_of(json.dumps(document).encode(), kind))
        except InvalidOrderError as error:
            _check_refusal(error)
            continue
        again = asyncio.run(transcoding.request_of(asyncio.run(transcoding.answer_of(request)), kind))
        assert again.SerializeToString(deterministic=True) == request.SerializeToString(deterministic=True)


def _check_refusal(error: InvalidOrderError) -> None:
    """A request is refused with an answer that is JSON."""
    _check_status(error, grpc.StatusCode.INVALID_ARGUMENT)
    refusal = problems.refusal(error)
    assert refusal.http_status == 400
    assert json.loads(refusal.body)["detail"]


def lane(data: bytes) -> None:
    """The lane takes a whole plain message as it is, or has everything go on; what it takes ends once, whoever goes.

    The filter is compiled, so that the fuzzer does not see its branches: it learns from what comes of an input.
    """
    source = Bytes(data)
    envoy = fake_envoy_here()
    envoy.filter.open_lane()
    names = [_LANE_NAMES[source.number(len(_LANE_NAMES))] for _ in range(source.number(6))]
    more = [(name, source.piece(40).replace(b"\n", b"")) for name in names]  # the fake ends a header there
    request = envoy.request(*more)
    body = b"".join(_part(source) for _ in range(source.number(3)))
    piece, cut = 1 + source.number(64), source.number(len(body) + 1)
    held = request.headers() == STOP
    said = request.body(body[:cut], piece, end=False) if cut else STOP
    said = request.body(body[cut:], piece) if said == STOP else said
    arrived, ended = envoy.filter.take()
    assert len(arrived) == (held and said == DROP)
    assert held == all(_goes_along(*header) for header in more)
    for call in arrived:
        assert framed(call.message) == body
        assert set(call.headers) <= {*more, *((name.encode(), value.encode()) for name, value in PLAIN.items())}
        timeout, *_ = call_headers(call.headers)
        assert (call.deadline is None) == (timeout is None)
        assert timeout is None or math.isclose(call.deadline - call.arrived, timeout, abs_tol=1e-9)
        if leaves := source.number(5):
            request.leave(after=leaves)
        else:
            request.leave()
        head = envoy.filter.packed([(b":status", b"200"), *status_headers(grpc.StatusCode.OK, source.piece(20).hex())])
        call.answer(head, source.piece(60), envoy.filter.packed([]))
    envoy.run()
    request.forget()
    ended += envoy.filter.take()[1]
    assert [call for call, _ in ended] == arrived


_LANE_NAMES: Final = (*_NAMES[:1], *_NAMES[4:], b"authorization", b"x-pretrade-peer", b"user-agent", b"pretrade-other")
_TIMEOUT: Final = re.compile(rb"[0-9]{1,8}[HMSmun]")


def _goes_along(name: bytes, value: bytes) -> bool:
    """Whether a plain call may have a header besides those that all have."""
    return name != b"pretrade-other" and (name != b"grpc-timeout" or bool(_TIMEOUT.fullmatch(value)))


TARGETS: Final[Mapping[str, Callable[[bytes], None]]] = {
    "framing": framing,
    "orders": orders,
    "asgi": asgi,
    "json": requests_in_json,
    "query": queries,
    "lane": lane,
}
