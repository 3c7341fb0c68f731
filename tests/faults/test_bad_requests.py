"""Requests that are expired, broken or hostile: the status each gets, and that nobody else notices."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from support.harness import CAP_SECONDS, EDGE, Load, Product
from support.wire import DECIDE, STREAM, Caller, Reply, framed

from feature_cache.features import N_FEATURES
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

OK: Final = grpc.StatusCode.OK.value[0]
INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT.value[0]
EXPIRED: Final = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
UNIMPLEMENTED: Final = grpc.StatusCode.UNIMPLEMENTED.value[0]
INTERNAL: Final = grpc.StatusCode.INTERNAL.value[0]

OURS: Final = ("Traceback", "Exception", "Error(", ".py", "/pretrade", "site-packages")
"""What no caller may read."""


@pytest.fixture
def address(product: Product) -> str:
    """Of the decision port."""
    return str(product.stack.endpoints.decision)


@pytest.fixture
def bystanders(product: Product) -> Iterator[Load]:
    """Well-behaved callers beside the bad one; none of them may lose a call."""
    with Load(product, count=2) as load:
        load.wait_for_more(20)
        yield load
        load.wait_for_more(20)
    assert not load.errors
    assert pb.SOURCE_NONE not in load.sources()


def request(product: Product, **changes: object) -> bytes:
    return pb.DecideRequest(order=product.order(**changes)).SerializeToString()


def call(address: str, *args: object, **kwargs: object) -> Reply:
    """One call on a connection of its own."""
    with Caller(address) as caller:
        reply = caller.call(*args, **kwargs)  # type: ignore[arg-type]  # passed on as they are
    assert reply.ended, "no call may hang"
    assert not any(word in reply.message for word in OURS), reply.message
    return reply


def decision(reply: Reply) -> pb.Decision:
    return pb.DecideResponse.FromString(reply.body[5:]).decision


@pytest.mark.fault(
    "E3",
    "The deadline is 0, or the order's own timeout is 1 ns",
    "DEADLINE_EXCEEDED without a model call; it is counted.",
)
def test_an_order_whose_deadline_has_passed_costs_no_model_call(
    product: Product, address: str, seen: Callable[[str], None]
) -> None:
    counted = product.metric("pretrade_errors_total", reason="DEADLINE_EXPIRED")
    rows = product.replica("primary").rows + product.replica("secondary").rows
    own = framed(request(product, timeout=Duration(nanos=1)))
    for _ in range(5):
        assert call(address, own).status == EXPIRED
        for timeout in ("0m", "0S", "0n"):
            reply = call(address, framed(request(product)), extra=[("grpc-timeout", timeout)])
            assert (reply.status, reply.body) == (EXPIRED, b""), timeout
    assert product.replica("primary").rows + product.replica("secondary").rows == rows
    counted = product.metric("pretrade_errors_total", reason="DEADLINE_EXPIRED") - counted
    seen(f"20 of 20 DEADLINE_EXCEEDED, 0 rows scored; {counted:.0f} reached our code and were counted")
    assert counted >= 5


@pytest.mark.fault(
    "E3", "The deadline is 1 ms, 1 µs or 1 ns", "An answer in time or DEADLINE_EXCEEDED, never a late answer."
)
def test_a_millisecond_gets_an_answer_in_time_or_none(
    product: Product, address: str, seen: Callable[[str], None]
) -> None:
    answers = 0
    for timeout in ("1m", "1u", "1n") * 20:
        reply = call(address, framed(request(product)), extra=[("grpc-timeout", timeout)])
        assert reply.status in (OK, EXPIRED)
        if reply.status == OK:
            answers += 1
            # The gRPC library counts in whole milliseconds, rounded up.
            assert decision(reply).budget.used_us <= decision(reply).budget.allowed_us <= 2_000
    seen(f"{answers} of 60 answered in time, the others DEADLINE_EXCEEDED; gRPC rounds 1 ns up to 1 ms")


@pytest.mark.fault(
    "E3", "The caller sets no deadline, or one of a year or of 11,000 years", "The server's own cap applies."
)
def test_without_a_deadline_or_with_a_distant_one_the_cap_applies(product: Product, address: str) -> None:
    for extra in ([], [("grpc-timeout", "8760H")], [("grpc-timeout", "99999999H")], [("grpc-timeout", "9" * 99 + "S")]):
        reply = call(address, framed(request(product)), extra=extra)
        assert reply.status == OK, extra
        assert decision(reply).budget.allowed_us == pytest.approx(1e6 * CAP_SECONDS, abs=1)


@pytest.mark.fault(
    "E3", "The header `grpc-timeout` is malformed", "The transport refuses the call. Other callers are not affected."
)
def test_a_malformed_timeout_is_refused(
    product: Product, address: str, bystanders: Load, seen: Callable[[str], None]
) -> None:
    for timeout in ("", "1", "m", "-1S", "1.5S", "5x", "abc"):
        reply = call(address, framed(request(product)), extra=[("grpc-timeout", timeout)])
        assert (reply.status, reply.body) == (INTERNAL, b""), timeout
    seen("INTERNAL, said by the gRPC library before our code sees the call")


@pytest.mark.fault(
    "E4", "A request is broken, too large or makes no sense", "Each gets its exact status, and no internals are shown."
)
def test_every_broken_request_gets_its_status(
    product: Product, address: str, bystanders: Load, seen: Callable[[str], None]
) -> None:
    good = request(product)
    many = pb.FeatureVector(feature_set_id="mf1", values=[0.5] * 250_000)
    count = f"features.values: must be {N_FEATURES} values, not 250000"
    encoded = [("grpc-encoding", "gzip")]
    cases: list[tuple[str, Reply, int, str]] = [
        ("oversize", call(address, framed(b"x" * 2_000_000)), EXHAUSTED, "larger than max"),
        ("2 GB announced", call(address, framed(b"x", length=2_000_000_000)), EXHAUSTED, "larger than max"),
        ("unpacks to 50 MB", call(address, bomb(), extra=encoded), EXHAUSTED, "larger than max"),
        ("250,000 features", call(address, framed(request(product, features=many))), INVALID, count),
        ("10⁶ features", call(address, framed(million_features(good))), EXHAUSTED, "larger than max"),
        ("not UTF-8", call(address, framed(good.replace(b"test", b"t\xffst"))), INVALID, "not a valid message"),
        ("wire type 7", call(address, framed(b"\x0f\x01")), INVALID, "not a valid message"),
        ("nested 200 deep", call(address, framed(nested(200))), INVALID, "not a valid message"),
        ("empty", call(address, framed(b"")), INVALID, "instrument: "),
        ("no message", call(address, b""), INVALID, "ended before its message"),
        ("cut off", call(address, framed(good, length=len(good) + 9)), INVALID, "ended before its message"),
        ("compressed, not said how", call(address, framed(good, compressed=1)), INTERNAL, ""),
        ("not the gzip it says", call(address, framed(good, compressed=1), extra=encoded), INTERNAL, ""),
        ("unknown method", call(address, framed(good), path=f"{DECIDE}r"), UNIMPLEMENTED, "Method not found"),
        ("unknown service", call(address, framed(good), path="/a.B/C"), UNIMPLEMENTED, "Method not found"),
    ]
    for name, reply, status, message in cases:
        assert (reply.status, reply.body) == (status, b""), f"{name}: {reply}"
        assert message in reply.message, f"{name}: {reply.message}"
    seen(f"{len(cases)} kinds, each its status; both bystanders answered throughout")


@pytest.mark.fault(
    "E4",
    "A request has unknown or repeated fields, or is compressed with gzip",
    "It is decided. The last value of a repeated field counts, as protobuf prescribes.",
)
def test_what_protobuf_allows_is_decided(product: Product, address: str) -> None:
    good = request(product)
    unknown = good + b"\xfa\x7f\x05hello"
    repeated = good + pb.DecideRequest(order=pb.Order(order_ref="the second")).SerializeToString()
    packed = framed(gzip.compress(good), compressed=1)
    for reply in (call(address, framed(unknown)), call(address, packed, extra=[("grpc-encoding", "gzip")])):
        assert reply.status == OK
        assert decision(reply).order_ref == "o-1"
    assert decision(call(address, framed(repeated))).order_ref == "the second"


@pytest.mark.fault("E4", "A request never ends", "DEADLINE_EXCEEDED after the time that is allowed for sending it.")
def test_a_request_that_never_ends_does_not_hang_for_ever(
    product: Product, address: str, bystanders: Load, seen: Callable[[str], None]
) -> None:
    before = product.metric("pretrade_errors_total", reason="REQUEST_TOO_SLOW")
    with Caller(address) as caller:
        headers_only = caller.begin()
        half = caller.begin()
        caller.send(half, framed(request(product))[:9])
        started = time.monotonic()
        for stream in (headers_only, half):
            reply = caller.reply(stream)
            assert (reply.status, reply.body) == (EXPIRED, b"")
            assert reply.message == "the request's message did not arrive in time"
        seen(f"both ended after {time.monotonic() - started:.2f} s of the 1 s allowed")
        assert caller.call(framed(request(product))).status == OK, "the connection is still good"
    assert product.metric("pretrade_errors_total", reason="REQUEST_TOO_SLOW") == before + 2


@pytest.mark.fault(
    "E4",
    "A stream sends garbage after valid orders",
    "The valid orders are answered, then the stream ends with INVALID_ARGUMENT.",
)
def test_garbage_ends_a_stream_after_the_answers_due(product: Product, address: str, bystanders: Load) -> None:
    sound = framed(pb.DecideStreamRequest(order=product.order(order_ref="before")).SerializeToString())
    with Caller(address) as caller:
        stream = caller.begin(STREAM)
        caller.send(stream, sound + framed(b"\xff\xff\xff\xff"))
        reply = caller.reply(stream)
    assert reply.status == INVALID
    assert pb.DecideStreamResponse.FromString(reply.body[5:]).result.order_ref == "before"


@pytest.mark.fault(
    "E4", "A client sends bytes that are not HTTP/2", "The connection is closed. Other callers are not affected."
)
def test_a_connection_that_does_not_speak_http2_is_closed(product: Product, address: str, bystanders: Load) -> None:
    other = b"GET / HTTP/1.1\r\n\r\n" if EDGE == "grpcio" else b"GET /\r\n\r\n"  # Envoy speaks HTTP/1.1 as well
    for garbage in (other, b"\x16\x03\x01\x02\x00\x01" * 40, b"\x00" * 500):
        with Caller(address, hello=False) as caller:
            caller.socket.sendall(garbage)
            while caller.socket.recv(65_536):
                pass


def bomb() -> bytes:
    """50 MB of zeros in 50 kB."""
    return framed(gzip.compress(bytes(50_000_000)), compressed=1)


def million_features(good: bytes) -> bytes:
    """An order with 10⁶ features, packed."""
    vector = pb.FeatureVector(feature_set_id="mf1", values=[0.5] * 1_000_000)
    return good + pb.DecideRequest(order=pb.Order(features=vector)).SerializeToString()


def nested(depth: int) -> bytes:
    """Groups in groups in an unknown field, deeper than protobuf goes."""
    return b"\xfb\x07" * depth + b"\xfc\x07" * depth
