"""The recorded Binance session through feed, book and engine."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.publisher import with_resets, with_snapshots
from feature_cache.sources.session import SessionError, instruments, read_session, session_files
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[4] / ".." / "shared" / "data" / "binance_spot"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
BTC, ETH = "BTCUSDT.BINANCE", "ETHUSDT.BINANCE"


@dataclass
class Walk:
    """What is seen of one instrument on the way."""

    engine: FeatureEngine
    quote: tuple[int, ...] = (0,)
    shared: int = 0
    equal: int = 0
    before_snapshot: int = 0
    known_before_snapshot: int = 0
    snapshots: int = 0
    kinds: set[str | None] = field(default_factory=set)
    transits_ns: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def walks() -> dict[str, Walk]:
    """The whole session, every event once."""
    walks = {name: Walk(FeatureEngine(name)) for name in (BTC, ETH)}
    for event in read_session(session_files([DATA])):
        walk = walks[event.instrument]
        walk.engine.on_event(event)
        kind = event.WhichOneof("event")
        walk.kinds.add(kind)
        walk.snapshots += kind == "snapshot"
        if not walk.snapshots:
            walk.before_snapshot += 1
            walk.known_before_snapshot += not np.isnan(walk.engine.snapshot().values).all()
        elif kind == "quote":
            quote = event.quote
            walk.quote = (quote.update_id, quote.bid_ticks, quote.bid_lots, quote.ask_ticks, quote.ask_lots)
        elif kind == "delta":
            book = walk.engine.book
            bid, ask = book.bids.best(), book.asks.best()
            if bid and ask and walk.quote[0] == book.last_update_id:
                walk.shared += 1
                walk.equal += walk.quote[1:] == (*bid, *ask)
        if walk.engine.events % 100 == 0:
            walk.transits_ns.append(walk.engine.snapshot().transit_ns)
    return walks


@pytest.mark.long
@recorded
@pytest.mark.parametrize(("name", "shared"), [(BTC, 1059), (ETH, 992)])
def test_our_best_levels_equal_book_ticker_at_every_shared_update_id(
    walks: dict[str, Walk], name: str, shared: int
) -> None:
    assert (walks[name].shared, walks[name].equal) == (shared, shared)


@pytest.mark.long
@recorded
@pytest.mark.parametrize("name", [BTC, ETH])
def test_there_is_no_gap_no_crossing_and_nothing_stale(walks: dict[str, Walk], name: str) -> None:
    walk = walks[name]
    assert walk.kinds == {"snapshot", "delta", "quote", "trade"}
    engine = walk.engine
    assert (engine.book.gaps, engine.book.crossings, engine.stale, engine.future, engine.time_restarts) == (0,) * 5
    assert engine.state is BookState.VALID


@pytest.mark.long
@recorded
@pytest.mark.parametrize("name", [BTC, ETH])
def test_there_are_no_features_before_the_snapshot_and_all_of_them_at_the_end(
    walks: dict[str, Walk], name: str
) -> None:
    walk = walks[name]
    assert walk.before_snapshot > 3
    assert walk.known_before_snapshot == 0
    final = walk.engine.snapshot()
    assert np.isfinite(final.values).all()
    assert final.ask - final.bid == pytest.approx(0.01)


@pytest.mark.long
@recorded
@pytest.mark.parametrize("name", [BTC, ETH])
def test_a_clock_that_runs_behind_the_exchange_does_not_show_as_transit(walks: dict[str, Walk], name: str) -> None:
    transits = walks[name].transits_ns
    assert min(transits) >= 0
    assert max(transits) < 50_000_000, "the lag varies by less than 50 ms around -1.27 s"


@recorded
@pytest.mark.parametrize(
    ("ahead_seconds", "oldest_seconds", "youngest_seconds"), [(0.0, 0.05, 0.0), (1.27, 0.05, 0.0), (61.27, 61, 59)]
)
def test_ages_do_not_depend_on_the_local_clock_unless_the_feed_may_be_late(
    ahead_seconds: float, oldest_seconds: float, youngest_seconds: float
) -> None:
    """The recorded clock runs 1.27 s behind the exchange; put ahead, it looks as if the feed were late."""
    engine = FeatureEngine(BTC)
    ages: list[float] = []
    for event in itertools.islice(_of(BTC), 10_000):
        event.receive_time_ns += round(ahead_seconds * 1e9)
        event.publish_time_ns = event.receive_time_ns
        engine.on_event(event)
        ages.append(engine.age_seconds(event.publish_time_ns))
    assert youngest_seconds <= min(ages)
    assert max(ages) <= oldest_seconds


@recorded
def test_lost_messages_make_the_book_unknown_until_the_next_snapshot() -> None:
    engine = FeatureEngine(BTC)
    states: list[BookState] = []
    deltas = 0
    for event in with_snapshots(_of(BTC)):
        kind = event.WhichOneof("event")
        deltas += kind == "delta"
        if kind == "delta" and deltas in (150, 151, 152):
            continue
        engine.on_event(event)
        states.append(engine.state)
        if deltas == 300:
            break
    changes = [state for state, _ in itertools.groupby(states)]
    assert changes == [BookState.UNKNOWN, BookState.VALID, BookState.UNKNOWN, BookState.VALID]
    assert engine.book.gaps == 1


@recorded
def test_books_that_begin_at_a_repeated_snapshot_are_those_that_began_at_the_first() -> None:
    first, later = FeatureEngine(BTC), FeatureEngine(BTC)
    snapshots = 0
    for event in with_snapshots(itertools.islice(_of(BTC), 8_000)):
        snapshots += event.WhichOneof("event") == "snapshot"
        first.on_event(event)
        if snapshots >= 2:
            later.on_event(event)
    assert snapshots >= 4
    for side in ("bids", "asks"):
        assert getattr(later.book, side).top(10_000) == getattr(first.book, side).top(10_000)
    assert later.book.last_update_id == first.book.last_update_id


@recorded
def test_the_session_can_begin_again_after_a_reset() -> None:
    engine = FeatureEngine(ETH)
    vectors = []
    for _ in range(2):
        for event in with_resets(itertools.islice(_of(ETH), 2_000), "again"):
            engine.on_event(event)
        vectors.append(engine.snapshot())
    np.testing.assert_array_equal(vectors[1].values, vectors[0].values)
    assert vectors[1].event_time_ns == vectors[0].event_time_ns
    assert vectors[1].sequence > vectors[0].sequence
    assert engine.resets == 2


@recorded
def test_instruments_are_merged_in_the_order_of_receipt() -> None:
    received = [event.receive_time_ns for event in itertools.islice(read_session(session_files([DATA])), 20_000)]
    assert received == sorted(received)


def _of(name: str) -> Iterator[pb.MarketEvent]:
    return read_session(session_files([DATA]), {name})


def _recording(path: Path, *lines: bytes) -> Path:
    with gzip.open(path, "wb") as file:
        file.writelines(lines)
    return path


TRADE = (
    b'1000 {"e":"trade","E":1723161255343,"s":"ABC","t":1,"p":"1.0","q":"1.0","T":1723161255342,"m":true,"M":true}\n'
)


def test_files_of_one_symbol_continue_one_another(tmp_path: Path) -> None:
    later = _recording(tmp_path / "abc_20240809.gz", TRADE.replace(b"1000", b"2000"))
    earlier = _recording(tmp_path / "abc_20240808.gz", TRADE)
    assert session_files([tmp_path]) == [earlier, later]
    assert [event.receive_time_ns for event in read_session(session_files([later, earlier]))] == [1000, 2000]
    assert instruments([earlier, later]) == ["ABC.BINANCE"]


def test_recordings_below_a_folder_continue_one_another_whatever_their_folders_are_called(tmp_path: Path) -> None:
    """A folder for each day with a file for each hour, and one file that nobody has put away yet."""
    received = {"09/abc_00.gz": 3000, "08/abc_00.gz": 1000, "08/abc_01.gz": 2000, "abc_now.gz": 4000}
    paths = {tmp_path / name: time for name, time in received.items()}
    for path, time in paths.items():
        path.parent.mkdir(exist_ok=True)
        _recording(path, TRADE.replace(b"1000", str(time).encode()))
    found = session_files([tmp_path])
    assert set(found) == set(paths)
    assert [event.receive_time_ns for event in read_session(found)] == [1000, 2000, 3000, 4000]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"x {}\n", "line 2: does not begin with"),
        (b"-" + TRADE, "line 2: does not begin with"),
        (b'1000 {"e":"x","s":"ABC"}\n', "line 2: e: 'x'"),
        (TRADE.replace(b"ABC", b"XYZ"), "line 2: s: is 'XYZ', expected 'ABC', with which the file's name begins"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = _recording(tmp_path / "abc_1.gz", TRADE, line)
    with pytest.raises(SessionError, match=message) as caught:
        list(read_session([path]))
    assert str(path) in str(caught.value)


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    path = _recording(tmp_path / "abc_1.gz", *[TRADE] * 100)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(SessionError, match=r"abc_1\.gz: damaged after line [0-9]"):
        list(read_session([path]))
    path.write_bytes(b"not gzip")
    with pytest.raises(SessionError, match="line 1: does not begin with the receive time"):
        list(read_session([path]))


def test_no_recording_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no recording"):
        session_files([tmp_path])
    with pytest.raises(SessionError, match="no such file"):
        session_files([tmp_path / "absent"])
