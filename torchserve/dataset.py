"""Samples to learn from: features at decision instants, for both sides, with what the market did next.

The instants of an instrument are a grid of 200 ms of event time. A sample at t holds what a server would have known
then: every event that was received before the first event of t or later, and no other. The ages of book and trade are
as of t. Its label is computed from the mid at the instant that is the label's horizon later. An instant counts only
when a server would decide on its book: when that is known and fresh. At the end of the horizon the book must be known.

Event time is the feature engine's, which holds a wrong timestamp within a second of its feed. The grid has no instants
in a silence of more than ten seconds, and begins anew when time runs back: one event in the year 2100 costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import features
from feature_cache.engine.book import EventError
from feature_cache.engine.engine import FeatureEngine
from feature_cache.store.codec import FeatureSnapshot
from pretrade.market.v1 import market_pb2 as pb

STEP_NS: Final = 200_000_000
"""Between two decision instants of one instrument."""
LABEL_HORIZON_NS: Final = 5_000_000_000
"""How far the label looks ahead; a whole number of steps."""
WORST_MARKOUT_BPS: Final = -1.0
LABEL: Final = "side-signed mid markout over the next 5 s not worse than -1 bp"
MAX_BOOK_AGE_MS: Final = 1_000.0
"""An older book is one that a server would not decide on, by default (`max_age_seconds` in `fallback/staleness.py`)."""
MAX_LABEL_BOOK_AGE_MS: Final = 2_000.0
"""With an older book at the end of the horizon there is no label, as in `server/audit/reading/labels.py`."""

_HORIZON_STEPS: Final = LABEL_HORIZON_NS // STEP_NS
_SILENCE_NS: Final = 10_000_000_000
"""Longer than a book stays fresh after the horizon of the last instant before it."""
_BOOK_AGE, _TRADE_AGE = features.INDEX["book_age_ms"], features.INDEX["trade_age_ms"]


class SamplesError(ValueError):
    """The samples cannot make a model; the message says why."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Decision instants in time order."""

    rows: NDArray[np.float32]
    """float32[n, N_FEATURES], turned for the side, NaN where undefined."""
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

    def take(self, index: NDArray[np.intp]) -> Samples:
        """These samples alone, in this order."""
        columns = ("rows", "eligible", "markout_bps", "time_ns", "sell", "instrument")
        return replace(self, **{name: getattr(self, name)[index] for name in columns})

    def sha256(self) -> str:
        """Hash of everything a model can learn from these samples."""
        digest = hashlib.sha256()
        for array in (self.rows, self.eligible, self.time_ns):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def collect(events: Iterable[pb.MarketEvent], source: str, source_sha256: str = "") -> Samples:
    """Replays a session through the feature engine and labels both sides of every decision instant.

    Args:
        events: One or more instruments in the order in which they were received.
        source: See `Samples.source`.
        source_sha256: See `Samples.source_sha256`.

    Returns:
        Samples of all instruments; none when the session is shorter than the label's horizon.
    """
    instruments: dict[str, _Instants] = {}
    for event in events:
        instants = instruments.get(event.instrument)
        if instants is None:
            instants = instruments[event.instrument] = _Instants(event.instrument)
        instants.on_event(event)
    names = tuple(sorted(instruments))
    sides = [(number, *side) for number, name in enumerate(names) for side in instruments[name].sides()]
    empty = (np.int16(0), False, np.empty((0, features.N_FEATURES), np.float32), np.empty(0), np.empty(0, np.int64))
    instrument, sell, rows, markout, time = zip(empty, *sides, strict=True)
    lengths = [len(part) for part in time]
    samples = Samples(
        rows=np.concatenate(rows),
        eligible=np.concatenate(markout) >= WORST_MARKOUT_BPS,
        markout_bps=np.concatenate(markout),
        time_ns=np.concatenate(time),
        sell=np.repeat(np.array(sell, np.bool_), lengths),
        instrument=np.repeat(np.array(instrument, np.int16), lengths),
        instruments=names,
        source=source,
        source_sha256=source_sha256,
    )
    # At one instant by instrument, the buy before the sell.
    return samples.take(np.argsort(samples.time_ns, kind="stable"))


class _Grid:
    """Decision instants without a hole, all after a time: what was known at each."""

    def __init__(self, after_ns: int) -> None:
        self.first = self.next_ns = (after_ns // STEP_NS + 1) * STEP_NS
        self._values: list[NDArray[np.float32]] = []
        self._mids: list[float] = []

    def reach(self, now_ns: int, known: FeatureSnapshot) -> None:
        """Adds the instants up to this time, at which this was known."""
        while self.next_ns <= now_ns:
            values = known.values.copy()
            values[[_BOOK_AGE, _TRADE_AGE]] += np.float32((self.next_ns - known.event_time_ns) / 1e6)
            self._values.append(values)
            self._mids.append(known.mid if values[_BOOK_AGE] <= MAX_LABEL_BOOK_AGE_MS else math.nan)
            self.next_ns += STEP_NS

    def sides(self) -> Iterator[tuple[bool, NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]]]:
        """Whether it is the sells, rows, side-signed markouts in bps and times: of the buys, then of the sells."""
        if len(self._mids) <= _HORIZON_STEPS:
            return
        mids, rows = np.array(self._mids), np.array(self._values)[:-_HORIZON_STEPS]
        markout = 1e4 * (mids[_HORIZON_STEPS:] / mids[:-_HORIZON_STEPS] - 1)
        usable = np.flatnonzero(np.isfinite(markout) & (rows[:, _BOOK_AGE] <= MAX_BOOK_AGE_MS))
        rows = rows[usable]
        time = self.first + usable.astype(np.int64) * STEP_NS
        yield False, rows, markout[usable], time
        yield True, features.for_sell(rows), -markout[usable], time


class _Instants:
    """The decision instants of one instrument, on as many grids as its time has pieces."""

    def __init__(self, instrument: str) -> None:
        self._engine = FeatureEngine(instrument)
        self._grids: list[_Grid] = []

    def on_event(self, event: pb.MarketEvent) -> None:
        grid = self._grids[-1] if self._grids else None
        # Before the event is taken in: at the instant it had not been received yet.
        known = self._engine.snapshot() if grid is not None and event.event_time_ns >= grid.next_ns else None
        restarts = self._engine.time_restarts
        try:
            self._engine.on_event(event)
        except EventError:
            # Nor does the worker take it in. What it means for the book the next event tells.
            return
        if grid is not None and known is not None:
            # An event from the future counts at a bound, and a stale one moves no time.
            now_ns = min(event.event_time_ns, self._engine.time_ns)
            if now_ns - grid.next_ns <= _SILENCE_NS:
                grid.reach(now_ns, known)
            else:
                grid.reach(grid.next_ns + _SILENCE_NS, known)
                self._grids.append(_Grid(now_ns))
        elif grid is None or self._engine.time_restarts > restarts:
            self._grids.append(_Grid(self._engine.time_ns))

    def sides(self) -> Iterator[tuple[bool, NDArray[np.float32], NDArray[np.float64], NDArray[np.int64]]]:
        """As those of the grids, one after the other."""
        for grid in self._grids:
            yield from grid.sides()
