from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache.features import MF1, N_FEATURES
from feature_cache.store.codec import BookState, CodecError, FeatureSnapshot, Heads, decode, encode

head_of = Heads(MF1).read
TIMES = st.integers(-(2**63), 2**63 - 1)
SNAPSHOTS = st.builds(
    FeatureSnapshot,
    instrument=st.text(st.characters(codec="utf-8"), max_size=60).filter(lambda name: len(name.encode()) < 256),
    sequence=TIMES,
    event_time_ns=TIMES,
    book_time_ns=TIMES,
    trade_time_ns=TIMES,
    publish_time_ns=TIMES,
    transit_ns=TIMES,
    bid=st.floats(),
    ask=st.floats(),
    state=st.sampled_from(BookState),
    values=arrays(np.float32, N_FEATURES, elements=st.floats(width=32)),
)


@given(SNAPSHOTS)
def test_a_snapshot_comes_back_as_it_was(snapshot: FeatureSnapshot) -> None:
    again = decode(encode(snapshot))
    for name in FeatureSnapshot.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(snapshot, name))
    assert encode(again) == encode(snapshot)


@given(SNAPSHOTS)
def test_the_head_of_a_vector_says_what_the_whole_of_it_says(snapshot: FeatureSnapshot) -> None:
    name, *rest = head_of(encode(snapshot))
    assert name.decode() == snapshot.instrument
    assert rest == [snapshot.sequence, snapshot.publish_time_ns, snapshot.transit_ns]


@given(st.binary(max_size=400))
def test_a_head_is_refused_where_the_whole_would_be(garbage: bytes) -> None:
    with pytest.raises(CodecError):
        head_of(garbage)


@given(SNAPSHOTS, st.integers(0, 400))
def test_a_cut_or_lengthened_vector_is_refused(snapshot: FeatureSnapshot, size: int) -> None:
    packed = encode(snapshot)
    for broken in (packed[: min(size, len(packed) - 1)], packed + b"\0"):
        with pytest.raises(CodecError):
            decode(broken)


@given(st.binary(max_size=400))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(CodecError):
        decode(garbage)


@pytest.mark.parametrize(("at", "what"), [(0, "magic"), (4, "fingerprint"), (72, "BookState"), (73, "bytes")])
def test_the_message_says_what_is_wrong(at: int, what: str) -> None:
    packed = bytearray(
        encode(FeatureSnapshot("A.B", 1, 2, 3, 4, 5, 6, 7.0, 8.0, BookState.VALID, np.zeros(N_FEATURES, np.float32)))
    )
    packed[at] ^= 0xFF
    for read in (decode, head_of):
        with pytest.raises(CodecError, match=what):
            read(bytes(packed))


@given(arrays(np.float32, (3, N_FEATURES), elements=st.floats(width=32)))
def test_turning_for_a_sell_twice_gives_the_vector_back(
    values: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> None:
    np.testing.assert_array_equal(MF1.for_sell(MF1.for_sell(values)), values)


def of_a_guest() -> bytes:
    return encode(
        FeatureSnapshot("A.B", 1, 2, 3, 4, 5, 6, 7.0, 8.0, BookState.VALID, np.arange(3, dtype=np.float32), MIXED)
    )


def test_a_vector_is_unpacked_by_the_set_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, REGISTERED)
    again = decode(of_a_guest())
    assert (again.feature_set, again.values.tolist(), again.instrument) == (MIXED, [0.0, 1.0, 2.0], "A.B")
    assert Heads(MIXED).read(of_a_guest()) == (b"A.B", 1, 5, 6)


def test_a_vector_of_a_set_that_is_not_wanted_or_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch)
    with pytest.raises(CodecError, match=f"{MIXED.fingerprint:08x} is of no set known here: {MF1.version}"):
        decode(of_a_guest())
    with pytest.raises(CodecError, match=f"{MIXED.fingerprint:08x} is not mf1's {MF1.fingerprint:08x}"):
        head_of(of_a_guest())
