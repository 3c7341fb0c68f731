from __future__ import annotations

from typing import Final

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.partition import LEAD_NS, Partition
from pretrade.market.v1 import market_pb2 as pb

START: Final = 1_700_000_100 * SECOND_NS  # begins a bar of five minutes
LENGTH: Final = 1500
"""Seconds of the log: a trade of each instrument in each, and a book every ten."""


def record(number: int) -> bytes:
    second, is_second = divmod(number, 2)
    time_ns = START + second * SECOND_NS + is_second
    event = pb.MarketEvent(
        instrument=("A.TEST", "B.TEST")[is_second],
        event_time_ns=time_ns,
        receive_time_ns=time_ns,
        publish_time_ns=time_ns,
    )
    if second % 10 == 0:
        event.snapshot.last_update_id = 1 + second
        event.snapshot.bid_ticks[:], event.snapshot.bid_lots[:] = [99], [1]
        event.snapshot.ask_ticks[:], event.snapshot.ask_lots[:] = [101], [1]
    else:
        event.trade.trade_id, event.trade.price_ticks, event.trade.lots = 1 + second, 100 + second % 7, 1 + second % 3
    return event.SerializeToString()


def read(first: int, end: int) -> Partition:
    partition = Partition(first)
    for offset in range(first, end):
        partition.take(offset, record(offset))
    return partition


def kept(*partitions: Partition) -> dict[tuple[str, str, int], Bar]:
    """What a database holds after each has written its bars."""
    rows: dict[tuple[str, str, int], Bar] = {}
    for partition in partitions:
        for bar in partition.ended:
            before = rows.get((bar.instrument, bar.interval, bar.start_ns))
            if before is None or (bar.lacks, -bar.trades) <= (before.lacks, -before.trades):
                rows[bar.instrument, bar.interval, bar.start_ns] = bar
    return rows


def test_wherever_a_process_ends_the_next_one_makes_the_rest_of_the_bars_and_they_are_the_same() -> None:
    end = 2 * LENGTH
    whole = kept(read(0, end))
    for killed in (1, 700, 1201, 1800, 2399, 2950):
        first = read(0, killed)
        assert kept(first, read(first.read_again_from, end)) == whole


def test_what_is_read_again_begins_two_longest_bars_before_those_under_way_and_no_earlier() -> None:
    for killed in (1300, 2000, 2900):
        again = read(0, killed).read_again_from
        under_way_ns = START + killed // 2 * SECOND_NS
        under_way_ns -= under_way_ns % LEAD_NS
        assert START + again // 2 * SECOND_NS == max(START, under_way_ns - 2 * LEAD_NS)
    bars = read(read(0, 2900).read_again_from, 2 * LENGTH).ended
    assert [bar.lacks for bar in bars if bar.interval == "5m"][-2:] == [Lacks.NOTHING] * 2


def test_records_that_are_no_market_event_are_counted_and_change_nothing() -> None:
    partition = read(0, 100)
    ended = list(partition.ended)
    for value in (None, b"", b"\xff\xff", record(0)[:-3]):
        partition.take(100, value)
    assert partition.refused == 4
    assert partition.ended == ended
