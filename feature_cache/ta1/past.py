"""What was before a worker began: stored bars in front of those that it makes itself.

A worker that has just started reads the log again for less than a minute, which is too short for an indicator over bars
of ten seconds. The keeper of bars (`feature_cache/bars`) has the bars before that. Once stored bars reach to the first
one of ours, the two are one history, and the indicators are what they would be without the restart.

The database is asked in a thread of its own, so that nobody waits for it. Until it has answered, and where it has
nothing that fits, indicators count from our own first bar, as they do without stored bars.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Final

import structlog

from feature_cache.bars.bar import Bar, Lacks
from feature_cache.bars.store import BarStore, BarStoreError, bar_of

_log = structlog.get_logger(__name__)

COUNT: Final = 600
"""Bars of each interval that are looked up: ten minutes, and a hundred. The recursive indicators have forgotten by
then what was before, as far as a float32 can tell."""
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


class Answer:
    """What a look into the database has found."""

    bars: Sequence[Bar] | None = None
    """None until it is over; empty if it has failed."""


class Past:
    """Looks up stored bars, one look after the other.

    Args:
        read: May take long, and raise BarStoreError.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._asked: SimpleQueue[tuple[str, str, int, Answer]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._fails = False

    def ask(self, instrument: str, interval: str, until_ns: int) -> Answer:
        """Has stored bars looked up, at most those that start at `until_ns`; never waits."""
        answer = Answer()
        self._asked.put((instrument, interval, until_ns, answer))
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep_answering, daemon=True)
            self._thread.start()
        return answer

    def _keep_answering(self) -> None:
        while True:
            instrument, interval, until_ns, answer = self._asked.get()
            found: Sequence[Bar] = ()
            try:
                found = self._read(instrument, interval, until_ns, COUNT)
            except BarStoreError as error:
                if not self._fails:
                    _log.warning("ta1.no_stored_bars", error=str(error))
                self._fails = True
            else:
                self._fails = False
            answer.bars = found


class Join:
    """Puts stored bars of one instrument and interval in front of ours.

    The keeper of bars may be behind, above all where it has just been started too. So the database is asked again after
    1, 2, 4, 8 … bars of ours, until we have as many as would be looked up.

    Args:
        past: Where the stored ones are.
    """

    def __init__(self, past: Past) -> None:
        self._past = past
        self._own: list[Bar] = []
        self._answer: Answer | None = None
        self._next_look = 1
        self.is_over = False
        """True when there is nothing more to be found: ours are enough, or a new series has begun."""

    def add(self, bar: Bar) -> None:
        """Takes the next bar of ours."""
        self.is_over = len(self._own) >= COUNT or (bool(self._own) and bool(bar.lacks & Lacks.BEGINNING))
        if not self.is_over:
            self._own.append(bar)

    def found(self) -> list[Bar] | None:
        """The whole history up to our newest bar, once, as soon as stored bars reach to it; asks for them meanwhile."""
        if self.is_over or not self._own:
            return None
        if self._answer is not None and self._answer.bars is not None:
            history, self._answer = joined(self._answer.bars, self._own), None
            if history is not None:
                self.is_over = True
                return history
        if self._answer is None and len(self._own) >= self._next_look:
            self._next_look = 2 * len(self._own)
            newest = self._own[-1]
            self._answer = self._past.ask(newest.instrument, newest.interval, newest.start_ns)
        return None


def joined(stored: Sequence[Bar], own: Sequence[Bar]) -> list[Bar] | None:
    """One history of stored bars and of ours behind them; None where a bar between the two is missing.

    Of the stored bars it takes those after the last gap. Where both have a bar, the stored one counts: our first was
    not read from its beginning.
    """
    history: list[Bar] = []
    for bar in stored:
        if bar.lacks & Lacks.BEGINNING or (history and bar.start_ns != history[-1].end_ns):
            history = []
        history.append(bar)
    if not history or not history[0].start_ns <= own[0].start_ns <= history[-1].start_ns:
        return None
    return [*history, *(bar for bar in own if bar.start_ns > history[-1].start_ns)]
