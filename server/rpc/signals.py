"""What the server knows of its instruments: the features of each from its own copy, and its newest decision.

Features are watched by looking at the copy again and again. Nothing is kept for a watcher but the sequences of the
vectors that it was told of, so one that does not read costs no memory, and gets the newest when it reads again. A
vector becomes JSON once, however many watch.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Final, NamedTuple

import structlog

from feature_cache.store.codec import BookState
from feature_cache.store.l1 import CachedFeatures, FeatureCache
from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Question, Reading
from server.errors import AuditError, InvalidRequestError, TooManyWatchersError, UnknownInstrumentError
from server.rpc.call import Call
from server.rpc.events import Event, json_of
from server.rpc.steering import duration

_log = structlog.get_logger(__name__)

MOST_WATCHERS: Final = 64
"""Of features, in one process. Each looks at every instrument it watches once in an interval, which costs some 5 µs."""
_DEFAULT_INTERVAL_SECONDS: Final = 1.0
_SHORTEST_INTERVAL_SECONDS: Final = 0.1
_LONGEST_INTERVAL_SECONDS: Final = 60.0
_DECISIONS_OF_SECONDS: Final = 86_400
_OVERLAP_NS: Final = 1_000_000_000
"""Workers' clocks may differ by this much: a vector that was published so long before a cursor is told again."""
_AT_A_TIME: Final = 8
"""Instruments that are made into messages before other calls get their turn. One takes some 0.1 ms."""
_MOST_SHOWN: Final = 64
_BOOKS: Final = {
    BookState.UNKNOWN: pb.BOOK_STATE_UNKNOWN,
    BookState.VALID: pb.BOOK_STATE_VALID,
    BookState.LOCKED: pb.BOOK_STATE_LOCKED,
}


class _Known(NamedTuple):
    """What a watcher was told of an instrument; another one is news."""

    sequence: int
    """0 without a vector."""
    problem: str


