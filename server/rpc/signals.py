"""What the server knows of its instruments: the features of each from its own copies, and its newest decision.

Features are watched by looking at the copies again and again. Nothing is kept for a watcher but the sequences of the
vectors that it was told of, so one that does not read costs no memory, and gets the newest when it reads again. A
vector becomes JSON once, however many watch.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Final, NamedTuple

import structlog

from feature_cache.store.l1 import CachedFeatures, FeatureCache
from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Question, Reading
from server.errors import (
    AuditError,
    InvalidRequestError,
    TooManyWatchersError,
    UnknownSubjectError,
)
from server.rpc.call import Call
from server.rpc.events import Event, json_of
from server.rpc.feature_status import BOOKS, problem_of
from server.rpc.instruments import check_followed, shown
from server.rpc.steering import duration

_log = structlog.get_logger(__name__)

MOST_WATCHERS: Final = 64
"""Of features, in one process. Each looks at every instrument and set that it watches once in an interval, which costs
some 5 µs."""
_DEFAULT_INTERVAL_SECONDS: Final = 1.0
_SHORTEST_INTERVAL_SECONDS: Final = 0.1
_LONGEST_INTERVAL_SECONDS: Final = 60.0
_DECISIONS_OF_SECONDS: Final = 86_400
_OVERLAP_NS: Final = 1_000_000_000
"""Workers' clocks may differ by this much: a vector that was published so long before a cursor is told again."""
_AT_A_TIME: Final = 8
"""Instruments that are made into messages before other calls get their turn. One takes some 0.1 ms."""


class _Known(NamedTuple):
    """What a watcher was told of an instrument and set; another one is news."""

    sequence: int
    """0 without a vector."""
    problem: str


class Signals:
    """Answers `AdminService.ListSignals` and `AdminService.WatchFeatures`.

    Args:
        feature_cache: The server's copy of the vectors of `mf1`.
        other_caches: Its copies of the other sets that its models take, by id. More may come.
        instruments: Those that the server follows.
        max_age_seconds: Older features are not usable.
        lookups: Answers which decisions are the newest.
        clock: Monotonic seconds.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        feature_cache: FeatureCache,
        other_caches: Mapping[str, FeatureCache],
        instruments: tuple[str, ...],
        max_age_seconds: float,
        lookups: Reading,
        clock: Callable[[], float],
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._feature_cache = feature_cache
        self._other_caches = other_caches
        self._instruments = instruments
        self._max_age_seconds = max_age_seconds
        self._lookups = lookups
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._texts: dict[tuple[str, str], tuple[_Known, bytes]] = {}
        """The newest of each set and instrument as JSON."""
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
            others = [self._features(cache, name) for cache in self._other_caches.values()]
            signal = response.signals.add(instrument=name, features=self._features(self._feature_cache, name))
            signal.other_features.extend(others)
            if (entry := self._feature_cache.get(name)) is not None:
                signal.age.CopyFrom(duration(entry.age_seconds(self._clock())))
            if (decision := decisions.get(name)) is not None:
                signal.decision.CopyFrom(decision)
            if not number % _AT_A_TIME:
                await asyncio.sleep(0)
        return response

    async def watch(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[pb.WatchFeaturesResponse]:
        """Features as they change.

        Raises:
            UnknownInstrumentError, UnknownSubjectError, InvalidRequestError, TooManyWatchersError: Nothing is watched.
        """
        async with aclosing(self._changes(request, call)) as changes:
            async for cache, name, cursor in changes:
                yield pb.WatchFeaturesResponse(features=self._features(cache, name), cursor=cursor)

    async def watch_json(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[Sequence[Event]]:
        """The same as JSON."""
        async with aclosing(self._changes(request, call)) as changes:
            async for cache, name, cursor in changes:
                text = self._text(cache, name)
                yield (Event(cursor, b'{"features":%s,"cursor":"%s"}' % (text, cursor.encode())),)

    async def _changes(
        self, request: pb.WatchFeaturesRequest, call: Call
    ) -> AsyncGenerator[tuple[FeatureCache, str, str]]:
        """The copies and instruments that changed, each with the cursor after it."""
        names, caches = self._wanted(request.instruments), self._wanted_caches(request.feature_sets)
        looked_at = [(cache, name) for cache in caches for name in names]
        interval = _interval(request)
        newest = _published(request.cursor)
        with self._watching():
            told = dict(self._told_before(looked_at, newest))
            await call.accept()
            due = self._clock()
            while True:
                for one in looked_at:
                    cache, name = one
                    known = self._known(cache, name)
                    if told.get(one) == known:
                        continue
                    told[one] = known
                    entry = cache.get(name)
                    newest = max(newest, 0 if entry is None else entry.snapshot.publish_time_ns)
                    yield cache, name, str(newest)
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

    def _told_before(
        self, looked_at: Sequence[tuple[FeatureCache, str]], newest: int
    ) -> Iterator[tuple[tuple[FeatureCache, str], _Known]]:
        """What a watcher knows who was told of all that was published until an instant."""
        for cache, name in looked_at if newest else ():
            entry, known = cache.get(name), self._known(cache, name)
            if entry is not None and not known.problem and entry.snapshot.publish_time_ns <= newest - _OVERLAP_NS:
                yield (cache, name), known

    def _wanted(self, names: Sequence[str]) -> tuple[str, ...]:
        """The instruments that were asked for.

        Raises:
            UnknownInstrumentError: The server does not follow one of them.
        """
        for name in names:
            check_followed("instruments", name, self._instruments)
        return tuple(dict.fromkeys(names)) or self._instruments

    def _wanted_caches(self, set_ids: Sequence[str]) -> tuple[FeatureCache, ...]:
        """The copies of the sets that were asked for.

        Raises:
            UnknownSubjectError: The server does not follow one of them.
        """
        mf1 = self._feature_cache
        caches = {mf1.feature_set.id: mf1} | dict(self._other_caches)
        for set_id in set_ids:
            if set_id not in caches:
                raise UnknownSubjectError(
                    f"feature_sets: this server does not follow {shown(set_id)}; it follows {', '.join(caches)}"
                )
        return tuple(caches[set_id] for set_id in dict.fromkeys(set_ids)) or (mf1,)

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

    def _known(self, cache: FeatureCache, name: str) -> _Known:
        entry = cache.get(name)
        return _Known(0 if entry is None else entry.sequence, self._problem(entry))

    def _problem(self, entry: CachedFeatures | None) -> str:
        return problem_of(entry, self._clock(), self._max_age_seconds)

    def _text(self, cache: FeatureCache, name: str) -> bytes:
        key, known = (cache.feature_set.id, name), self._known(cache, name)
        made = self._texts.get(key)
        if made is None or made[0] != known:
            made = self._texts[key] = known, json_of(self._features(cache, name))
        return made[1]

    def _features(self, cache: FeatureCache, name: str) -> pb.InstrumentFeatures:
        """The newest features of an instrument in one set."""
        feature_set, entry = cache.feature_set, cache.get(name)
        problem = self._problem(entry)
        # A copy refuses every vector of another version.
        found = pb.InstrumentFeatures(
            instrument=name, usable=not problem, problem=problem, vector_version=feature_set.version
        )
        if entry is None:
            return found
        snapshot = entry.snapshot
        found.sequence = snapshot.sequence
        found.event_time.FromNanoseconds(snapshot.event_time_ns)
        found.published_at.FromNanoseconds(snapshot.publish_time_ns)
        found.book = BOOKS[snapshot.state]
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
