from __future__ import annotations

import pytest

from feature_cache.sources.simulated.book import Fill, Side


@pytest.fixture
def asks() -> Side:
    side = Side(-1)
    for price, lots in ((101, 5), (100, 3), (100, 4), (103, 9)):
        side.add(price, lots)
    return side


def test_the_oldest_order_of_the_best_level_is_filled_first(asks: Side) -> None:
    assert asks.take(8, None, spared=0) == [Fill(100, 3), Fill(100, 4), Fill(101, 1)]
    assert asks.sizes == {101: 4, 103: 9}
    assert asks.best() == 101


def test_a_taker_pays_no_more_than_the_limit(asks: Side) -> None:
    assert asks.take(100, 101, spared=0) == [Fill(100, 3), Fill(100, 4), Fill(101, 5)]
    assert asks.take(100, 101, spared=0) == []


def test_an_order_that_is_filled_in_part_keeps_its_place(asks: Side) -> None:
    asks.take(1, None, spared=0)
    asks.add(100, 6)
    assert asks.queues[100] == [2, 4, 6]


def test_a_taker_leaves_the_spared_levels(asks: Side) -> None:
    asks.take(100, None, spared=1)
    assert asks.sizes == {103: 9}


def test_cancelling_takes_off_the_order_that_was_drawn_and_a_level_with_its_last(asks: Side) -> None:
    asks.cancel(len(asks.keys) - 1, 0.99)
    assert asks.queues[100] == [3]
    asks.cancel(len(asks.keys) - 1, 0.0)
    assert asks.best() == 101


def test_every_change_is_counted_and_told(asks: Side) -> None:
    assert asks.updates == 4
    asks.changed.clear()
    asks.take(8, None, spared=0)
    asks.drop_worst()
    assert asks.changed == {100: 0, 101: 4, 103: 0}
    assert asks.updates == 7


def test_bids_are_the_other_way_round() -> None:
    bids = Side(1)
    for price in (99, 98, 100):
        bids.add(price, 1)
    assert bids.take(10, 99, spared=0) == [Fill(100, 1), Fill(99, 1)]
