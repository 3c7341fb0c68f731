"""Features at the instants of anybody's own orders, as they were known then: for models that are trained elsewhere.

The vector at t is that of a server which had heard every event received before the first one of t or later, and no
other; its ages are as of t. It is the vector of `torchserve.dataset` where that has an instant at t. It may be of any
feature set: what callers bring is then a column of the orders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.engine.book import EventError
from feature_cache.feature_set import CALLER, FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import FeatureSnapshot
from pretrade.market.v1 import market_pb2 as pb
from torchserve.dataset import SamplesError
from torchserve.tables import read_table
from torchserve.vectors import Known

if TYPE_CHECKING:
    import pyarrow as pa

MAX_AGE_NS: Final = 10_000_000_000
"""An older vector is one that a server has no longer, by default (`PRETRADE_FEATURE_CACHE__TTL_SECONDS`)."""

SIDES: Final = {"buy": False, "sell": True}
"""What a column `side` may hold, and whether that is a sell."""


_UNITS: Final = {"seconds": 1_000_000_000, "milliseconds": 1_000_000, "microseconds": 1_000}
"""Nanoseconds in other units of time."""
_CENTURY_S: Final = (1_000_000_000, 10_000_000_000)
"""From 2001 to 2286: read as nanoseconds, whole numbers of other units in this span are all of early 1970."""


def check_unit(times: NDArray[np.int64]) -> None:
    """Raises SamplesError where whole numbers are instants of this age in another unit than nanoseconds."""
    first, last = _CENTURY_S
    for unit, nanoseconds in _UNITS.items():
        per_second = 1_000_000_000 // nanoseconds
        if len(times) and first * per_second <= times.min() and times.max() < last * per_second:
            raise SamplesError(
                f"column time must be nanoseconds since 1970, and looks like {unit} ({times[0]}): multiply it by"
                f" {nanoseconds:,}, or write it as timestamps"
            )


def known_at(
    events: Iterable[pb.MarketEvent],
    instruments: Sequence[str],
    times_ns: NDArray[np.int64],
    feature_set: FeatureSet = MF1,
) -> NDArray[np.float32]:
    """What was known of each order's instrument at its time.

    Args:
        events: One or more instruments in the order in which they were received.
        instruments: Of each order.
        times_ns: Exchange time of each order, nanoseconds since the Unix epoch.
        feature_set: Whose features.

    Returns:
        float32[n, features of the set] in market orientation; NaN where a feature was undefined, nothing was known, or
        the caller brings it.

    Raises:
        FeatureSetError: A computer of the set failed, or gave what its definition excludes.
    """
    rows = np.full((len(times_ns), len(feature_set)), np.nan, np.float32)
    orders: dict[str, list[int]] = defaultdict(list)
    for order in np.argsort(times_ns, kind="stable").tolist():
        orders[instruments[order]].append(order)
    asked = {name: _Asked(Known(name, feature_set), numbers, times_ns, rows) for name, numbers in orders.items()}
    for event in events:
        one = asked.get(event.instrument)
        if one is None and feature_set != MF1:  # computers of others may look at this instrument
            one = asked[event.instrument] = _Asked(Known(event.instrument, feature_set), [], times_ns, rows)
        if one is not None:
            one.on_event(event)
    for one in asked.values():
        one.end()
    return rows


class _Asked:
    """The orders of one instrument, answered one after the other while its events pass."""

    def __init__(
        self, market: Known, orders: list[int], times_ns: NDArray[np.int64], rows: NDArray[np.float32]
    ) -> None:
        self._market = market
        self._orders = orders
        self._times = times_ns[orders].tolist()
        self._rows = rows
        self._next = 0

    def on_event(self, event: pb.MarketEvent) -> None:
        is_due = self._next < len(self._times) and event.event_time_ns >= self._times[self._next]
        # Before the event is taken in: at the instant it had not been received yet.
        known = self._market.vector() if is_due else None
        try:
            self._market.on_event(event)
        except EventError:
            # Nor does the worker take it in. What it means for the book the next event tells.
            return
        if known is not None:
            # An event from the future counts at a bound, and a stale one moves no time.
            self._answer(known, min(event.event_time_ns, self._market.engine.time_ns))

    def end(self) -> None:
        """There are no more events: the orders that are left know all of them."""
        if self._next < len(self._times):
            self._answer(self._market.vector(), self._times[-1])

    def _answer(self, known: FeatureSnapshot, until_ns: int) -> None:
        while self._next < len(self._times) and self._times[self._next] <= until_ns:
            older_ns = self._times[self._next] - known.event_time_ns
            if older_ns <= MAX_AGE_NS:
                row = self._rows[self._orders[self._next]]
                row[:] = known.values
                row[list(known.feature_set.ages)] += np.float32(older_ns / 1e6)
            self._next += 1


def read_orders(path: Path, feature_set: FeatureSet = MF1) -> pa.Table:
    """A CSV or Parquet file of orders.

    Its columns are `instrument` and `time`, perhaps `side`, what callers bring of the set, and any others.

    Raises:
        SamplesError: It cannot be read, or a column is missing or not what it should be.
    """
    import pyarrow as pa  # noqa: PLC0415 - only for this command

    table = read_table(path)
    for name in ("instrument", "time"):
        if name not in table.column_names:
            raise SamplesError(f"{path}: has no column {name!r}; it has {', '.join(table.column_names)}")
    brought = {feature_set.names[place] for place in feature_set.from_source(CALLER)}
    if taken := sorted({*feature_set.names}.difference(brought).intersection(table.column_names)):
        raise SamplesError(f"{path}: has features already: {', '.join(taken)}")
    if missing := sorted(brought.difference(table.column_names)):
        raise SamplesError(
            f"{path}: has no column {', '.join(missing)}, which callers bring with their orders: add what they would"
            " have brought, and leave it empty where they would not have known it"
        )
    kind = table.schema.field("time").type
    if not (pa.types.is_timestamp(kind) or pa.types.is_integer(kind)):
        raise SamplesError(f"{path}: time must be a date and time in UTC, or nanoseconds since the epoch, not {kind}")
    if table.column("time").null_count or table.column("instrument").null_count:
        raise SamplesError(f"{path}: every order needs an instrument and a time")
    if pa.types.is_integer(kind):
        try:
            check_unit(table.column("time").cast(pa.int64()).to_numpy())
        except SamplesError as error:
            raise SamplesError(f"{path}: {error}") from error
    if "side" in table.column_names and (wrong := set(table.column("side").to_pylist()) - SIDES.keys()):
        raise SamplesError(f"{path}: side must be buy or sell, not {min(map(str, wrong))!r:.40}")
    return table


def with_features(orders: pa.Table, events: Iterable[pb.MarketEvent], feature_set: FeatureSet = MF1) -> pa.Table:
    """Orders of `read_orders` with a column for each feature, turned for the order's side where there is one.

    Raises:
        SamplesError: An order brings what it must not.
        FeatureSetError: See `known_at`.
    """
    import pyarrow as pa  # noqa: PLC0415 - as above

    time = orders.column("time")
    nanoseconds = time.cast(pa.timestamp("ns")) if pa.types.is_timestamp(time.type) else time
    instruments = orders.column("instrument").to_pylist()
    rows = known_at(events, instruments, nanoseconds.cast(pa.int64()).to_numpy(), feature_set)
    for place in feature_set.from_source(CALLER):
        rows[:, place] = _brought(orders, feature_set, place)
        orders = orders.drop_columns(feature_set.names[place])
    if "side" in orders.column_names:
        sells = np.array([SIDES[side] for side in orders.column("side").to_pylist()], np.bool_)
        rows[sells] = feature_set.for_sell(rows[sells])
    for index, name in enumerate(feature_set.names):
        # NaN stays NaN and does not become null: a model is fed what it was trained on.
        orders = orders.append_column(name, pa.array(rows[:, index]))
    return orders


def _brought(orders: pa.Table, feature_set: FeatureSet, place: int) -> NDArray[np.float32]:
    """What the orders bring of a feature, held to the rules that a server holds it to.

    Raises:
        SamplesError: It is no number, outside of its range, or missing where the set asks for it.
    """
    import pyarrow as pa  # noqa: PLC0415 - as above

    feature = feature_set.features[place]
    try:
        values: NDArray[np.float32] = orders.column(feature.name).cast(pa.float32()).to_numpy()
    except pa.ArrowException as error:
        raise SamplesError(f"column {feature.name} must hold numbers: {error}") from error
    undefined = np.isnan(values)
    if undefined.any() and not feature.may_be_undefined:
        raise SamplesError(f"column {feature.name} has holes, and {feature_set.id} does not allow an order without it")
    wrong = ~undefined & ~((values >= feature.lowest) & (values <= feature.highest) & np.isfinite(values))
    if wrong.any():
        rule = f"finite and from {feature.lowest:g} to {feature.highest:g}"
        raise SamplesError(f"column {feature.name} must be {rule}, not {values[int(np.argmax(wrong))]:g}")
    return values


def join(
    orders: Path,
    events: Callable[[set[str]], Iterable[pb.MarketEvent]],
    out: Path,
    feature_set: FeatureSet = MF1,
) -> tuple[int, int]:
    """Writes the orders of a file with their features as Parquet.

    Args:
        orders: See `read_orders`.
        events: Gives those of some instruments in the order in which they were received.
        out: The file to write.
        feature_set: Whose features.

    Returns:
        How many orders there are, and for how many of them the book was known.

    Raises:
        SamplesError: The orders cannot be used, or see `with_features`.
        feature_cache.sources.session.SessionError: A recording cannot be read.
    """
    import pyarrow.parquet as pq  # noqa: PLC0415 - as above

    table = read_orders(orders, feature_set)
    joined = with_features(table, events(set(table.column("instrument").to_pylist())), feature_set)
    partial = out.with_name(out.name + ".partial")
    pq.write_table(joined, partial, compression="zstd")
    partial.replace(out)
    found = [one.name for one in feature_set.features if one.source != CALLER]
    defined = [~np.isnan(joined.column(name).to_numpy()) for name in found]
    return len(joined), int(np.any(defined, axis=0).sum()) if defined else 0
