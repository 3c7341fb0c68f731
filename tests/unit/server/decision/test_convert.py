"""Every rule an order must keep, with the field and the reason the caller hears."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache import features
from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import Registered
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader, order_timeout_seconds
from server.errors import InvalidOrderError

READER = OrderReader(["BTCUSDT.BINANCE"])
HUGE = "x" * 10_000


def order() -> pb.Order:
    """An order that keeps every rule."""
    return pb.Order(
        order_ref="ref",
        instrument="BTCUSDT.BINANCE",
        side=pb.SIDE_SELL,
        quantity=0.5,
        limit_price=100,
        strategy="alpha",
    )


def with_features(values: list[float], feature_set_id: str = "mf1") -> Callable[[pb.Order], None]:
    def change(message: pb.Order) -> None:
        message.features.feature_set_id = feature_set_id
        message.features.values[:] = values

    return change


def setting(**fields: object) -> Callable[[pb.Order], None]:
    def change(message: pb.Order) -> None:
        for name, value in fields.items():
            setattr(message, name, value)

    return change


def test_a_valid_order_is_read() -> None:
    message = order()
    read = READER.read(message)
    assert read.message == message
    assert (read.instrument, read.side, read.quantity, read.limit_price) == ("BTCUSDT.BINANCE", pb.SIDE_SELL, 0.5, 100)
    assert (read.strategy, read.reduce_only, read.caller_features) == ("alpha", False, None)


def test_an_order_without_a_limit_price_is_a_market_order() -> None:
    message = order()
    message.ClearField("limit_price")
    assert math.isnan(READER.read(message).limit_price)


def test_the_callers_features_are_read_as_they_are() -> None:
    message = order()
    values = [number / features.N_FEATURES for number in range(features.N_FEATURES)]
    with_features(values)(message)
    own = READER.read(message).caller_features
    assert own is not None
    assert own.dtype == np.float32
    assert own.tolist() == pytest.approx(values)


FINITE = [0.0] * features.N_FEATURES


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        (setting(instrument=""), "UNKNOWN_INSTRUMENT", "instrument"),
        (setting(instrument="DOGEUSDT.BINANCE"), "UNKNOWN_INSTRUMENT", "instrument"),
        (setting(instrument="btcusdt.binance"), "UNKNOWN_INSTRUMENT", "instrument"),
        (setting(instrument=HUGE), "UNKNOWN_INSTRUMENT", "instrument"),
        (setting(side=pb.SIDE_UNSPECIFIED), "UNKNOWN_SIDE", "side"),
        (setting(side=7), "UNKNOWN_SIDE", "side"),
        (setting(quantity=0.0), "INVALID_QUANTITY", "quantity"),
        (setting(quantity=-0.0), "INVALID_QUANTITY", "quantity"),
        (setting(quantity=-1.0), "INVALID_QUANTITY", "quantity"),
        (setting(quantity=math.nan), "INVALID_QUANTITY", "quantity"),
        (setting(quantity=math.inf), "INVALID_QUANTITY", "quantity"),
        (setting(limit_price=0.0), "INVALID_LIMIT_PRICE", "limit_price"),
        (setting(limit_price=-1.0), "INVALID_LIMIT_PRICE", "limit_price"),
        (setting(limit_price=math.nan), "INVALID_LIMIT_PRICE", "limit_price"),
        (setting(limit_price=math.inf), "INVALID_LIMIT_PRICE", "limit_price"),
        (setting(strategy=""), "INVALID_STRATEGY", "strategy"),
        (setting(strategy="x" * 65), "INVALID_STRATEGY", "strategy"),
        (setting(order_ref="x" * 65), "INVALID_ORDER_REF", "order_ref"),
        (setting(idempotency_key="x" * 65), "INVALID_IDEMPOTENCY_KEY", "idempotency_key"),
        (with_features(FINITE, ""), "UNKNOWN_FEATURE_SET", "features.feature_set_id"),
        (with_features(FINITE, "mf2"), "UNKNOWN_FEATURE_SET", "features.feature_set_id"),
        (with_features(FINITE, HUGE), "UNKNOWN_FEATURE_SET", "features.feature_set_id"),
        (with_features([]), "WRONG_FEATURE_COUNT", "features.values"),
        (with_features(FINITE[1:]), "WRONG_FEATURE_COUNT", "features.values"),
        (with_features([0.0] * 10_000), "WRONG_FEATURE_COUNT", "features.values"),
        (with_features([math.nan, *FINITE[1:]]), "NON_FINITE_FEATURE", "features.values[0]"),
        (with_features([*FINITE[1:], math.inf]), "NON_FINITE_FEATURE", f"features.values[{len(FINITE) - 1}]"),
        (with_features([*FINITE[:3], -math.inf, *FINITE[4:]]), "NON_FINITE_FEATURE", "features.values[3]"),
    ],
)
def test_a_broken_rule_is_named_with_its_field(change: Callable[[pb.Order], None], reason: str, field: str) -> None:
    message = order()
    change(message)
    with pytest.raises(InvalidOrderError) as caught:
        READER.read(message)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 200, "a caller's text is not thrown back at full length"


@pytest.mark.parametrize("index", range(features.N_FEATURES))
def test_a_feature_outside_of_what_its_definition_leaves_possible_is_named(index: int) -> None:
    feature = features.MF1.features[index]
    for limit, beyond in ((feature.lowest, -math.inf), (feature.highest, math.inf)):
        message = order()
        if math.isinf(limit):
            with_features([*FINITE[:index], math.copysign(1e30, limit), *FINITE[index + 1 :]])(message)
            READER.read(message)
            continue
        with_features([*FINITE[:index], limit, *FINITE[index + 1 :]])(message)
        READER.read(message)
        message.features.values[index] = np.nextafter(np.float32(limit), np.float32(beyond))
        with pytest.raises(InvalidOrderError) as caught:
            READER.read(message)
        assert (caught.value.reason, caught.value.field) == ("IMPOSSIBLE_FEATURE", f"features.values[{index}]")
        assert f" {feature.name} must be " in str(caught.value)
        assert f" {limit:g}" in str(caught.value)


def test_the_range_of_a_feature_that_carries_a_direction_holds_for_both_sides() -> None:
    assert all(one.lowest == -one.highest for one in features.MF1.features if one.signed)


def test_names_of_64_characters_are_fine() -> None:
    message = order()
    setting(strategy="ü" * 64, order_ref="x" * 64, idempotency_key="x" * 64)(message)
    assert READER.read(message).strategy == "ü" * 64


@pytest.mark.parametrize(
    ("seconds", "nanos", "expected"), [(1, 500_000_000, 1.5), (0, 1, 1e-9), (315_576_000_000, 0, 315_576_000_000)]
)
def test_an_orders_own_timeout_is_read(seconds: int, nanos: int, expected: float) -> None:
    message = order()
    message.timeout.seconds, message.timeout.nanos = seconds, nanos
    assert order_timeout_seconds(message) == expected


def test_an_order_without_a_timeout_has_none() -> None:
    assert order_timeout_seconds(order()) is None


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [
        *((0, 0), (-1, 0), (0, -1)),
        *((1, -1), (-1, 2_000_000_000), (0, 1_000_000_000), (315_576_000_001, 0)),
        (2**63 - 1, 1_000_000_000),
    ],
)
def test_a_timeout_that_is_not_positive_or_no_duration_is_refused(seconds: int, nanos: int) -> None:
    message = order()
    message.timeout.seconds, message.timeout.nanos = seconds, nanos
    with pytest.raises(InvalidOrderError) as caught:
        order_timeout_seconds(message)
    assert (caught.value.reason, caught.value.field) == ("INVALID_TIMEOUT", "timeout")


any_float = st.floats(allow_nan=True, allow_infinity=True)


@given(
    message=st.builds(
        pb.Order,
        order_ref=st.text(max_size=70),
        instrument=st.sampled_from(["BTCUSDT.BINANCE", "", "X"]),
        side=st.integers(-1, 3),
        quantity=any_float,
        limit_price=st.one_of(st.none(), any_float),
        strategy=st.text(max_size=70),
        idempotency_key=st.text(max_size=70),
        features=st.one_of(
            st.none(),
            st.builds(
                pb.FeatureVector,
                feature_set_id=st.sampled_from(["mf1", ""]),
                values=st.lists(st.floats(width=32), min_size=features.N_FEATURES, max_size=features.N_FEATURES),
            ),
        ),
    )
)
def test_whatever_an_order_holds_it_is_refused_or_keeps_every_rule(message: pb.Order) -> None:
    try:
        read = READER.read(message)
    except InvalidOrderError:
        return
    assert read.instrument == "BTCUSDT.BINANCE"
    assert read.side in (pb.SIDE_BUY, pb.SIDE_SELL)
    assert 0 < read.quantity < math.inf
    assert math.isnan(read.limit_price) or 0 < read.limit_price < math.inf
    assert 1 <= len(read.strategy) <= 64
    assert read.caller_features is None or np.isfinite(read.caller_features).all()
    assert read.caller_features is None or (read.caller_features >= features.MF1.lowest).all()


def test_a_vector_of_another_set_is_for_its_models_alone_and_may_leave_features_to_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    know(monkeypatch, REGISTERED)
    message = order()
    with_features([math.nan, math.nan, 0.5], "mixed")(message)
    read = READER.read(message)
    assert read.caller_features is None, "rules and guards keep the server's own"
    assert read.brought is not None
    assert read.brought.feature_set is MIXED
    assert read.brought.values[2] == np.float32(0.5)
    assert np.isnan(read.brought.values[:2]).all()
    assert read.brings_features


def test_what_a_set_does_not_let_a_caller_leave_out_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = FeatureSet("strict", (Feature("urgency", "", "Brought.", source=CALLER, may_be_undefined=False),))
    know(monkeypatch, REGISTERED, Registered(strict, None, "the tests"))
    for values, feature_set_id, reason, field in (
        ([math.nan], "strict", "NON_FINITE_FEATURE", "features.values[0]"),
        ([math.nan, math.inf, 0.5], "mixed", "NON_FINITE_FEATURE", "features.values[1]"),
        ([math.nan, -1.0, 0.5], "mixed", "IMPOSSIBLE_FEATURE", "features.values[1]"),
        ([0.0] * 4, "mixed", "WRONG_FEATURE_COUNT", "features.values"),
        ([0.0], "other", "UNKNOWN_FEATURE_SET", "features.feature_set_id"),
    ):
        message = order()
        with_features(values, feature_set_id)(message)
        with pytest.raises(InvalidOrderError) as caught:
            READER.read(message)
        assert (caught.value.reason, caught.value.field) == (reason, field)
    assert "must be 'mf1' or 'mixed' or 'strict', not 'other'" in str(caught.value)
