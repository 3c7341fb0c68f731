"""What the server knows of its instruments, from a real copy of the features beside a process that reads an audit."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.followed_cache import snapshot
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache.features import MF1
from feature_cache.store.codec import BookState, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from pretrade.admin.v1 import admin_pb2 as pb
from server.audit.reading.reading import Reading, ReadingProcess, Task
from server.errors import InvalidRequestError, TooManyWatchersError, UnknownInstrumentError, UnknownSubjectError
from server.rpc.call import Call
from server.rpc.signals import MOST_WATCHERS, Signals

_NAMES = ("A.SIM", "B.SIM")
_MAX_AGE_SECONDS = 3_600.0
"""A machine with other work takes long to start the process that reads."""
_SETTINGS = FeatureCacheSettings(ttl_seconds=_MAX_AGE_SECONDS)


@pytest.fixture
def cache() -> FeatureCache:
    return FeatureCache("redis://127.0.0.1:1/0", _SETTINGS, _NAMES)


@pytest.fixture
def others() -> dict[str, FeatureCache]:
    """The copies of other sets."""
    return {}


@pytest.fixture
async def signals(tmp_path: Path, cache: FeatureCache, others: dict[str, FeatureCache]) -> AsyncIterator[Signals]:
    task = Task(journal=tmp_path / "journal.db", database_url=f"sqlite:///{tmp_path / 'audit.db'}", model_store=None)
    async with ReadingProcess("reads", task) as process:
        yield Signals(
            cache, others, _NAMES, _MAX_AGE_SECONDS, Reading("lookups", process), time.monotonic, time.time_ns
        )


def put(cache: FeatureCache, name: str, sequence: int, published_ns: int | None = None) -> None:
    made = snapshot(name, sequence)
    assert cache.accept(encode(replace(made, publish_time_ns=published_ns or made.publish_time_ns)))


async def test_features_are_shown_by_name_and_without_the_audit(signals: Signals, cache: FeatureCache) -> None:
    made = snapshot("A.SIM", 7)
    values = np.where(np.arange(len(MF1.names)) == 2, np.nan, made.values).astype(np.float32)
    assert cache.accept(encode(replace(made, values=values, ask=float("nan"), state=BookState.LOCKED)))
    found = await signals.list(pb.ListSignalsRequest())
    first, second = found.signals
    assert (first.instrument, first.features.usable, first.features.sequence) == ("A.SIM", True, 7)
    assert first.HasField("age")
    assert (first.features.bid, first.features.HasField("ask")) == (1.0, False)
    assert first.features.book == pb.BOOK_STATE_LOCKED
    assert dict(first.features.values) == {name: float(i) for i, name in enumerate(MF1.names) if i != 2}
    assert (second.features.usable, second.features.problem) == (False, "no features")
    assert not second.HasField("age")
    assert found.incomplete, "there is neither database nor journal"
    assert signals.without_decisions == 1


async def test_an_instrument_that_is_not_followed_is_named_with_the_nearest(signals: Signals) -> None:
    with pytest.raises(UnknownInstrumentError, match=re.escape('does not follow "A.SIN"; did you mean A.SIM?')):
        await signals.list(pb.ListSignalsRequest(instruments=["A.SIN"]))
    with pytest.raises(UnknownInstrumentError):
        await anext(signals.watch(pb.WatchFeaturesRequest(instruments=["A.SIN"]), Call(None, ())))


async def test_a_watcher_gets_each_first_and_then_what_changed_alone(signals: Signals, cache: FeatureCache) -> None:
    put(cache, "A.SIM", 1)
    request = pb.WatchFeaturesRequest()
    request.interval.FromMilliseconds(100)
    async with aclosing(signals.watch(request, Call(None, ()))) as watch:
        told = [await anext(watch), await anext(watch)]
        assert [(one.features.instrument, one.features.usable) for one in told] == [("A.SIM", True), ("B.SIM", False)]
        for sequence in (2, 3, 4):
            put(cache, "B.SIM", sequence)
        async with asyncio.timeout(30.0):
            newest = await anext(watch)
        assert (newest.features.instrument, newest.features.sequence) == ("B.SIM", 4), "the newest and no other"
        assert signals.watchers == 1
    assert signals.watchers == 0


async def test_a_watcher_who_comes_back_is_not_told_again_of_what_is_old(signals: Signals, cache: FeatureCache) -> None:
    now = time.time_ns()
    put(cache, "A.SIM", 1, now - 3_000_000_000)
    put(cache, "B.SIM", 1, now)
    async with aclosing(signals.watch_json(pb.WatchFeaturesRequest(), Call(None, ()))) as watch:
        events = [*await anext(watch), *await anext(watch)]
    assert [json.loads(one.text)["features"]["instrument"] for one in events] == ["A.SIM", "B.SIM"]
    assert all(json.loads(one.text)["cursor"] == one.cursor for one in events)
    again = pb.WatchFeaturesRequest(cursor=events[-1].cursor)
    async with aclosing(signals.watch(again, Call(None, ()))) as watch:
        assert (await anext(watch)).features.instrument == "B.SIM", "so young that it may have been missed"


async def test_a_watcher_who_does_not_read_skips_and_is_counted(cache: FeatureCache, tmp_path: Path) -> None:
    task = Task(journal=tmp_path / "journal.db", database_url="sqlite://", model_store=None)
    ahead = 0.0
    lookups = Reading("lookups", ReadingProcess("reads", task))
    signals = Signals(cache, {}, _NAMES, _MAX_AGE_SECONDS, lookups, lambda: time.monotonic() + ahead, time.time_ns)
    put(cache, "A.SIM", 1)
    request = pb.WatchFeaturesRequest(instruments=["A.SIM"])
    request.interval.FromMilliseconds(100)
    async with aclosing(signals.watch(request, Call(None, ()))) as watch:
        await anext(watch)
        for sequence in range(2, 6):
            put(cache, "A.SIM", sequence)
        ahead = 1.0  # seconds in which it did not read
        async with asyncio.timeout(30.0):
            assert (await anext(watch)).features.sequence == 5
    assert signals.skipped >= 9


@pytest.mark.parametrize("seconds", [0.05, 61.0, -1.0])
async def test_an_interval_out_of_bounds_is_refused(signals: Signals, seconds: float) -> None:
    request = pb.WatchFeaturesRequest()
    request.interval.FromMilliseconds(int(seconds * 1e3))
    with pytest.raises(InvalidRequestError, match=r"interval: must be 0\.1 s to 60 s"):
        await anext(signals.watch(request, Call(None, ())))


async def test_a_cursor_that_is_none_is_refused(signals: Signals) -> None:
    with pytest.raises(InvalidRequestError, match="cursor: "):
        await anext(signals.watch(pb.WatchFeaturesRequest(cursor="a:1"), Call(None, ())))


async def test_more_watchers_than_may_are_refused(signals: Signals) -> None:
    watching = [signals.watch(pb.WatchFeaturesRequest(), Call(None, ())) for _ in range(MOST_WATCHERS)]
    for one in watching:
        await anext(one)
    with pytest.raises(TooManyWatchersError):
        await anext(signals.watch(pb.WatchFeaturesRequest(), Call(None, ())))
    for one in watching:
        await one.aclose()
    await anext(signals.watch(pb.WatchFeaturesRequest(), Call(None, ())))


async def test_other_sets_are_shown_and_watched_by_their_ids(
    signals: Signals, cache: FeatureCache, others: dict[str, FeatureCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    put(cache, "A.SIM", 1)
    request = pb.WatchFeaturesRequest(instruments=["A.SIM"], feature_sets=["mixed", "mf1"])
    with pytest.raises(UnknownSubjectError, match=r'feature_sets: .*"mixed"; it follows mf1$'):
        await anext(signals.watch(request, Call(None, ())))
    mixed = others["mixed"] = FeatureCache("redis://127.0.0.1:1/0", _SETTINGS, _NAMES, MIXED)
    (signal,) = (await signals.list(pb.ListSignalsRequest(instruments=["A.SIM"]))).signals
    (missing,) = signal.other_features
    assert (missing.vector_version, missing.problem, missing.usable) == (MIXED.version, "no features", False)
    values = np.array([np.nan, 3.0, np.nan], dtype=np.float32)
    assert mixed.accept(encode(replace(snapshot("A.SIM", 7), values=values, feature_set=MIXED)))
    (signal,) = (await signals.list(pb.ListSignalsRequest(instruments=["A.SIM"]))).signals
    assert (signal.features.vector_version, signal.features.sequence) == (MF1.version, 1)
    (found,) = signal.other_features
    assert (found.instrument, found.usable, found.sequence) == ("A.SIM", True, 7)
    assert dict(found.values) == {"trades": 3.0}, "what has another source is not in the vector"
    async with aclosing(signals.watch_json(request, Call(None, ()))) as watch:
        events = [json.loads(one.text)["features"] for _ in range(2) for one in await anext(watch)]
    assert [one["vector_version"] for one in events] == [MIXED.version, MF1.version]
    async with aclosing(signals.watch(pb.WatchFeaturesRequest(instruments=["A.SIM"]), Call(None, ()))) as watch:
        assert (await anext(watch)).features.vector_version == MF1.version
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await anext(watch)
