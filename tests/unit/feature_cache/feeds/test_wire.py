"""Exact decimals and times out of the venues' text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@given(st.integers(0, wire.MAX_FIXED), st.integers(0, 18), st.integers(0, 18))
def test_decimals_are_scaled_exactly_or_refused(value: int, written: int, decimals: int) -> None:
    exact = Decimal(value).scaleb(-written)
    text = format(exact, "f")
    scaled = exact * Decimal(10) ** decimals
    if scaled == int(scaled) and scaled <= wire.MAX_FIXED:
        assert wire.fixed(text, "x", decimals) == scaled
        assert wire.number(exact, "x", decimals) == scaled
        assert wire.number(Decimal(str(exact)), "x", decimals) == scaled, "an exponent is no rounding"
    else:
        with pytest.raises(FeedError, match=r"decimals|digits"):
            wire.fixed(text, "x", decimals)
        with pytest.raises(FeedError, match=r"decimals|digits"):
            wire.number(exact, "x", decimals)


@pytest.mark.parametrize(
    "text", ["", ".", "1.", ".5", "-1", "+1", "1e3", "1_0", " 1", "1\n", "0x1", "١", "NaN", "inf", "1.2.3", "1" * 19]
)
def test_other_spellings_of_a_number_are_refused(text: str) -> None:
    with pytest.raises(FeedError, match="x: "):
        wire.fixed(text, "x", 8)
    with pytest.raises(FeedError, match="x: "):
        wire.decimals_of(text, "x")


@pytest.mark.parametrize(
    "value",
    [
        Decimal("NaN"),
        Decimal("Infinity"),
        Decimal("1e999999"),
        Decimal("1e-999999"),
        Decimal("1" * 200),
        10**18,
        -1,
        Decimal("-0.5"),
        True,
        "1",
        1.5,
        None,
    ],
)
def test_a_number_out_of_range_is_refused_quickly(value: object) -> None:
    with pytest.raises(FeedError, match="x: "):
        wire.number(value, "x", 8)  # type: ignore[arg-type]


@given(st.datetimes(datetime(1970, 1, 2), datetime(2254, 12, 31)))  # noqa: DTZ001 — made aware below
def test_both_spellings_of_a_time_are_the_same_instant(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    microseconds = (aware - _EPOCH) // timedelta(microseconds=1)
    assert wire.rfc3339_ns(aware.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "t") == microseconds * 1_000
    seconds, fraction = divmod(microseconds, 10**6)
    assert wire.epoch_seconds_ns(f"{seconds}.{fraction:06d}", "t") == microseconds * 1_000


@pytest.mark.parametrize(
    "text",
    [
        "2021-04-17T16:43:37",
        "2021-04-17T16:43:37+00:00",
        "2021-04-17 16:43:37Z",
        "2021-00-17T16:43:37Z",
        "2021-02-29T16:43:37Z",
        "2021-04-32T16:43:37Z",
        "2021-04-17T24:43:37Z",
        "2021-04-17T16:43:37.0000000001Z",
        "1969-12-31T23:59:59Z",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        1,
        None,
    ],
)
def test_what_is_no_time_in_utc_is_refused(text: object) -> None:
    with pytest.raises(FeedError, match="t: "):
        wire.rfc3339_ns(text, "t")


@pytest.mark.parametrize("text", ["", "0", "9999999999", "1618678142.", "1618678142.0000000001", "-1", 1.5])
def test_what_is_no_time_in_seconds_is_refused(text: object) -> None:
    with pytest.raises(FeedError, match="t: "):
        wire.epoch_seconds_ns(text, "t")
