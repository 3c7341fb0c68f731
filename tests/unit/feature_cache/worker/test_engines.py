"""Records of partitions to changed snapshots."""

from __future__ import annotations

import itertools

import pytest

from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import BookState
from feature_cache.worker.engines import Engines, PoisonError
from pretrade.market.v1 import market_pb2 as pb

BTC = "BTCUSDT.SIM"


def records(instrument: str = BTC, count: int = 40) -> list[tuple[bytes, bytes]]:
    events = itertools.islice(simulate(1, [instrument]), count)
    return [(instrument.encode(), event.SerializeToString()) for event in events]


@pytest.fixture
def engines() -> Engines:
    return Engines(max_instruments=3)


def feed(engines: Engines, partition: int, first_offset: int, rows: list[tuple[bytes, bytes]]) -> None:
    for offset, (key, value) in enumerate(rows, start=first_offset):
        engines.take(partition, offset, key, value)


def test_only_what_changed_since_the_last_time_is_given(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, records() + records("ETHUSDT.SIM"))
    assert {found.instrument for found in engines.take_changed()} == {BTC, "ETHUSDT.SIM"}
    assert engines.take_changed() == []
    engines.take(0, 80, *records(count=41)[40])
    (changed,) = engines.take_changed()
    assert (changed.instrument, changed.state) == (BTC, BookState.VALID)
    assert engines.positions() == {0: 81}


def test_what_could_not_be_written_is_given_again(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, records())
    first = engines.take_changed()
    engines.put_back(first)
    (again,) = engines.take_changed()
    assert again.sequence == first[0].sequence


def test_history_is_not_given_until_the_partition_has_caught_up(engines: Engines) -> None:
    rows = records()
    engines.assign(0, 100, 140)
    caught_up = [engines.caught_up]
    feed(engines, 0, 100, rows[:39])
    assert engines.take_changed() == []
    engines.take(0, 139, *rows[39])
    caught_up.append(engines.caught_up)
    assert caught_up == [False, True]
    assert [found.instrument for found in engines.take_changed()] == [BTC]


def test_history_ends_where_the_log_has_a_hole_at_its_end(engines: Engines) -> None:
    rows = records(count=41)
    engines.assign(0, 0, 40)
    feed(engines, 0, 0, rows[:39])
    engines.take(0, 40, *records("ETHUSDT.SIM", 1)[0])  # there is no record 39: it was a transaction's
    assert engines.caught_up
    assert {found.instrument for found in engines.take_changed()} == {BTC, "ETHUSDT.SIM"}


def test_a_poison_record_at_the_end_of_history_ends_it_too(engines: Engines) -> None:
    rows = records()
    engines.assign(0, 0, 40)
    feed(engines, 0, 0, rows[:39])
    with pytest.raises(PoisonError):
        engines.take(0, 39, b"?", b"\xff")
    assert engines.caught_up
    assert len(engines.take_changed()) == 1


def test_records_of_a_partition_that_is_not_held_are_ignored(engines: Engines) -> None:
    feed(engines, 1, 0, records())
    assert engines.take_changed() == []
    assert engines.positions() == {}


def test_a_revoked_partition_takes_its_instruments_along(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    engines.assign(1, 0, 0)
    feed(engines, 0, 0, records())
    feed(engines, 1, 0, records("ETHUSDT.SIM"))
    engines.revoke([0, 7])
    assert [found.instrument for found in engines.take_changed()] == ["ETHUSDT.SIM"]
    assert set(engines.all()) == {"ETHUSDT.SIM"}


def test_owners_of_an_instrument_agree_on_its_sequences_whoever_read_how_much(engines: Engines) -> None:
    rows = records(count=500)
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, rows[:400])
    (former,) = engines.take_changed()
    owner = Engines(max_instruments=3)
    owner.assign(0, 300, 400)
    feed(owner, 0, 300, rows[300:400])
    (caught_up,) = owner.take_changed()
    owner.take(0, 400, *rows[400])
    (next_,) = owner.take_changed()
    assert caught_up.sequence == former.sequence < next_.sequence


def test_a_log_that_begins_again_makes_the_instruments_unknown(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, records())
    assert engines.all()[BTC].state is BookState.VALID
    engines.begin_again(0, 3, 4)
    engines.take(0, 3, *records(count=5)[4])
    assert engines.truncations == 1
    assert engines.all()[BTC].state is BookState.UNKNOWN
    assert engines.positions() == {0: 4}


def test_a_record_before_the_position_is_ignored(engines: Engines) -> None:
    rows = records()
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, rows)
    feed(engines, 0, 0, rows[:7])
    assert (engines.repeats, engines.truncations) == (7, 0)
    assert engines.positions() == {0: 40}
    assert engines.all()[BTC].events == 40


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (BTC.encode(), None, "empty"),
        (BTC.encode(), b"", "empty"),
        (BTC.encode(), b"\xff\xff\xff", "not_protobuf"),
        (BTC.encode(), b'{"e": "trade"}', "not_protobuf"),
        (b"", pb.MarketEvent(price_decimals=1).SerializeToString(), "instrument"),
        (b"a b", pb.MarketEvent(instrument="a b").SerializeToString(), "instrument"),
        (None, records(count=1)[0][1], "key"),
        (b"OTHER.SIM", records(count=1)[0][1], "key"),
        (BTC.encode(), pb.MarketEvent(instrument=BTC).SerializeToString(), "contract"),
    ],
)
def test_a_poison_record_is_counted_and_its_neighbours_are_taken(
    engines: Engines, key: bytes | None, value: bytes | None, reason: str
) -> None:
    rows = records()
    engines.assign(0, 0, 0)
    feed(engines, 0, 0, rows[:20])
    with pytest.raises(PoisonError) as caught:
        engines.take(0, 20, key, value)
    assert caught.value.reason == reason
    feed(engines, 0, 21, rows[20:])
    assert dict(engines.poison) == {reason: 1}
    assert engines.positions() == {0: 41}
    engine = engines.all()[BTC]
    assert (engine.events, engine.book.gaps, engine.state) == (40, 0, BookState.VALID)


def test_the_number_of_instruments_is_bounded(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    for number in range(3):
        engines.take(0, number, *records(f"X{number}.SIM", 1)[0])
    with pytest.raises(PoisonError, match=r"X3\.SIM"):
        engines.take(0, 3, *records("X3.SIM", 1)[0])
    assert set(engines.all()) == {"X0.SIM", "X1.SIM", "X2.SIM"}


def test_a_first_event_that_is_poison_makes_no_instrument(engines: Engines) -> None:
    engines.assign(0, 0, 0)
    with pytest.raises(PoisonError):
        engines.take(0, 0, BTC.encode(), pb.MarketEvent(instrument=BTC).SerializeToString())
    assert engines.all() == {}
