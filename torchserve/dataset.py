"""Samples to learn from: features at decision instants, for both sides, with what the market did next.

The instants of an instrument are a grid of 200 ms of event time. A sample at t holds what a server would have known
then: every event that was received before the first event of t or later, and no other. The ages of book and trade are
as of t. Its label is computed from two later looks at the market, which is looked at every 100 ms: when the order
reaches it, and at the end of the horizon (`label.py`). An instant counts only when a server would decide on its book:
when that is known and fresh. At both looks the book must be known.

Event time is the feature engine's, which holds a wrong timestamp within a second of its feed. The grid has no instants
in a silence of more than ten seconds, and begins anew when time runs back: one event in the year 2100 costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.engine.book import EventError
from feature_cache.feature_set import CALLER, FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import FeatureSnapshot
from pretrade.market.v1 import market_pb2 as pb
from torchserve.label import TICK_NS, Label
from torchserve.vectors import Known

STEP_NS: Final = 200_000_000
"""Between two decision instants of one instrument."""
MAX_BOOK_AGE_MS: Final = 1_000.0
"""An older book is one that a server would not decide on, by default (`max_age_seconds` in `fallback/staleness.py`)."""
MAX_LABEL_BOOK_AGE_MS: Final = 2_000.0
"""With an older book at one of its looks there is no label, as in `server/audit/reading/labels.py`."""

_TICKS: Final = STEP_NS // TICK_NS
"""Looks at the market from one instant to the next."""
_SILENCE_NS: Final = 10_000_000_000
"""Longer than a book stays fresh after the horizon of the last instant before it."""
_BOOK_AGE, _TRADE_AGE = MF1.index["book_age_ms"], MF1.index["trade_age_ms"]
_SPREAD = MF1.index["spread_bps"]
_SIMULATED: Final = "simulated"
"""How the source of a simulation begins."""

_Side = tuple[bool, NDArray[np.float32], NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]]
"""Whether it is the sells, rows, those of `mf1`, side-signed markouts in bps, and times."""


class SamplesError(ValueError):
    """The samples cannot make a model; the message says why."""


def check_recordable(feature_set: FeatureSet) -> None:
    """Raises SamplesError where a feature of the set comes from callers: no market data have it."""
    if brought := feature_set.from_source(CALLER):
        names = ", ".join(feature_set.names[place] for place in brought)
        raise SamplesError(
            f"{feature_set.version}: no recording has {names}, which callers bring. `pretrade dataset features` adds"
            " the other features to orders of yours: train on those elsewhere, then `pretrade models add`"
        )


@dataclass(frozen=True, slots=True)
class Samples:
    """Decision instants in time order."""

    rows: NDArray[np.float32]
    """float32[n, features of the set], turned for the side, NaN where undefined."""
    eligible: NDArray[np.bool_]
    """bool[n], the label."""
    markout_bps: NDArray[np.float64]
    """float64[n], side-signed."""
    time_ns: NDArray[np.int64]
    """int64[n], event time of the instant."""
    sell: NDArray[np.bool_]
    """bool[n], the side of the order."""
    instrument: NDArray[np.int16]
    """int16[n], index into `instruments`."""
    instruments: tuple[str, ...]
    source: str
    """Where the events came from, for people."""
    source_sha256: str = ""
    """Hash of what they came from: of a recording's files, or of a simulation's arguments and code."""
    label: Label = field(default_factory=Label)
    """What `eligible` and `markout_bps` are."""
    feature_set: FeatureSet = MF1
    """Of the rows."""
    beside: NDArray[np.float32] | None = None
    """float32[n, features of `mf1`] at the same instants, turned likewise: what rules and baselines look at. None where
    the rows are of `mf1`, or where nobody knows."""

    @property
    def of_mf1(self) -> Samples:
        """The same samples with rows of `mf1`."""
        if self.feature_set == MF1:
            return self
        if self.beside is None:
            raise SamplesError(f"the samples of {self.feature_set.version} have no vectors of {MF1.id} beside them")
        return replace(self, rows=self.beside, feature_set=MF1, beside=None)

    @property
    def is_simulated(self) -> bool:
        """Whether no market made them: their instants are no dates."""
        return self.source.startswith(_SIMULATED)

    @property
    def until(self) -> int:
        """When the newest horizon ends, Unix seconds: nothing later is known here."""
        return math.ceil((int(self.time_ns.max()) + self.label.span_ns) / 1e9)

    def one_side(self, number: int) -> NDArray[np.intp]:
        """An instrument's samples of the side that has more of them, buys if both have as many.

        They are one series in time. Our own training has a buy and its mirrored sell at each instant; somebody's orders
        may be sells alone.
        """
        buys, sells = (
            np.flatnonzero((self.instrument == number) & (self.sell == is_sell)) for is_sell in (False, True)
        )
        return sells if len(sells) > len(buys) else buys

    def take(self, index: NDArray[np.intp]) -> Samples:
        """These samples alone, in this order."""
        columns = ["rows", "eligible", "markout_bps", "time_ns", "sell", "instrument"]
        columns += [] if self.beside is None else ["beside"]
        return replace(self, **{name: getattr(self, name)[index] for name in columns})

    def sha256(self) -> str:
        """Hash of everything a model can learn from these samples."""
        digest = hashlib.sha256()
        for array in (self.rows, self.eligible, self.time_ns, *([] if self.beside is None else [self.beside])):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def collect(
    events: Iterable[pb.MarketEvent],
    source: str,
    source_sha256: str = "",
    label: Label | None = None,
    feature_set: FeatureSet = MF1,
) -> Samples:
    """Replays a session through the feature engine and labels both sides of every decision instant.

    Args:
        events: One or more instruments in the order in which they were received.
        source: See `Samples.source`.
        source_sha256: See `Samples.source_sha256`.
        label: What is to be learnt.
        feature_set: See `Market`.

    Returns:
        Samples of all instruments; none when the session is shorter than the label looks ahead.
    """
    return Market(events, source, source_sha256, feature_set).samples(label or Label())


class Market:
    """A session as it went through the feature engine, for any label.

    Args:
        events: See `collect`.
        source: See `Samples.source`.
        source_sha256: See `Samples.source_sha256`.
        feature_set: Of the samples' rows.

    Raises:
        SamplesError: The set cannot be had from market data.
        FeatureSetError: A computer of it fails.
    """

    def __init__(
        self,
        events: Iterable[pb.MarketEvent],
        source: str,
        source_sha256: str = "",
        feature_set: FeatureSet = MF1,
    ) -> None:
        check_recordable(feature_set)
        self._source, self._source_sha256, self._feature_set = source, source_sha256, feature_set
        self._instruments: dict[str, _Instants] = {}
        for event in events:
            instants = self._instruments.get(event.instrument)
            if instants is None:
                instants = self._instruments[event.instrument] = _Instants(event.instrument, feature_set)
            instants.on_event(event)

    @classmethod
    def joined(cls, parts: Iterable[Market], source: str, source_sha256: str) -> Market:
        """One session of several that have no instrument in common."""
        whole = cls((), source, source_sha256)
        for part in parts:
            whole._instruments.update(part._instruments)
        return whole

    def samples(self, label: Label) -> Samples:
        """The decision instants that have this label, and what it is."""
        names = tuple(sorted(self._instruments))
        sides = [(i, *side) for i, name in enumerate(names) for side in self._instruments[name].sides(label)]
        nothing = (np.empty((0, len(one)), np.float32) for one in (self._feature_set, MF1))
        empty = (0, False, *nothing, np.empty(0), np.empty(0, np.int64))
        instrument, sell, rows, beside, markout, time = zip(empty, *sides, strict=True)
        lengths = [len(part) for part in time]
        samples = Samples(
            rows=np.concatenate(rows),
            eligible=np.concatenate(markout) >= label.worst_markout_bps,
            markout_bps=np.concatenate(markout),
            time_ns=np.concatenate(time),
            sell=np.repeat(np.array(sell, np.bool_), lengths),
            instrument=np.repeat(np.array(instrument, np.int16), lengths),
            instruments=names,
            source=self._source,
            source_sha256=self._source_sha256,
            label=label,
            feature_set=self._feature_set,
            beside=None if self._feature_set == MF1 else np.concatenate(beside),
        )
        # At one instant by instrument, the buy before the sell.
        return samples.take(np.argsort(samples.time_ns, kind="stable"))


class _Grid:
    """Decision instants without a hole, all after a time: what was known at each, and at the looks in between."""

    def __init__(self, after_ns: int, feature_set: FeatureSet) -> None:
        self.first = self.next_ns = (after_ns // STEP_NS + 1) * STEP_NS
        self._feature_set = feature_set
        self._ages = list(feature_set.ages)
        self._values: list[NDArray[np.float32]] = []
        self._others: list[NDArray[np.float32]] = []
        """Vectors of the set, where it is not `mf1`."""
        self._mids: list[float] = []
        self._spreads: list[float] = []

    def reach(self, now_ns: int, known: FeatureSnapshot, of_set: FeatureSnapshot) -> None:
        """Adds the looks up to this time, at which this was known: a vector of `mf1`, and one of the set."""
        while self.next_ns <= now_ns:
            older_ms = np.float32((self.next_ns - known.event_time_ns) / 1e6)
            is_fresh = known.values[_BOOK_AGE] + older_ms <= MAX_LABEL_BOOK_AGE_MS
            if len(self._mids) % _TICKS == 0:
                values = known.values.copy()
                values[[_BOOK_AGE, _TRADE_AGE]] += older_ms
                self._values.append(values)
                if of_set is not known:
                    aged = of_set.values.copy()
                    aged[self._ages] += older_ms
                    self._others.append(aged)
            self._mids.append(known.mid if is_fresh else math.nan)
            self._spreads.append(float(known.values[_SPREAD]))
            self.next_ns += TICK_NS

    def sides(self, label: Label) -> Iterator[_Side]:
        """The buys, then the sells."""
        reached = np.arange(label.delay_ticks, len(self._mids) - label.span_ticks + label.delay_ticks, _TICKS)
        if not len(reached):
            return
        mids, rows = np.array(self._mids), np.array(self._values)[: len(reached)]
        later = mids[reached + label.span_ticks - label.delay_ticks]
        half_spread = np.array(self._spreads)[reached] / 2e4 if label.price == "touch" else np.zeros(len(reached))
        known = np.isfinite(later) & np.isfinite(mids[reached]) & np.isfinite(half_spread)
        usable = np.flatnonzero(known & (rows[:, _BOOK_AGE] <= MAX_BOOK_AGE_MS))
        own, time = rows[usable], self.first + usable.astype(np.int64) * STEP_NS
        rows = np.array(self._others)[: len(reached)][usable] if self._others else own
        for side in (1, -1):
            price = mids[reached] * (1 + side * half_spread)
            turned = (rows, own) if side > 0 else (self._feature_set.for_sell(rows), MF1.for_sell(own))
            yield side < 0, *turned, side * 1e4 * (later / price - 1)[usable], time


class _Instants:
    """The decision instants of one instrument, on as many grids as its time has pieces."""

    def __init__(self, instrument: str, feature_set: FeatureSet) -> None:
        self._market = Known(instrument, feature_set)
        self._engine = self._market.engine
        self._feature_set = feature_set
        self._grids: list[_Grid] = []

    def on_event(self, event: pb.MarketEvent) -> None:
        grid = self._grids[-1] if self._grids else None
        # Before the event is taken in: at the instant it had not been received yet.
        known = self._market.beside() if grid is not None and event.event_time_ns >= grid.next_ns else None
        restarts = self._engine.time_restarts
        try:
            self._market.on_event(event)
        except EventError:
            # Nor does the worker take it in. What it means for the book the next event tells.
            return
        if grid is not None and known is not None:
            # An event from the future counts at a bound, and a stale one moves no time.
            now_ns = min(event.event_time_ns, self._engine.time_ns)
            if now_ns - grid.next_ns <= _SILENCE_NS:
                grid.reach(now_ns, *known)
            else:
                grid.reach(grid.next_ns + _SILENCE_NS, *known)
                self._grids.append(_Grid(now_ns, self._feature_set))
        elif grid is None or self._engine.time_restarts > restarts:
            self._grids.append(_Grid(self._engine.time_ns, self._feature_set))

    def sides(self, label: Label) -> Iterator[_Side]:
        """As those of the grids, one after the other."""
        for grid in self._grids:
            yield from grid.sides(label)
