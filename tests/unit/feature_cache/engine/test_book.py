from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from feature_cache.engine.book import MAX_BUFFERED_DELTAS, Levels, OrderBook
from pretrade.market.v1 import market_pb2 as pb


def snapshot(update_id: int, bids: dict[int, int], asks: dict[int, int]) -> pb.BookSnapshot:
    return pb.BookSnapshot(
        last_update_id=update_id,
        bid_ticks=bids,
        bid_lots=bids.values(),
        ask_ticks=asks,
        ask_lots=asks.values(),
    )


def delta(
    first: int, last: int, bids: dict[int, int] | None = None, asks: dict[int, int] | None = None, previous: int = 0
) -> pb.BookDelta:
    bids, asks = bids or {}, asks or {}
    return pb.BookDelta(
        first_update_id=first,
        last_update_id=last,
        previous_update_id=previous,
        bid_ticks=bids,
        bid_lots=bids.values(),
        ask_ticks=asks,
        ask_lots=asks.values(),
    )


def valid_book() -> OrderBook:
    book = OrderBook()
    assert book.apply_snapshot(snapshot(10, {99: 5, 98: 7}, {101: 3, 102: 4}))
    return book


def test_a_book_is_unknown_until_its_snapshot() -> None:
    book = OrderBook()
    assert not book.apply_delta(delta(1, 5, {99: 1}))
    assert not book.valid
    assert book.bids.best() is None


def test_deltas_before_the_snapshot_are_kept_and_joined_to_it() -> None:
    book = OrderBook()
    book.apply_delta(delta(1, 5, {90: 1}))  # older than the snapshot: dropped
    book.apply_delta(delta(6, 12, {99: 8}))  # bridges it
    book.apply_delta(delta(13, 13, {100: 2}))
    assert book.apply_snapshot(snapshot(10, {99: 5}, {101: 3}))
    assert book.valid
    assert book.last_update_id == 13
    assert book.bids.top(5) == [(100, 2), (99, 8)]
    assert (book.gaps, book.stale) == (0, 0)


def test_a_snapshot_older_than_the_kept_deltas_leaves_the_book_unknown_until_a_newer_one() -> None:
    book = OrderBook()
    book.apply_delta(delta(15, 16, {99: 8}))
    assert not book.apply_snapshot(snapshot(10, {99: 5}, {101: 3}))
    assert not book.valid
    assert book.apply_snapshot(snapshot(14, {98: 1}, {101: 3}))
    assert book.last_update_id == 16
    assert book.bids.top(5) == [(99, 8), (98, 1)]


def test_a_gap_makes_the_book_unknown_until_a_snapshot_that_joins() -> None:
    book = valid_book()
    assert book.apply_delta(delta(12, 13, {99: 6}))
    assert (book.valid, book.gaps) == (False, 1)
    assert book.bids.best() is None
    assert not book.apply_delta(delta(14, 14, {97: 1}))
    assert book.apply_snapshot(snapshot(12, {99: 5}, {101: 3}))
    assert book.valid
    assert book.bids.top(5) == [(99, 6), (97, 1)]
    assert book.gaps == 1


def test_a_gap_among_the_kept_deltas_is_found_when_the_snapshot_comes() -> None:
    book = OrderBook()
    for change in (delta(11, 11, {99: 1}), delta(13, 13, {99: 2}), delta(14, 14, {99: 3})):
        book.apply_delta(change)
    book.apply_snapshot(snapshot(10, {98: 1}, {101: 3}))
    assert (book.valid, book.gaps) == (False, 1)
    assert book.apply_snapshot(snapshot(12, {98: 1}, {101: 3}))
    assert book.bids.best() == (99, 3)


def test_a_delta_whose_predecessor_the_venue_names_must_follow_that() -> None:
    book = valid_book()
    assert book.apply_delta(delta(15, 20, {99: 1}, previous=10))
    assert book.valid
    assert book.apply_delta(delta(25, 30, {99: 2}, previous=22))
    assert (book.valid, book.gaps) == (False, 1)


def test_a_stale_delta_changes_nothing() -> None:
    book = valid_book()
    assert not book.apply_delta(delta(9, 10, {99: 1}))
    assert book.bids.best() == (99, 5)
    assert book.stale == 1
    assert book.apply_delta(delta(10, 11, {99: 1})), "partly applied, but sizes are absolute"
    assert book.bids.best() == (99, 1)


def test_a_newer_snapshot_replaces_the_book_and_an_older_one_does_not() -> None:
    book = valid_book()
    assert not book.apply_snapshot(snapshot(9, {50: 1}, {60: 1}))
    assert book.bids.best() == (99, 5)
    assert book.apply_snapshot(snapshot(20, {50: 1}, {60: 1}))
    assert book.bids.top(5) == [(50, 1)]


def test_a_crossed_book_is_unknown_and_a_locked_one_is_not() -> None:
    book = valid_book()
    assert book.apply_delta(delta(11, 11, {101: 1}))
    assert book.valid
    assert book.apply_delta(delta(12, 12, {102: 1}))
    assert (book.valid, book.crossings) == (False, 1)
    crossed = OrderBook()
    crossed.apply_snapshot(snapshot(1, {5: 1}, {4: 1}))
    assert (crossed.valid, crossed.crossings) == (False, 1)


def test_after_a_reset_update_ids_may_begin_anywhere() -> None:
    book = valid_book()
    book.apply_delta(delta(20, 20))
    book.reset()
    assert book.apply_snapshot(snapshot(3, {99: 5}, {101: 3}))
    assert book.apply_delta(delta(4, 4, {100: 1}))
    assert book.bids.best() == (100, 1)


def test_what_is_kept_while_unknown_is_bounded() -> None:
    book = OrderBook()
    for update_id in range(1, MAX_BUFFERED_DELTAS + 11):
        book.apply_delta(delta(update_id, update_id))
    assert not book.apply_snapshot(snapshot(5, {99: 5}, {101: 3})), "the deltas 6 to 10 are lost"
    assert book.apply_snapshot(snapshot(10, {99: 5}, {101: 3}))
    assert book.last_update_id == MAX_BUFFERED_DELTAS + 10


def test_its_own_snapshot_makes_the_same_book() -> None:
    book, copy = valid_book(), OrderBook()
    copy.apply_snapshot(book.to_snapshot())
    for side in ("bids", "asks"):
        assert getattr(copy, side).top(99) == getattr(book, side).top(99)
    assert copy.last_update_id == book.last_update_id


@given(
    st.sampled_from((1, -1)),
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), max_size=80),
    st.integers(0, 25),
)
def test_levels_are_those_of_a_sorted_dictionary(sign: int, changes: list[tuple[int, int]], count: int) -> None:
    levels, expected = Levels(sign), dict[int, int]()
    for ticks, lots in changes:
        levels.set(ticks, lots)
        expected[ticks] = lots
        expected = {price: size for price, size in expected.items() if size}
        ordered = sorted(expected.items(), reverse=sign > 0)
        assert levels.top(count) == ordered[:count]
        assert levels.best() == (ordered[0] if ordered else None)
        assert levels.worst() == (ordered[-1][0] if ordered else None)
        assert len(levels) == len(ordered)
    replaced = Levels(sign)
    replaced.replace(changes)
    assert replaced.top(count) == levels.top(count)
