"""What computed sets cost `mf1`: `python -m local.bench.guests`, which `make bench-guests` runs.

A worker's event loop takes simulated events in when they are due, and makes the vectors of `mf1`. No broker and no
Redis take part. Beside it run no set, `ta1`, and a set that now and then calls a function of C that keeps the
interpreter: matching a pattern that backtracks. Shown is how late `mf1` takes its events in, and how old the events are
when the set has given a vector of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import numpy as np
import uvloop
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from feature_cache import logs
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, launcher
from feature_cache.worker.settings import WorkerSettings, computed_by

_INSTRUMENTS: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
_WARM_UP_SECONDS: Final = 8.0
"""A set's process imports for a second or two, and then catches up."""
_TICK_SECONDS: Final = 0.002
_HOG: Final = '''
import re
import numpy as np
from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

class Hog:
    """Keeps the interpreter for some ten milliseconds at every hundredth event."""
    def __init__(self, instrument):
        self.count = 0
    def on_event(self, event):
        self.count += 1
        if self.count % 100 == 0:
            re.match("(a+)+$", "a" * 20 + "b")
    def values(self):
        return np.array([self.count], dtype=np.float32)

FEATURE_SETS = [ComputedSet(FeatureSet("hog", (Feature("count", "", "Events."),)), Hog)]
'''


class _Nowhere:
    """A store that only looks when which event's vector came."""

    def __init__(self) -> None:
        self.delays: list[float] = []

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        now = time.time_ns()
        self.delays += [(now - one.publish_time_ns) / 1e6 for one in snapshots]
        return 0


async def measure(guests: Guests, seconds: float, rate: float) -> tuple[NDArray[np.float64], list[float], float, float]:
    """Measures one round.

    Args:
        guests: The set, or none.
        seconds: Of the measurement, after a warm-up.
        rate: Events a second.

    Returns:
        By how many ms each event was taken in late, how old in ms events were in the set's vectors, and what the event
        loop and the set took of a core.
    """
    total, store = seconds + _WARM_UP_SECONDS, _Nowhere()
    events = list(simulate(1, _INSTRUMENTS, duration_seconds=total, events_per_second=rate / len(_INSTRUMENTS)))
    first, start = events[0].receive_time_ns, time.time_ns() + 10**9
    for event in events:
        event.publish_time_ns = start + event.receive_time_ns - first
    records = [(one.instrument.encode(), one.publish_time_ns, one.SerializeToString()) for one in events]
    engines = Engines(len(_INSTRUMENTS), guests)
    engines.assign(0, 0, 0)
    guests.start()
    computing = asyncio.create_task(guests.run(cast(Any, store), lambda: engines.all().values(), _TICK_SECONDS))
    late: list[float] = []
    used = of_sets = 0.0
    for offset, (key, due_ns, value) in enumerate(records):
        while (now := time.time_ns()) < due_ns:
            engines.take_changed()
            await asyncio.sleep(_TICK_SECONDS)
        engines.take(0, offset, key, value)
        if due_ns > start + _WARM_UP_SECONDS * 1e9:
            if not late:
                used, of_sets = time.process_time(), sum(guest.seconds for guest in guests.all)
            late.append((now - due_ns) / 1e6)
        else:
            store.delays.clear()
    used, of_sets = time.process_time() - used, sum(guest.seconds for guest in guests.all) - of_sets
    computing.cancel()
    await asyncio.gather(computing, return_exceptions=True)
    guests.close()
    return np.array(late), store.delays, used / seconds, of_sets / seconds


def _row(name: str, settings: WorkerSettings | None, seconds: float, rate: float) -> list[str]:
    sets, file = ([], None) if settings is None else (computed_by(settings), settings.features_file)
    guests = Guests([Guest(one, launcher(one, file)) for one in sets])
    late, delays, share, of_sets = uvloop.run(measure(guests, seconds, rate))
    shown = [f"{value:.1f}" for value in (*np.percentile(late, (50, 99)), late.max())]
    age = f"{np.median(delays):.1f}" if delays else ""
    return [name, *shown, f"{share:.1%}", f"{of_sets:.1%}" if sets else "", age]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2000.0, help="events a second of both instruments together")
    given = parser.parse_args(arguments)
    logs.configure("warning", "bench")
    table = Table("beside mf1", "late ms, median", "p99", "worst", "worker", "set", "set's vectors ms", box=SIMPLE)
    with TemporaryDirectory() as directory:
        file = Path(directory) / "hog.py"
        file.write_text(_HOG)
        kinds = {
            "nothing": None,
            "ta1": WorkerSettings(computed_sets=("ta1",)),
            "a set that keeps the interpreter": WorkerSettings(features_file=file),
        }
        for _ in range(given.rounds):
            for name, settings in kinds.items():
                table.add_row(*_row(name, settings, given.seconds, given.rate))
    print(f"{given.rate:,.0f} events a second, load {os.getloadavg()[0]:.1f}; shares are of one core")
    Console().print(table)


if __name__ == "__main__":
    main()
