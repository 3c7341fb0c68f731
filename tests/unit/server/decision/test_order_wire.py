"""Plain orders, read without the generated classes: what is read is what `OrderReader` reads, and nothing else is."""

from __future__ import annotations

import math

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from support.twins import compiled_here

from fallback.order import Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader
from server.errors import InvalidOrderError

INSTRUMENTS = ("BTCUSDT.BINANCE", "ÉTÉ.X")
READER = OrderReader(INSTRUMENTS)
NAMES = {name.encode(): name for name in INSTRUMENTS}

names = st.text(max_size=70)
numbers = st.sampled_from((1.0, 0.5, 0.0, -1.0, math.inf, math.nan, 1e-300)) | st.floats()


def read_plain(serialized: bytes) -> Order | None:
    order: Order | None = compiled_here("server.decision.order_wire_c").read_request(serialized, NAMES)
    return order


@st.composite
def requests(draw: st.DrawFn) -> pb.DecideRequest:
    """Any request: more often than not a plain one."""
    order = pb.Order(
        order_ref=draw(names),
        instrument=draw(st.sampled_from((*INSTRUMENTS, "OTHER.X"))),
        side=draw(st.sampled_from((pb.SIDE_BUY, pb.SIDE_SELL, pb.SIDE_UNSPECIFIED))),
        quantity=draw(numbers),
        strategy=draw(names),
        reduce_only=draw(st.booleans()),
    )
    if draw(st.booleans()):
        order.limit_price = draw(numbers)
    if draw(st.booleans()):
        order.timeout.seconds = draw(st.integers(-2, 2**63 - 1) | st.integers(315_575_999_999, 315_576_000_001))
        order.timeout.nanos = draw(st.integers(-5, 999_999_999) | st.integers(999_999_999, 2**31 - 1))
    if draw(st.integers(0, 9)) == 0:
        order.idempotency_key = draw(names)
    if draw(st.integers(0, 9)) == 0:
        order.features.feature_set_id = "mf1"
    return pb.DecideRequest(order=order, explain=draw(st.integers(0, 9)) == 0)


def check(serialized: bytes) -> None:
    """If it is read as plain, `OrderReader` reads the same."""
    plain = read_plain(serialized)
    if plain is None:
        return
    message = pb.DecideRequest.FromString(serialized)
    assert not message.explain
    read = READER.read(message.order)
    assert plain.message == message.order
    plain.wire = read.wire  # the same, perhaps in another order of its fields
    assert repr(plain) == repr(read)  # NaN is not equal to itself


@given(requests())
def test_what_is_read_is_what_the_reader_of_messages_reads(request: pb.DecideRequest) -> None:
    check(request.SerializeToString())


@given(requests())
def test_every_order_that_is_valid_and_plain_is_read(request: pb.DecideRequest) -> None:
    order = request.order
    try:
        READER.read(order)
    except InvalidOrderError:
        return
    is_plain = not (request.explain or order.idempotency_key or order.HasField("features"))
    assert (read_plain(request.SerializeToString()) is not None) == is_plain


@given(requests(), st.data())
def test_broken_bytes_are_never_read_as_something_else(request: pb.DecideRequest, data: st.DataObject) -> None:
    serialized = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(serialized)))
        kind = data.draw(st.sampled_from(("cut", "change", "insert")))
        if kind == "cut":
            del serialized[place:]
        elif kind == "insert":
            serialized.insert(place, data.draw(st.integers(0, 255)))
        elif place < len(serialized):
            serialized[place] = data.draw(st.integers(0, 255))
    check(bytes(serialized))


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_left(serialized: bytes) -> None:
    try:
        pb.DecideRequest.FromString(serialized)
    except DecodeError:
        assert read_plain(serialized) is None
    else:
        check(serialized)


def test_a_field_that_comes_twice_is_left_to_the_reader_of_messages() -> None:
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="s")
    once = pb.DecideRequest(order=order).SerializeToString()
    assert read_plain(once) is not None
    assert read_plain(once + once) is None
    twice = pb.DecideRequest.FromString(once).order.SerializeToString() + pb.Order(quantity=2.0).SerializeToString()
    assert read_plain(b"\x0a" + bytes([len(twice)]) + twice) is None


@pytest.mark.parametrize("explain", [False, True])
def test_without_a_compiled_twin_every_request_is_a_message(explain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="s")
    request = pb.DecideRequest(order=order, explain=explain)
    monkeypatch.setattr("server.decision.convert._compiled", None)
    assert READER.request(request.SerializeToString()) == request


@given(st.lists(requests(), max_size=4))
def test_the_orders_of_a_batch_are_read_as_those_of_calls(asked: list[pb.DecideRequest]) -> None:
    batch = pb.DecideBatchRequest(orders=[request.order for request in asked])
    found = compiled_here("server.decision.order_wire_c").read_batch(batch.SerializeToString(), NAMES)
    assert len(found) == len(asked)
    for request, one in zip(asked, found, strict=True):
        plain = read_plain(pb.DecideRequest(order=request.order).SerializeToString())
        if plain is None:
            assert pb.Order.FromString(one) == request.order
        else:
            assert repr(one) == repr(plain)
    read = READER.batch(batch.SerializeToString())
    assert [one.message if isinstance(one, Order) else one for one in read] == list(batch.orders)


@given(st.lists(requests(), min_size=1, max_size=2), st.data())
def test_broken_bytes_of_a_batch_are_read_as_messages_are(asked: list[pb.DecideRequest], data: st.DataObject) -> None:
    serialized = bytearray(pb.DecideBatchRequest(orders=[request.order for request in asked]).SerializeToString())
    place = data.draw(st.integers(0, len(serialized) - 1))
    serialized[place] = data.draw(st.integers(0, 255))
    try:
        message = pb.DecideBatchRequest.FromString(bytes(serialized))
    except DecodeError:
        with pytest.raises(DecodeError):
            READER.batch(bytes(serialized))
        return
    read = READER.batch(bytes(serialized))
    assert [one.message if isinstance(one, Order) else one for one in read] == list(message.orders)


def test_the_order_of_a_streams_request_is_read_as_that_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pb.Order(order_ref="a", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="s")
    keyed = pb.Order(idempotency_key="k", order_ref="b", instrument=INSTRUMENTS[0], quantity=1.0)
    monkeypatch.setattr("server.decision.convert._compiled", compiled_here("server.decision.order_wire_c"))
    first = READER.streamed(pb.DecideStreamRequest(order=plain).SerializeToString())
    assert isinstance(first, Order)
    assert first.message == plain
    assert READER.streamed(pb.DecideStreamRequest(order=keyed).SerializeToString()) == keyed
