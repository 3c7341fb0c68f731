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
from server.errors import InvalidRequestError, TooManyWatchersError, UnknownInstrumentError
from server.rpc.call import Call
from server.rpc.signals import MOST_WATCHERS, Signals

_NAMES = ("A.SIM", "B.SIM")
_LONG_SECONDS = 600.0
"""However long a busy machine takes to look decisions up, features are neither stale nor gone."""
_KEPT = FeatureCacheSettings(ttl_seconds=_LONG_SECONDS)


@pytest.fixture
def cache() -> FeatureCache:
    return FeatureCache("redis://127.0.0.1:1/0", _KEPT, _NAMES)


@pytest.fixture
async def signals(tmp_path: Path, cache: FeatureCache) -> AsyncIterator[Signals]:
    task = Task(journal=tmp_path / "journal.db", database_url=f"sqlite:///{tmp_path / 'audit.db'}", model_store=None)
    async with ReadingProcess("reads", task) as process:
        yield Signals(cache, _NAMES, _LONG_SECONDS, Reading("lookups", process), time.monotonic, time.time_ns)


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


async def test_features_of_the_other_sets_that_models_take_are_shown_beside_those_of_mf1(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    mixed = FeatureCache("redis://127.0.0.1:1/0", _KEPT, _NAMES, MIXED)
    task = Task(journal=tmp_path / "journal.db", database_url="sqlite://", model_store=None)
    lookups = Reading("lookups", ReadingProcess("reads", task))
    signals = Signals(cache, _NAMES, _LONG_SECONDS, lookups, time.monotonic, time.time_ns, lambda: {"mixed": mixed})
    put(cache, "A.SIM", 1)
    values = np.array([np.nan, 7.0, np.nan], dtype=np.float32)
    assert mixed.accept(encode(replace(snapshot("A.SIM", 3), values=values, feature_set=MIXED)))
    first, second = (await signals.list(pb.ListSignalsRequest())).signals
    (of_set,) = first.sets
    assert (of_set.features.vector_version, of_set.features.usable) == (MIXED.version, True)
    assert (dict(of_set.features.values), of_set.features.sequence) == ({"trades": 7.0}, 3)
    assert of_set.HasField("age")
    assert first.features.vector_version == MF1.version
    assert [(one.features.problem, one.HasField("age")) for one in second.sets] == [("no features", False)]


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
        events = [await anext(watch), await anext(watch)]
    assert [json.loads(one.text)["features"]["instrument"] for one in events] == ["A.SIM", "B.SIM"]
    assert all(json.loads(one.text)["cursor"] == one.cursor for one in events)
    again = pb.WatchFeaturesRequest(cursor=events[-1].cursor)
    async with aclosing(signals.watch(again, Call(None, ()))) as watch:
        assert (await anext(watch)).features.instrument == "B.SIM", "so young that it may have been missed"


async def test_a_watcher_who_does_not_read_skips_and_is_counted(cache: FeatureCache, tmp_path: Path) -> None:
    task = Task(journal=tmp_path / "journal.db", database_url="sqlite://", model_store=None)
    ahead = 0.0
    lookups = Reading("lookups", ReadingProcess("reads", task))
    signals = Signals(cache, _NAMES, _LONG_SECONDS, lookups, lambda: time.monotonic() + ahead, time.time_ns)
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
