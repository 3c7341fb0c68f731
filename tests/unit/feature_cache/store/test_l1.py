"""What the in-process copy takes and gives, without a Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hiredis import PushNotification
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from support.twins import compiled_here

from feature_cache.features import N_FEATURES
from feature_cache.store import codec, l1
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import CachedFeatures, FeatureCache, FeatureCacheSettings
from feature_cache.store.vectors import key_of

NAME = "BTCUSDT.BINANCE"
OTHER = "ETHUSDT.BINANCE"
NOW_NS = 1_700_000_000_000_000_000
COUNTED = ("updates", "outdated", "rejected", "expired", "ahead")
FOREVER_NS = 2**63 - 1
BY_NAME = key_of(NAME).encode()
"""The channel that its vectors come by."""
STATE_AT, LENGTH_AT = 72, 73
"""Where they are in a vector."""


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
    return new_cache(clocks)


def new_cache(clocks: Clocks) -> FeatureCache:
    return FeatureCache(
        "redis://unused",
        FeatureCacheSettings(ttl_seconds=10),
        [NAME, OTHER],
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


def message(packed: bytes, channel: str = NAME, kind: bytes = b"message") -> list[object]:
    return [kind, key_of(channel).encode(), packed]


def changed(vector: bytes, at: int, value: int) -> bytes:
    """A vector with one byte changed."""
    return vector[:at] + bytes([value]) + vector[at + 1 :]


def vectors() -> st.SearchStrategy[bytes]:
    """Mostly as workers write them."""
    near = st.integers(-2_000_000_000, 2_000_000_000) | st.integers(-11_000_000_000, -9_000_000_000)
    made = st.builds(
        packed,
        sequence=st.integers(0, 9) | st.sampled_from([-FOREVER_NS, FOREVER_NS]),
        publish_time_ns=near.map(lambda ns: NOW_NS + ns) | st.sampled_from([-FOREVER_NS, 0, FOREVER_NS]),
        instrument=st.sampled_from([NAME, NAME, OTHER, NAME[:-1], "OTHER.BINANCE"]),
        transit_ns=st.integers(0, 10**9) | st.sampled_from([-FOREVER_NS, -1, FOREVER_NS]),
    )
    damaged = st.builds(changed, made, st.sampled_from([0, 4, STATE_AT, LENGTH_AT, 80, 150]), st.integers(0, 255))
    cut = st.builds(lambda vector, length: vector[:length], made, st.sampled_from([0, 4, LENGTH_AT, 74, 100]))
    return made | made | made | damaged | cut


def messages() -> st.SearchStrategy[object]:
    """What a subscription may bring."""
    kinds = st.sampled_from([b"message", b"message", b"smessage", b"pong"])
    others = st.sampled_from([b"PONG", [b"pong", b""], [b"subscribe", b"x", 1], [b"subscribe", BY_NAME, 1]])
    named = st.builds(message, vectors(), st.sampled_from([NAME, NAME, OTHER, "OTHER.BINANCE"]), kinds)
    return named | named | others


def check_the_same(bursts: list[tuple[list[Any], float]]) -> None:
    """Holds the compiled twin to what Python does with some bursts and the seconds after each."""
    clocks = Clocks()
    compiled, python = new_cache(clocks), new_cache(clocks)
    compiled.plain, python.plain = compiled_here("feature_cache.store.l1_c").Plain(compiled, CachedFeatures), None
    for burst, seconds in bursts:
        with capture_logs():
            compiled.take(iter(burst))
            python.take(iter(burst))
        assert [getattr(compiled, name) for name in COUNTED] == [getattr(python, name) for name in COUNTED]
        for name in (NAME, OTHER):
            found, expected = compiled.get(name), python.get(name)
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert found.sequence == expected.sequence == found.snapshot.sequence
                assert found.snapshot.publish_time_ns == expected.snapshot.publish_time_ns
                assert found.age_seconds(clocks.monotonic_seconds) == expected.age_seconds(clocks.monotonic_seconds)
        clocks.advance(seconds)


@given(bursts=st.lists(st.tuples(st.lists(messages(), max_size=6), st.floats(0, 11))))
def test_compiled_and_python_take_the_same(bursts: list[tuple[list[Any], float]]) -> None:
    check_the_same(bursts)


@pytest.mark.parametrize(
    "special",
    [
        message(packed(2)),
        message(packed(1)),
        message(packed(3), kind=b"smessage"),
        message(packed(3), kind=b"pong"),
        message(packed(3), channel=OTHER),
        message(packed(3, instrument=NAME[:-1])),
        message(packed(3, instrument=f"{NAME}S")),
        message(packed(3, instrument=NAME.replace("B", "C"))),
        message(packed(3, publish_time_ns=NOW_NS + 1_000_000_000)),
        message(packed(3, publish_time_ns=NOW_NS + 1_000_000_001)),
        message(packed(3, publish_time_ns=NOW_NS - 10_000_000_000)),
        message(packed(3, publish_time_ns=NOW_NS - 10_000_000_001)),
        message(packed(3, publish_time_ns=NOW_NS + 900_000_000, transit_ns=100_000_000)),
        message(packed(3, publish_time_ns=-FOREVER_NS)),
        message(packed(3, publish_time_ns=FOREVER_NS)),
        message(packed(3, transit_ns=-FOREVER_NS)),
        message(packed(3, transit_ns=FOREVER_NS)),
        message(packed(3, publish_time_ns=NOW_NS - 1, transit_ns=FOREVER_NS)),
        message(packed(3, publish_time_ns=-7 * 10**18, transit_ns=10**18)),
        message(packed(FOREVER_NS)),
        message(packed(-FOREVER_NS)),
        message(b""),
        message(packed(3)[:-1]),
        message(packed(3) + b"?"),
        message(changed(packed(3), 0, 0)),
        message(changed(packed(3), 7, 0)),
        message(changed(packed(3), STATE_AT, 3)),
        message(changed(packed(3), STATE_AT, 255)),
        message(changed(packed(3), LENGTH_AT, 14)),
        [b"pong", b""],
        [b"message", BY_NAME, packed(3), b"more"],
        [b"subscribe", BY_NAME, 1],
        PushNotification([b"message", BY_NAME, packed(3)]),
        b"PONG",
    ],
)
def test_compiled_and_python_take_what_is_special_the_same(special: Any) -> None:
    check_the_same([([message(packed(2)), special], 0.5), ([message(packed(4))], 0.5)])


def test_what_workers_write_is_taken_by_compiled_code(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.plain = compiled_here("feature_cache.store.l1_c").Plain(cache, CachedFeatures)

    def accept(_: object, __: object = None) -> bool:
        pytest.fail("it is plain")

    monkeypatch.setattr(cache, "accept", accept)
    cache.take(iter([message(packed(1)), message(packed(1, instrument=OTHER), OTHER, b"smessage"), b"PONG"]))
    assert cache.updates == 2
    assert sequence_of(cache) == 1
