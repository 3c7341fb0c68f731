"""Makes pages of templates, in which everything that was not written by us is escaped."""

from __future__ import annotations

import datetime as dt
import math
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, PackageLoader, StrictUndefined

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.client.cli.alertmanager import matchers_of, moment
from pretrade.client.enum_names import enum_name
from pretrade.console.runbook import section
from pretrade.decision.v1 import decision_pb2

_ENUMS: Final[Mapping[str, object]] = {
    "action": decision_pb2.Action,
    "book": admin_pb2.BookState,
    "breaker_mode": admin_pb2.BreakerMode,
    "breaker_state": admin_pb2.BreakerState,
    "canary_state": admin_pb2.CanaryState,
    "degradation": decision_pb2.Degradation,
    "heard": audit_pb2.HeardAction,
    "reason": decision_pb2.ReasonCode,
    "side": decision_pb2.Side,
    "source": decision_pb2.Source,
    "stage": decision_pb2.Stage,
    "trading_state": admin_pb2.TradingState,
    "verdict": admin_pb2.CanaryVerdict,
}
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "m"))


class Pages:
    """Makes pages."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=PackageLoader("pretrade.console"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters.update(
            count=count,
            doubled=doubled,
            figure=figure,
            matchers=matchers_of,
            moment=moment,
            ms=milliseconds,
            named=named,
            price=price,
            section=section,
            size=size,
            span=span,
            us=microseconds,
            when=when,
        )
        self._environment.globals["version"] = metadata.version("pretrade")

    def page(self, name: str, /, **values: Any) -> str:
        """The page that a template makes of these values."""
        return self._environment.get_template(f"{name}.html").render(values)


def named(value: int, enum: str) -> str:
    """The name of an enum's value; its number where a newer server sends one that we do not know."""
    try:
        return enum_name(_ENUMS[enum], value)
    except ValueError:
        return str(value)


def milliseconds(value: Duration) -> str:
    """Milliseconds of a duration, with as many places as tell something."""
    return microseconds(value.ToMicroseconds())


def microseconds(value: float) -> str:
    """Microseconds as milliseconds, with as many places as tell something; a dash for what is not known."""
    if math.isnan(value):
        return "–"
    found = value / 1_000
    return f"{found:,.0f}" if abs(found) >= 100 else f"{found:.1f}"


def span(value: Duration | float) -> str:
    """A span of time as people say it: `45 s`, `3 m 20 s`, `2 h 5 m`."""
    seconds = int(value.ToSeconds() if isinstance(value, Duration) else value)
    if seconds < 0:
        return f"−{span(float(-seconds))}"
    parts: list[str] = []
    left = seconds
    for size, unit in _UNITS:
        if left >= size or parts:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join([*parts, f"{left} s"][:2])


def when(value: Timestamp | int) -> str:
    """A time in UTC; of a number, nanoseconds since the Unix epoch."""
    found = value.ToDatetime(dt.UTC) if isinstance(value, Timestamp) else dt.datetime.fromtimestamp(value / 1e9, dt.UTC)
    today = dt.datetime.fromtimestamp(time.time(), dt.UTC).date()
    return f"{found:%H:%M:%S}" if found.date() == today else f"{found:%Y-%m-%d %H:%M:%S}"


def doubled(values: Iterable[str]) -> list[tuple[str, str]]:
    """Choices of a form that are called what they are."""
    return [(value, value) for value in values]


def count(value: float) -> str:
    """A count with commas."""
    return f"{value:,.0f}"


def figure(value: float, spec: str = ".4f") -> str:
    """A number in this format; a dash for what is not defined."""
    return "–" if math.isnan(value) else format(value, spec)


def price(value: float, digits: int) -> str:
    """A price with so many decimals, as those beside it have."""
    return f"{value:,.{digits}f}"


def size(value: float) -> str:
    """A size with as many digits as tell something."""
    return f"{value:,.6g}"
