"""What the in-process copy takes and gives, without a Redis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from structlog.testing import capture_logs

from feature_cache.features import N_FEATURES
from feature_cache.store import codec, l1
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings

NAME = "BTCUSDT.BINANCE"
NOW_NS = 1_700_000_000_000_000_000


@dataclass
class Clocks:
    monotonic_seconds: float = 1000.0
    wall_ns: int = NOW_NS

    def advance(self, seconds: float) -> None:
        self.monotonic_seconds += seconds
        self.wall_ns += round(seconds * 1e9)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def cache(clocks: Clocks) -> FeatureCache:
    return FeatureCache(
        "redis://unused",
        FeatureCacheSettings(ttl_seconds=10),
        [NAME, "ETHUSDT.BINANCE"],
        monotonic=lambda: clocks.monotonic_seconds,
        wall_ns=lambda: clocks.wall_ns,
    )


def packed(sequence: int, publish_time_ns: int = NOW_NS, instrument: str = NAME, transit_ns: int = 0) -> bytes:
    values = np.full(N_FEATURES, sequence, np.float32)
    return encode(
        FeatureSnapshot(
            instrument=instrument,
            sequence=sequence,
            event_time_ns=1,
            book_time_ns=1,
            trade_time_ns=1,
            publish_time_ns=publish_time_ns,
            transit_ns=transit_ns,
            bid=1.0,
            ask=2.0,
            state=BookState.VALID,
            values=values,
        )
    )


def sequence_of(cache: FeatureCache) -> int | None:
    entry = cache.get(NAME)
    return entry.snapshot.sequence if entry else None


def test_an_older_vector_never_replaces_a_newer_one(cache: FeatureCache) -> None:
    assert [cache.accept(packed(sequence)) for sequence in (5, 4, 5, 6)] == [True, False, False, True]
    assert sequence_of(cache) == 6
    assert (cache.updates, cache.outdated) == (2, 1)


def test_age_counts_from_the_event_and_goes_on_by_the_monotonic_clock(cache: FeatureCache, clocks: Clocks) -> None:
    cache.accept(packed(1, publish_time_ns=NOW_NS - 200_000_000, transit_ns=50_000_000))
    entry = cache.get(NAME)
    assert entry is not None
    assert entry.age_seconds(clocks.monotonic_seconds) == pytest.approx(0.25)
    clocks.monotonic_seconds += 2
    clocks.wall_ns -= 3600 * 10**9  # a jump of the wall clock changes nothing
    assert entry.age_seconds(clocks.monotonic_seconds) == pytest.approx(2.25)
    assert sequence_of(cache) == 1


def test_a_vector_is_dropped_when_it_outlives_its_ttl(cache: FeatureCache, clocks: Clocks) -> None:
    cache.accept(packed(9, publish_time_ns=NOW_NS - 4 * 10**9))
    clocks.advance(5.9)
    assert sequence_of(cache) == 9
    clocks.advance(0.2)
    assert sequence_of(cache) is None
    assert cache.expired == 1


def test_a_vector_that_is_too_old_already_is_not_taken(cache: FeatureCache) -> None:
    cache.accept(packed(1))
    assert not cache.accept(packed(2, publish_time_ns=NOW_NS - 11 * 10**9))
    assert sequence_of(cache) == 1


def test_a_vector_from_beyond_our_clock_has_no_age_and_is_not_taken(cache: FeatureCache, clocks: Clocks) -> None:
    with capture_logs() as lines:
        assert cache.accept(packed(1, publish_time_ns=NOW_NS + 900_000_000)), "clocks differ a little"
        for sequence in range(2, 6):
            assert not cache.accept(packed(sequence, publish_time_ns=NOW_NS + 5 * 10**9))
    assert (cache.ahead, sequence_of(cache)) == (4, 1)
    assert [line["lead_seconds"] for line in lines] == [5.0, 5.0, 5.0], "the 1st, 2nd and 4th"
    clocks.advance(4.5)
    assert cache.accept(packed(6, publish_time_ns=NOW_NS + 5 * 10**9))


def test_sequences_may_begin_again_once_the_last_one_has_expired(cache: FeatureCache, clocks: Clocks) -> None:
    cache.accept(packed(100))
    clocks.advance(10.1)
    assert cache.accept(packed(1, publish_time_ns=clocks.wall_ns))
    assert sequence_of(cache) == 1


def test_garbage_is_counted_and_what_is_there_stays(cache: FeatureCache) -> None:
    cache.accept(packed(1))
    for garbage in (b"", b"garbage", packed(2)[:-1], b"PTF1" + bytes(200)):
        assert not cache.accept(garbage)
    assert cache.rejected == 4
    assert sequence_of(cache) == 1


def test_instruments_that_are_not_followed_are_ignored(cache: FeatureCache) -> None:
    assert not cache.accept(packed(1, instrument="OTHER.BINANCE"))
    assert cache.get("OTHER.BINANCE") is None
    assert cache.get("ETHUSDT.BINANCE") is None
    assert cache.instruments == (NAME, "ETHUSDT.BINANCE")


def test_a_vector_is_unpacked_once_and_only_when_it_is_asked_for(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[bytes] = []

    def decode(packed: bytes) -> FeatureSnapshot:
        unpacked.append(packed)
        return codec.decode(packed)

    monkeypatch.setattr(l1, "decode", decode)
    for sequence in range(1, 100):
        assert cache.accept(packed(sequence))
    entry = cache.get(NAME)
    assert entry is not None
    assert not unpacked
    assert entry.snapshot is entry.snapshot
    assert unpacked == [packed(99)]