class Signals:
    """Answers `AdminService.ListSignals` and `AdminService.WatchFeatures`.

    Args:
        feature_cache: The server's copy of the vectors.
        instruments: Those that the server follows.
        max_age_seconds: Older features are not usable.
        lookups: Answers which decisions are the newest.
        clock: Monotonic seconds.
        wall_clock_ns: Nanoseconds since the Unix epoch.
        sets: The copies of the computed sets that models take besides `mf1`, by id.
    """

    def __init__(
        self,
        feature_cache: FeatureCache,
        instruments: tuple[str, ...],
        max_age_seconds: float,
        lookups: Reading,
        clock: Callable[[], float],
        wall_clock_ns: Callable[[], int],
        sets: Callable[[], Mapping[str, FeatureCache]] = dict,
    ) -> None:
        self._feature_cache = feature_cache
        self._sets = sets
        self._instruments = instruments
        self._max_age_seconds = max_age_seconds
        self._lookups = lookups
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._texts: dict[str, tuple[_Known, bytes]] = {}
        """The newest of each instrument as JSON."""
        self.watchers = 0
        """Who watches features now, by whatever protocol."""
        self.skipped = 0
        """Looks that watchers missed because they did not read."""
        self.without_decisions = 0
        """Answers in which decisions may be missing, because of the audit."""

    async def list(self, request: pb.ListSignalsRequest) -> pb.ListSignalsResponse:
        """What is known of some instruments now.

        Raises:
            UnknownInstrumentError: The server does not follow one of them.
        """
        names = self._wanted(request.instruments)
        decisions, incomplete = await self._newest_decisions(names)
        response = pb.ListSignalsResponse(incomplete=incomplete)
        for number, name in enumerate(names, 1):
            signal = response.signals.add(instrument=name, features=self._features(name))
            if (entry := self._feature_cache.get(name)) is not None:
                signal.age.CopyFrom(duration(entry.age_seconds(self._clock())))
            if (decision := decisions.get(name)) is not None:
                signal.decision.CopyFrom(decision)
            for cache in self._sets().values():
                of_set = signal.sets.add(features=self._features(name, cache))
                if (entry := cache.get(name)) is not None:
                    of_set.age.CopyFrom(duration(entry.age_seconds(self._clock())))
            if not number % _AT_A_TIME:
                await asyncio.sleep(0)
        return response

    async def watch(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[pb.WatchFeaturesResponse]:
        """Features as they change.

        Raises:
            UnknownInstrumentError, InvalidRequestError, TooManyWatchersError: They are not watched.
        """
        async with aclosing(self._changes(request, call)) as changes:
            async for name, cursor in changes:
                yield pb.WatchFeaturesResponse(features=self._features(name), cursor=cursor)

    async def watch_json(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[Event]:
        """The same as JSON."""
        async with aclosing(self._changes(request, call)) as changes:
            async for name, cursor in changes:
                yield Event(cursor, b'{"features":%s,"cursor":"%s"}' % (self._text(name), cursor.encode()))

    async def _changes(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[tuple[str, str]]:
        """The instruments that changed, each with the cursor after it."""
        names = self._wanted(request.instruments)
        interval = _interval(request)
        newest = _published(request.cursor)
        with self._watching():
            told = dict(self._told_before(names, newest))
            await call.accept()
            due = self._clock()
            while True:
                for name in names:
                    known = self._known(name)
                    if told.get(name) == known:
                        continue
                    told[name] = known
                    entry = self._feature_cache.get(name)
                    newest = max(newest, 0 if entry is None else entry.snapshot.publish_time_ns)
                    yield name, str(newest)
                due += interval
                late = self._clock() - due
                if late > interval:  # whoever watches did not read
                    missed = math.floor(late / interval)
                    self.skipped += missed
                    due += missed * interval
                await asyncio.sleep(max(0.0, due - self._clock()))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Counts a watcher."""
        if self.watchers >= MOST_WATCHERS:
            raise TooManyWatchersError(self.watchers)
        self.watchers += 1
        try:
            yield
        finally:
            self.watchers -= 1

    def _told_before(self, names: Sequence[str], newest: int) -> Iterator[tuple[str, _Known]]:
        """What a watcher knows who was told of all that was published until an instant."""
        for name in names if newest else ():
            entry, known = self._feature_cache.get(name), self._known(name)
            if entry is not None and not known.problem and entry.snapshot.publish_time_ns <= newest - _OVERLAP_NS:
                yield name, known

    def _wanted(self, names: Sequence[str]) -> tuple[str, ...]:
        """The instruments that were asked for.

        Raises:
            UnknownInstrumentError: The server does not follow one of them.
        """
        for name in names:
            if name not in self._instruments:
                nearest = next(iter(difflib.get_close_matches(name, self._instruments, 1)), "")
                hint = f"; did you mean {nearest}?" if nearest else ""
                shown = json.dumps(name[:_MOST_SHOWN])
                raise UnknownInstrumentError(f"instruments: this server does not follow {shown}{hint}")
        return tuple(dict.fromkeys(names)) or self._instruments

    async def _newest_decisions(self, names: Sequence[str]) -> tuple[dict[str, audit_pb2.AuditedDecision], str]:
        """The newest decision of each instrument, and what could not be read; features are there without the audit."""
        wanted = reading_pb2.NewestDecisionsRequest(instruments=names)
        wanted.since.FromNanoseconds(self._wall_clock_ns() - _DECISIONS_OF_SECONDS * 1_000_000_000)
        try:
            answer = await self._lookups.ask(Question.NEWEST, wanted.SerializeToString())
        except AuditError as error:
            found = reading_pb2.NewestDecisionsResponse(incomplete=str(error))
        else:
            found = reading_pb2.NewestDecisionsResponse.FromString(answer)
        if found.incomplete:
            self.without_decisions += 1
            _log.warning("signals without decisions", problem=found.incomplete)
        return {one.packet.order.instrument: one for one in found.decisions}, found.incomplete

    def _known(self, name: str) -> _Known:
        entry = self._feature_cache.get(name)
        return _Known(0 if entry is None else entry.sequence, self._problem(entry))

    def _problem(self, entry: CachedFeatures | None) -> str:
        """Why no decision could use these features now; empty where one could."""
        if entry is None:
            return "no features"
        if entry.snapshot.state is BookState.UNKNOWN:
            return "book unknown"
        return "stale" if entry.age_seconds(self._clock()) > self._max_age_seconds else ""

    def _text(self, name: str) -> bytes:
        known = self._known(name)
        made = self._texts.get(name)
        if made is None or made[0] != known:
            made = self._texts[name] = known, json_of(self._features(name))
        return made[1]

    def _features(self, name: str, cache: FeatureCache | None = None) -> pb.InstrumentFeatures:
        """The newest features of an instrument, of `mf1` or of a computed set."""
        cache = cache or self._feature_cache
        entry = cache.get(name)
        problem = self._problem(entry)
        found = pb.InstrumentFeatures(instrument=name, usable=not problem, problem=problem)
        if entry is None:
            return found
        snapshot = entry.snapshot
        feature_set = cache.feature_set
        found.vector_version = feature_set.version  # every vector of another version is refused
        found.sequence = snapshot.sequence
        found.event_time.FromNanoseconds(snapshot.event_time_ns)
        found.published_at.FromNanoseconds(snapshot.publish_time_ns)
        found.book = _BOOKS[snapshot.state]
        if not math.isnan(snapshot.bid):
            found.bid = snapshot.bid
        if not math.isnan(snapshot.ask):
            found.ask = snapshot.ask
        values = zip(feature_set.names, snapshot.values.tolist(), strict=True)
        found.values.update({feature: value for feature, value in values if not math.isnan(value)})
        return found


def _interval(request: pb.WatchFeaturesRequest) -> float:
    """Seconds between two looks.

    Raises:
        InvalidRequestError: It is out of bounds.
    """
    if not request.HasField("interval"):
        return _DEFAULT_INTERVAL_SECONDS
    seconds = request.interval.seconds + request.interval.nanos / 1e9
    if not _SHORTEST_INTERVAL_SECONDS <= seconds <= _LONGEST_INTERVAL_SECONDS:
        raise InvalidRequestError(
            f"interval: must be {_SHORTEST_INTERVAL_SECONDS:g} s to {_LONGEST_INTERVAL_SECONDS:g} s, not {seconds:g} s"
        )
    return seconds


def _published(cursor: str) -> int:
    """The instant that a cursor stands for, in nanoseconds since the Unix epoch; 0 for none.

    Raises:
        InvalidRequestError: It is no cursor.
    """
    if not cursor:
        return 0
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 20):
        raise InvalidRequestError("cursor: must be that of an event of an earlier watch")
    return int(cursor)
