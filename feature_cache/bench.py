"""How fast one core turns exchange messages into features: `python -m feature_cache.bench [RECORDINGS]`.

Prints events and level changes a second for each step on its own. Without recordings the market is simulated, and there
are no exchange messages to decode.
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from feature_cache.codec import encode
from feature_cache.engine import FeatureEngine
from feature_cache.feeds.binance import BinanceSpot
from feature_cache.session import instrument_of, read_session, session_files
from feature_cache.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

_SIMULATED_SECONDS = 300.0
_SNAPSHOTS = 20_000


def main(
    paths: Annotated[list[Path] | None, typer.Argument(help="Recordings (*.gz), or folders of them.")] = None,
) -> None:
    """Measure decode, book, features and snapshots on one core."""
    files = session_files(paths) if paths else []
    events = list(read_session(files) if files else simulate(1, duration_seconds=_SIMULATED_SECONDS))
    levels = sum(_levels(event) for event in events)
    table = Table("step", "events/s", "µs/event", "level changes/s")

    def row(step: str, count: int, seconds: float, changes: int | None) -> None:
        shown = "" if changes is None else f"{changes / seconds:,.0f}"
        table.add_row(step, f"{count / seconds:,.0f}", f"{1e6 * seconds / count:,.1f}", shown)

    if files:
        row("decode exchange JSON", *_decode(files), levels)
    packed = [event.SerializeToString() for event in events]
    row(
        "parse market event",
        len(packed),
        _timed(lambda: [pb.MarketEvent.FromString(value) for value in packed]),
        levels,
    )
    engines: dict[str, FeatureEngine] = {event.instrument: FeatureEngine(event.instrument) for event in events}

    def run() -> None:
        for event in events:
            engines[event.instrument].on_event(event)

    row("book and windows", len(events), _timed(run), levels)
    engine = next(iter(engines.values()))
    row("snapshot and encode", _SNAPSHOTS, _timed(lambda: [encode(engine.snapshot()) for _ in range(_SNAPSHOTS)]), None)
    Console().print(table)


def _decode(files: list[Path]) -> tuple[int, float]:
    messages = []
    for path in files:
        with gzip.open(path) as lines:
            messages.append((instrument_of(path), [line.partition(b" ") for line in lines]))

    def run() -> None:
        for instrument, lines in messages:
            feed = BinanceSpot(instrument)
            for receive_time, _, message in lines:
                feed.decode(message, int(receive_time))

    return sum(len(lines) for _, lines in messages), _timed(run)


def _levels(event: pb.MarketEvent) -> int:
    delta = event.delta
    return len(delta.bid_ticks) + len(delta.ask_ticks)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
