"""What the venues' messages have in common: exact decimals, times as text, and times that are missing."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import orjson

from feature_cache.engine.lag import MinimumLag
from pretrade.market.v1 import market_pb2 as pb

MAX_FIXED: Final = 10**18 - 1
"""Largest price or size: 18 digits, which leaves room to add up a few of them in 64 bits."""

_DECIMAL: Final = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?", re.ASCII)
_EPOCH_SECONDS: Final = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,9}))?", re.ASCII)
_RFC3339: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?Z", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)
_LATEST_SECONDS: Final = 9_000_000_000  # the year 2255; its nanoseconds still fit in int64
_LATEST_MS: Final = 1000 * _LATEST_SECONDS
_MAX_TEXT: Final = 37  # 18 digits, a point, 18 digits
_MAX_HELD: Final = 10_000
_MAX_SHIFT: Final = 100
_PAST_NS: Final = 10_000_000_000


class FeedError(ValueError):
    """A message that is not what the venue documents.

    Attributes:
        field: The field at fault, for example `data.b`; `message` when the whole is.
        rule: The rule it breaks.
    """

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule


def new_event(instrument: str, price_decimals: int, size_decimals: int, receive_time_ns: int) -> pb.MarketEvent:
    """An event that is published as it is received, without a body or an event time."""
    return pb.MarketEvent(
        instrument=instrument,
        price_decimals=price_decimals,
        size_decimals=size_decimals,
        receive_time_ns=receive_time_ns,
        publish_time_ns=receive_time_ns,
    )


def json_object(message: bytes | str) -> dict[str, Any]:
    """A message that is one JSON object.

    Raises:
        FeedError: It is not.
    """
    try:
        body = orjson.loads(message)
    except orjson.JSONDecodeError as error:
        raise FeedError("message", f"is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise FeedError("message", "must be a JSON object")
    return body


def fixed(text: Any, field: str, decimals: int) -> int:
    """The decimal string times 10^decimals, exactly.

    Raises:
        FeedError: Not a decimal string of at most that many decimals, or above MAX_FIXED.
    """
    # No regular expression: this runs for every price and size of every update, in two thirds of its time.
    if type(text) is not str or len(text) > _MAX_TEXT:
        raise FeedError(field, f"{text!r:.40} is not a decimal string")
    whole, point, fraction = text.partition(".")
    digits = whole + fraction
    if not (whole and digits.isascii() and digits.isdigit()) or (point and not fraction):
        raise FeedError(field, f"{text!r:.40} is not a decimal string")
    missing = decimals - len(fraction)
    if missing > 0:
        digits += "0" * missing
    elif missing < 0:
        if fraction[decimals:].strip("0"):
            raise FeedError(field, f"{text!r:.40} has more than {decimals} decimals")
        digits = whole + fraction[:decimals]
    value = int(digits)
    if value > MAX_FIXED:
        raise FeedError(field, f"{text!r:.40} does not fit in 18 digits")
    return value


def decimals_of(text: Any, field: str) -> int:
    """How many decimals a decimal string carries.

    Raises:
        FeedError: Not a decimal string.
    """
    match = _DECIMAL.fullmatch(text) if type(text) is str else None
    if match is None:
        raise FeedError(field, f"{text!r:.40} is not a decimal string")
    return len(match[2] or "")


def positive(text: Any, field: str, decimals: int) -> int:
    """`fixed`, and above 0."""
    value = fixed(text, field, decimals)
    if not value:
        raise FeedError(field, "must be above 0")
    return value


def number(value: int | Decimal, field: str, decimals: int) -> int:
    """A JSON number times 10^decimals, exactly.

    Args:
        value: As parsed without rounding: `json.loads(message, parse_float=Decimal)`.
        field: Named by the error.
        decimals: How many decimals the result has.

    Raises:
        FeedError: Not a number of at most that many decimals, from 0 to MAX_FIXED.
    """
    if type(value) is int:
        digits, exponent = value, 0
    elif type(value) is Decimal and value.is_finite():
        sign, parts, power = value.as_tuple()
        assert isinstance(power, int)
        if len(parts) > _MAX_SHIFT:
            raise FeedError(field, f"{value!s:.40} has too many digits")
        digits, exponent = (-1 if sign else 1) * int("".join(map(str, parts))), power
    else:
        raise FeedError(field, f"{value!r:.40} is not a number")
    shift = exponent + decimals
    if digits < 0:
        raise FeedError(field, "must not be negative")
    if not digits:
        return 0
    if not -_MAX_SHIFT < shift < _MAX_SHIFT:
        raise FeedError(field, f"{value!s:.40} is out of range")
    unit: int = 10 ** abs(shift)
    scaled, rest = (digits * unit, 0) if shift >= 0 else divmod(digits, unit)
    if rest:
        raise FeedError(field, f"{value!s:.40} has more than {decimals} decimals")
    if scaled > MAX_FIXED:
        raise FeedError(field, f"{value!s:.40} does not fit in 18 digits")
    return scaled


def whole(body: dict[str, Any], field: str) -> int:
    """The positive integer in a field.

    Raises:
        KeyError: The field is missing.
        FeedError: It is not an integer from 1 to MAX_FIXED.
    """
    value = body[field]
    if type(value) is not int or not 0 < value <= MAX_FIXED:
        raise FeedError(field, f"{value!r:.40} is not a positive integer of at most 18 digits")
    return value


def levels(body: dict[str, Any], field: str, decimals: int) -> tuple[list[int], list[int]]:
    """Ticks and lots of a list of [price, size], both with `decimals` decimals.

    Raises:
        KeyError: The field is missing.
        FeedError: It is no such list, or holds what is no price or size.
    """
    entries = body[field]
    if type(entries) is not list:
        raise FeedError(field, "must be a list of [price, size]")
    try:
        return [fixed(price, field, decimals) for price, _ in entries], [
            fixed(size, field, decimals) for _, size in entries
        ]
    except (TypeError, ValueError) as error:
        if isinstance(error, FeedError):
            raise
        raise FeedError(field, "must be a list of [price, size]") from error


def epoch_ms_ns(body: dict[str, Any], field: str) -> int:
    """Nanoseconds of the milliseconds since the Unix epoch in a field.

    Raises:
        KeyError: The field is missing.
        FeedError: It is not an integer, or not a time between 1970 and 2255.
    """
    value = whole(body, field)
    if value > _LATEST_MS:
        raise FeedError(field, f"{value} is not a time in milliseconds")
    return value * 1_000_000


def epoch_seconds_ns(text: Any, field: str) -> int:
    """Nanoseconds of a decimal string of seconds since the Unix epoch.

    Raises:
        FeedError: Not such a string, or not a time between 1970 and 2255.
    """
    match = _EPOCH_SECONDS.fullmatch(text) if type(text) is str else None
    if match is None:
        raise FeedError(field, f"{text!r:.40} is not seconds since the epoch as a decimal string")
    return _instant(int(match[1]), match[2], field)


def rfc3339_ns(text: Any, field: str) -> int:
    """Nanoseconds since the Unix epoch of an RFC 3339 time in UTC (`…Z`), up to nine decimals.

    Raises:
        FeedError: Not such a time, or not between 1970 and 2255.
    """
    match = _RFC3339.fullmatch(text) if type(text) is str else None
    if match is None:
        raise FeedError(field, f"{text!r:.40} is not an RFC 3339 time in UTC")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    try:
        moment = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as error:
        raise FeedError(field, f"{text!r} is not a time: {error}") from error
    return _instant((moment - _EPOCH) // _SECOND, match[7], field)


def _instant(seconds: int, fraction: str | None, field: str) -> int:
    if not 0 < seconds <= _LATEST_SECONDS:
        raise FeedError(field, f"{seconds} s since the epoch is not a time")
    return seconds * 10**9 + int((fraction or "").ljust(9, "0"))


class EventTimes:
    """Gives every event of one feed its event time.

    Where the venue sends none, it is estimated as the receive time minus the feed's smallest recent lag. Before the
    first message with a time has shown that lag nothing can be estimated: the events wait, and are released in front of
    that message. They are few: snapshots, which come once a subscription. A reset never waits; without a lag its time
    is the receive time, and what waits of its instrument is void.
    """

    def __init__(self) -> None:
        self._lag = MinimumLag()
        self._held: list[pb.MarketEvent] = []

    def timed(self, events: list[pb.MarketEvent]) -> list[pb.MarketEvent]:
        """Takes events whose event time the venue sent; the events that waited come first."""
        if not events:
            return events
        for event in events:
            self._lag.observe(event.receive_time_ns, event.event_time_ns)
        return self._release(events[-1].receive_time_ns) + events

    def observe(self, receive_time_ns: int, event_time_ns: int) -> list[pb.MarketEvent]:
        """Learns from a timed message that is no event; returns the events that waited."""
        self._lag.observe(receive_time_ns, event_time_ns)
        return self._release(receive_time_ns)

    def untimed(self, event: pb.MarketEvent) -> list[pb.MarketEvent]:
        """Estimates the time of an event, or lets it wait.

        Raises:
            FeedError: Too many wait; a feed that never tells the time is not what a venue documents.
        """
        lag = self._lag.at(event.receive_time_ns)
        if lag is None and event.WhichOneof("event") == "reset":
            self._held = [held for held in self._held if held.instrument != event.instrument]
            lag = 0
        if lag is None:
            if len(self._held) >= _MAX_HELD:
                raise FeedError("message", f"is one of over {_MAX_HELD} without a time, before the first that has one")
            self._held.append(event)
            return []
        self._estimate(event, lag)
        return [event]

    def is_past(self, receive_time_ns: int, event_time_ns: int) -> bool:
        """Whether something happened well before what the feed tells of now; False while the lag is unknown."""
        lag = self._lag.at(receive_time_ns)
        return lag is not None and event_time_ns < receive_time_ns - lag - _PAST_NS

    def _release(self, receive_time_ns: int) -> list[pb.MarketEvent]:
        if not self._held:
            return []
        held, self._held = self._held, []
        lag = self._lag.at(receive_time_ns)
        assert lag is not None, "a timed message was observed at this very time"
        for event in held:
            self._estimate(event, lag)
        return held

    @staticmethod
    def _estimate(event: pb.MarketEvent, lag: int) -> None:
        event.event_time_ns = event.receive_time_ns - lag
        event.event_time_estimated = True
