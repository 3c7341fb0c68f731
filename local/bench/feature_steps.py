"""How fast one core turns market events into features, step by step: what `pretrade bench-features` measures first.

Events come from recordings, or from the simulator where there are none.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import encode
from feature_cache.worker.engines import Engines
from pretrade.market.v1 import market_pb2 as pb

_SIMULATED_SECONDS: Final = 300.0
_MOST_EVENTS: Final = 100_000
_PUBLICATIONS: Final = 5_000


@dataclass(frozen=True, slots=True)
class Step:
    """What one step costs."""

    name: str
    count: int
    """How often it was done: events, publications or rows."""
    levels: int
    """Book levels in those events; 0 where that means nothing."""
    seconds: float
    median_us: float
    p99_us: float

    @property
    def per_second(self) -> float:
        """How often one core does it in a second."""
        return self.count / self.seconds

    @property
    def levels_per_second(self) -> float:
        """Levels that one core takes in a second."""
        return self.levels / self.seconds


def events_of(folder: Path | None) -> list[pb.MarketEvent]:
    """The first events of a folder of recordings, or simulated ones."""
    source = (
        simulate(1, duration_seconds=_SIMULATED_SECONDS) if folder is None else read_session(session_files([folder]))
    )
    return [event for event, _ in zip(source, range(_MOST_EVENTS), strict=False)]


def levels_of(events: Iterable[pb.MarketEvent]) -> int:
    """Level updates in events: entries of deltas and snapshots; a quote tells two."""
    total = 0
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "quote":
            total += 2
        elif kind in ("delta", "snapshot"):
            body = getattr(event, kind)
            total += len(body.bid_ticks) + len(body.ask_ticks)
    return total


def measure_steps(events: Sequence[pb.MarketEvent]) -> list[Step]:
    """Our own steps, one after the other, on the same events."""
    levels = levels_of(events)
    packed = [event.SerializeToString() for event in events]
    keys = [event.instrument.encode() for event in events]
    steps = [measured("parse", [partial(pb.MarketEvent.FromString, value) for value in packed], levels)]
    engines = {event.instrument: FeatureEngine(event.instrument) for event in events}
    applications = [partial(engines[event.instrument].on_event, event) for event in events]
    steps.append(measured("book and windows", applications, levels))
    engine = max(engines.values(), key=lambda candidate: candidate.events)
    steps.append(measured("features and encode", [lambda: encode(engine.snapshot())] * _PUBLICATIONS, 0))
    taker = Engines(10_000)
    taker.assign(0, 0, 0)
    takes = [
        partial(taker.take, 0, offset, key, value) for offset, (key, value) in enumerate(zip(keys, packed, strict=True))
    ]
    steps.append(measured("a record: parse, book and windows", takes, levels))
    return steps


def measured(name: str, calls: Sequence[Callable[[], object]], levels: int) -> Step:
    """Times each call on its own and sums up; the clock's own cost is taken off the sum."""
    clock = time.perf_counter_ns
    gc.collect()
    took = []
    for call in calls:
        began = clock()
        call()
        took.append(clock() - began)
    clock_ns = statistics.median(-clock() + clock() for _ in range(1000))
    took.sort()
    return Step(
        name,
        len(took),
        levels,
        sum(took) / 1e9 - len(took) * clock_ns / 1e9,
        took[len(took) // 2] / 1e3,
        took[int(len(took) * 0.99)] / 1e3,
    )
