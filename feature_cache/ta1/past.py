"""What was before a worker began: stored bars in front of those that it makes itself.

A worker that has just started reads the log again for less than a minute, which is too short for an indicator over bars
of ten seconds, let alone of five minutes. The keeper of bars (`feature_cache/bars`) has the bars before that. Once
stored bars reach to ours, the two are one history, and the indicators are what they would be without the restart:

* until our first bar ends, if the stored ones reach to where it starts;
* from then on, if they reach into ours. Our first bar was not read from its beginning, and the stored one counts.

The database is asked, and the indicators are computed from what it has, in a thread of its own, so that nobody waits
for it. Until it has answered, and where it has nothing that fits, indicators count from our own first bar, as they do
without stored bars.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

import structlog

from feature_cache.bars.bar import INTERVALS, SECOND_NS, Bar, Lacks
from feature_cache.bars.store import BarStore, BarStoreError, bar_of
from feature_cache.ta1.indicators import HISTORY_BARS
from feature_cache.ta1.series import Series, without_gap

_log = structlog.get_logger(__name__)

_SOON_NS: Final = 5 * SECOND_NS
"""Before the end of our first bar nothing is looked up any more that would count until then only."""
_NEVER_NS: Final = 1 << 63
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Read = Callable[[str, str, int, int], Sequence[Bar]]
"""Instrument, interval, start of the newest bar that is wanted, how many: those bars, oldest first."""


def reader(database_url: str) -> Read:
    """Reads what the keeper of bars has written.

    Raises:
        ValueError: The URL is of no database that is supported.
    """
    store = BarStore(database_url)

    def read(instrument: str, interval: str, until_ns: int, count: int) -> Sequence[Bar]:
        until = _EPOCH + dt.timedelta(microseconds=until_ns // 1000)
        return [bar_of(row) for row in store.last(instrument, interval, count, until)]

    return read


@dataclass(slots=True)
class Look:
    """A look into the database, and what it has found."""

    instrument: str
    interval: str
    first_ns: int
    """Where our first bar starts."""
    own: tuple[Bar, ...]
    """Ours that have ended."""
    is_over: bool = False
    """Set last."""
    series: Series | None = None
    """The indicators after the last of our bars, or before the first; None where stored bars do not reach to ours."""

    @property
    def until_ns(self) -> int:
        """Start of the newest bar that is wanted."""
        return self.own[-1].start_ns if self.own else self.first_ns - INTERVALS[self.interval]


class Past:
    """Looks up stored bars, one look after the other.

    Args:
        read: May take long, and raise whatever it likes.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._asked: SimpleQueue[Look] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._fails = False

    def ask(self, look: Look) -> None:
        """Has stored bars looked up; never waits."""
        self._asked.put(look)
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_answering, daemon=True)
            self._thread.start()

    def _keep_answering(self) -> None:
        while True:
            look = self._asked.get()
            try:
                self.answer(look)
            except BarStoreError as error:
                if not self._fails:
                    _log.warning("ta1.no_stored_bars", error=str(error))
                self._fails = True
            except Exception:  # a row that is no bar, a defect of a driver or of ours: others' bars may be sound
                _log.exception("ta1.look_failed", instrument=look.instrument, interval=look.interval)
            else:
                self._fails = False
            look.is_over = True

    def answer(self, look: Look) -> None:
        """Reads, and computes the indicators from what there is. Raises what `read` raises."""
        stored = self._read(look.instrument, look.interval, look.until_ns, HISTORY_BARS)
        history = joined(stored, look.own) if look.own else reaching(stored, look.first_ns)
        if history is not None:
            series = Series()
            series.resume(history)
            look.series = series


class Join:
    """Puts stored bars of one instrument and interval in front of ours.

    The keeper of bars may be behind, above all where it has just been started too. So the database is asked again after
    1, 2, 4, 8 … seconds of event time, until we have as many bars as would be looked up.

    Args:
        past: Where the stored ones are.
        instrument: `SYMBOL.VENUE`.
        interval: Its name.
    """

    def __init__(self, past: Past, instrument: str, interval: str) -> None:
        self._past = past
        self._instrument = instrument
        self._interval = interval
        self._own: list[Bar] = []
        self._look: Look | None = None
        self._look_again()
        self.is_over = False
        """True when there is nothing more to be found: ours are enough, or a new series has begun."""

    def _look_again(self) -> None:
        self._next_look_ns = 0
        self._pause_ns = SECOND_NS

    def add(self, bar: Bar) -> None:
        """Takes the next bar of ours."""
        self.is_over = len(self._own) >= HISTORY_BARS or (bool(self._own) and bool(bar.lacks & Lacks.BEGINNING))
        if not self.is_over:
            if not self._own:
                self._look_again()
            self._own.append(bar)

    def found(self, begun_ns: int, now_ns: int) -> Series | None:
        """The indicators after all bars up to now, as soon as stored bars reach to ours; looks for them meanwhile.

        Args:
            begun_ns: Where the series of our bars begins.
            now_ns: Event time.
        """
        if self.is_over or not begun_ns:
            return None
        series = self._heard()
        if series is None and self._look is None and now_ns >= self._next_look_ns:
            width_ns = INTERVALS[self._interval]
            first_ns = begun_ns - begun_ns % width_ns
            if self._own or now_ns < first_ns + width_ns - _SOON_NS:
                self._look = Look(self._instrument, self._interval, first_ns, tuple(self._own))
                self._past.ask(self._look)
            self._next_look_ns = now_ns + self._pause_ns
            self._pause_ns *= 2
        return series

    def _heard(self) -> Series | None:
        look = self._look
        if look is None or not look.is_over:
            return None
        self._look = None
        if look.series is None or (self._own and not look.own):  # or our first bar has ended meanwhile
            return None
        if look.own:
            self.is_over = True
        else:
            self._next_look_ns = _NEVER_NS  # but for our first bar
        for bar in self._own[len(look.own) :]:
            look.series.add(bar)
        return look.series


def reaching(stored: Sequence[Bar], until_ns: int) -> list[Bar] | None:
    """The stored bars after the last gap; None if the last of them does not end there."""
    history = without_gap(stored)
    return history if history and history[-1].end_ns == until_ns else None


def joined(stored: Sequence[Bar], own: Sequence[Bar]) -> list[Bar] | None:
    """One history of stored bars and of ours behind them; None where a bar between the two is missing.

    Of the stored bars it takes those after the last gap. Where both have a bar, the stored one counts: our first was
    not read from its beginning.
    """
    history = without_gap(stored)
    if not history or not history[0].start_ns <= own[0].start_ns <= history[-1].start_ns:
        return None
    return [*history, *(bar for bar in own if bar.start_ns > history[-1].start_ns)]
