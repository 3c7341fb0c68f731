"""What `ta1` costs: `python -m local.bench.ta1`, which `make bench-indicators` runs.

One core computes the set for many instruments, event by event in the order of time, as a worker's thread would. The
events are those of two simulated instruments, dealt to as many as are asked for. Shown is the CPU time a second of
market: what it takes of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import islice
from typing import Final

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from feature_cache.bars.maker import BarMaker
from feature_cache.sources.simulator import simulate
from feature_cache.ta1.computer import Board, Ta1Computer
from feature_cache.ta1.definition import TA1
from pretrade.market.v1 import market_pb2 as pb

_WARM_UP_SECONDS: Final = 60
_NAME: Final = "I{}.SIM"


def recorded(instruments: int, seconds: float, rate: float) -> list[pb.MarketEvent]:
    """Events of one simulated instrument, told once for each: the same market for all, in order of time."""
    events = list(simulate(1, ["BTCUSDT.SIM"], duration_seconds=seconds, events_per_second=rate))
    dealt = []
    for event in events:
        for number in range(instruments):
            copy = pb.MarketEvent()
            copy.CopyFrom(event)
            copy.instrument = _NAME.format(number)
            dealt.append(copy)
    return dealt


def measure(instruments: int, seconds: float, rate: float) -> tuple[int, dict[str, float]]:
    """Events a second of market, and CPU seconds a second of market by what is computed."""
    events = recorded(instruments, _WARM_UP_SECONDS + seconds, rate)
    first = events[0].event_time_ns + _WARM_UP_SECONDS * 10**9
    start = next(place for place, one in enumerate(events) if one.event_time_ns >= first)
    board, partner = Board(), _NAME.format(0)
    names = [_NAME.format(number) for number in range(instruments)]
    makers = {name: BarMaker(name, lambda bar: None, "10s") for name in names}
    computers = {name: Ta1Computer(name, None if name == partner else partner, board) for name in names}
    used = {}
    for what, targets in (("books and bars", makers), ("books, bars and ta1", computers)):
        for event in islice(events, start):
            targets[event.instrument].on_event(event)
        began = time.process_time()
        for event in islice(events, start, None):
            targets[event.instrument].on_event(event)
        used[what] = (time.process_time() - began) / seconds
    return round((len(events) - start) / seconds), used


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="of market, after a minute of warm-up")
    parser.add_argument("--rate", type=float, default=20.0, help="events a second of each instrument")
    given = parser.parse_args(arguments)
    per_second, used = measure(given.instruments, given.seconds, given.rate)
    table = Table("computed", "CPU of one core", box=SIMPLE)
    for what, share in used.items():
        table.add_row(what, f"{share:.1%}")
    print(f"{given.instruments} instruments, {len(TA1)} features each, {per_second:,} events a second")
    Console().print(table)


if __name__ == "__main__":
    main()
