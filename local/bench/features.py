"""`pretrade bench-features`: the feature worker's steps, its throughput from Kafka to Redis, and its freshness.

The throughput run stops the worker (SIGSTOP), fills its topic, lets it continue and waits until a server's copy holds
the features of the last events: how fast a real worker consumes when the log is full, while Valkey and the broker share
the machine. The freshness run publishes at a fixed rate, from a process of its own. It measures how long after its
publication each event is part of the vector that a server's copy holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import uvloop
from aiokafka import AIOKafkaProducer
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from feature_cache.sources.publisher import EventPublisher, with_resets
from feature_cache.sources.simulator import simulate
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from local.bench.feature_pandas import measure_pandas
from local.bench.feature_steps import Step, events_of, levels_of, measure_steps
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.market.v1 import market_pb2 as pb

_TOPIC: Final = "market.events"
_PARTITIONS: Final = 4
_PATIENCE_SECONDS: Final = 60.0
_VENUES: Final = ("binance_spot", "kraken_v1", "coinbase_pro")
_FRESHNESS_INSTRUMENTS: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
_WARM_UP_SECONDS: Final = 2.0
_OURS: Final[Mapping[str, str]] = {
    "PRETRADE_WORKER_POLL_INTERVAL_SECONDS": "0.001",
    "PRETRADE_WORKER_FLUSH_INTERVAL_SECONDS": "0.002",
    "PRETRADE_WORKER_FETCH_WAIT_SECONDS": "0.002",
}
"""What a worker that shall be fresh is given; the embedded stack's own values spare its broker."""
_LINGER_SECONDS: Final = 0.002
"""How long the publisher gathers a batch: the broker's work grows with the number of batches, and without a linger it
costs events more time than the linger does."""


@dataclass(frozen=True, slots=True)
class Throughput:
    """A full log, from Kafka to Redis."""

    market: str
    events: int
    levels: int
    seconds: float
    worker_cpu_seconds: float
    broker_cpu_seconds: float
    valkey_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Freshness:
    """From the publication of an event to its being part of what a server's copy holds."""

    events: int
    per_second: float
    median_ms: float
    p99_ms: float
    worst_ms: float
    worker_cpu_share: float
    broker_cpu_share: float


def run_feature_bench(given: Mapping[str, Any], seconds: float, rate: float, report: Path | None) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack; `data` is a folder of recordings, or of folders of them by venue.
        seconds: Length of the freshness run.
        rate: Its events a second.
        report: JSON file for all figures.
    """
    data = given.get("data")
    for name, value in _OURS.items():
        os.environ.setdefault(name, value)

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        markets = _markets(data)
        steps = {name: [*measure_steps(events), *measure_pandas(events)] for name, events in markets.items()}
        throughputs = [uvloop.run(_measure_throughput(stack, name, events)) for name, events in markets.items()]
        # The embedded broker lists all batches it holds at every fetch: a log of its own, as that of a small interval.
        stack.restart("broker")
        stack.restart("worker")
        freshness = uvloop.run(_measure_freshness(stack, seconds, rate, settings.dir / "published.npy"))
        _print(console, steps, throughputs, freshness)
        if report is not None:
            document = {
                "machine": {
                    "cores": os.cpu_count(),
                    "python": platform.python_version(),
                    "system": platform.platform(),
                },
                "settings": {name: os.environ[name] for name in _OURS} | {"linger_seconds": _LINGER_SECONDS},
                "steps": {name: [asdict(step) for step in rows] for name, rows in steps.items()},
                "throughput": [asdict(row) for row in throughputs],
                "freshness": asdict(freshness),
            }
            report.write_text(json.dumps(document, indent=2) + "\n")
        return OK

    return run_with_stack({**given, "data": None, "market": False}, use, parts={"valkey", "broker", "worker"})


def _markets(data: Path | None) -> dict[str, list[pb.MarketEvent]]:
    if data is None:
        return {"simulated": events_of(None)}
    folders = [data / name for name in _VENUES if (data / name).is_dir()] or [data]
    return {folder.name: events_of(folder) for folder in folders}


async def _measure_throughput(stack: Stack, name: str, events: Sequence[pb.MarketEvent]) -> Throughput:
    events = list(with_resets(events, "benchmark"))
    # A snapshot at the end may only repeat what is known, and then changes no vector.
    last = {event.instrument: event for event in events if not event.HasField("snapshot")}
    async with _Copy(stack, last) as copy:
        stack["worker"].pause()
        try:
            await _fill(str(stack.endpoints.kafka_bootstrap_servers), events)
            processes = {part: psutil.Process(stack[part].pid) for part in ("worker", "broker", "valkey")}
            before = {part: _cpu_seconds(process) for part, process in processes.items()}
        finally:
            began = time.perf_counter()
            stack["worker"].resume()
        newest = {instrument: event.publish_time_ns for instrument, event in last.items()}
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while not copy.reaches(newest):  # noqa: ASYNC110 - another process's work
                await asyncio.sleep(0.002)
        seconds = time.perf_counter() - began
        used = {part: _cpu_seconds(process) - before[part] for part, process in processes.items()}
    return Throughput(name, len(events), levels_of(events), seconds, used["worker"], used["broker"], used["valkey"])


async def _fill(bootstrap_servers: str, events: Iterable[pb.MarketEvent]) -> None:
    """Writes events in batches as large as a busy producer's, an instrument always to the same partition."""
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap_servers, max_batch_size=100_000)
    await producer.start()
    try:
        partitions: dict[str, int] = {}
        batches: dict[int, Any] = {}
        for event in events:
            event.publish_time_ns = time.time_ns()
            partition = partitions.setdefault(event.instrument, len(partitions) % _PARTITIONS)
            record = {"key": event.instrument.encode(), "value": event.SerializeToString(), "timestamp": None}
            while batches.setdefault(partition, producer.create_batch()).append(**record) is None:
                await (await producer.send_batch(batches.pop(partition), _TOPIC, partition=partition))
        for partition, batch in batches.items():
            await (await producer.send_batch(batch, _TOPIC, partition=partition))
    finally:
        await producer.stop()


async def _measure_freshness(stack: Stack, seconds: float, rate: float, path: Path) -> Freshness:
    argv = [sys.executable, "-m", __name__, str(stack.endpoints.kafka_bootstrap_servers), str(seconds), str(rate)]
    async with _Copy(stack, _FRESHNESS_INSTRUMENTS) as copy:
        processes = {part: psutil.Process(stack[part].pid) for part in ("worker", "broker")}
        publisher = await asyncio.create_subprocess_exec(*argv, str(path))
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await copy.first.wait()
            before = {part: _cpu_seconds(process) for part, process in processes.items()}
            began = time.monotonic()
            async with asyncio.timeout(seconds + _PATIENCE_SECONDS):
                if await publisher.wait() != 0:
                    raise RuntimeError("the publisher failed")
            elapsed = time.monotonic() - began
        finally:
            if publisher.returncode is None:
                publisher.kill()
                await publisher.wait()
        used = {part: (_cpu_seconds(process) - before[part]) / elapsed for part, process in processes.items()}
        seen = {name: np.array(copy.seen[name]) for name in _FRESHNESS_INSTRUMENTS}
    instruments, published = np.load(path)
    start = published[0] + _WARM_UP_SECONDS * 1e9
    late = [
        _latencies(published[(instruments == number) & (published >= start)], seen[name])
        for number, name in enumerate(_FRESHNESS_INSTRUMENTS)
    ]
    ms = np.concatenate(late) / 1e6
    return Freshness(
        len(ms),
        len(published) / (float(published[-1] - published[0]) / 1e9),
        float(np.median(ms)),
        float(np.percentile(ms, 99)),
        float(ms.max()),
        used["worker"],
        used["broker"],
    )


def _latencies(published: NDArray[np.int64], seen: NDArray[np.int64]) -> NDArray[np.int64]:
    """From each event's publication to the first vector that includes it; those after the last vector are left out."""
    first = np.searchsorted(seen[:, 1], published)
    shown = first < len(seen)
    latencies: NDArray[np.int64] = seen[first[shown], 0] - published[shown]
    return latencies


class _Copy:
    """A server's copy of the features that notes when it got which."""

    def __init__(self, stack: Stack, instruments: Iterable[str]) -> None:
        self._names = tuple(instruments)
        # No vector may be too old to count: the full log is.
        settings = FeatureCacheSettings(ttl_seconds=3600, timeout_seconds=5)
        self._cache = FeatureCache(str(stack.endpoints.redis_url), settings, self._names)
        self.seen: dict[str, list[tuple[int, int]]] = {name: [] for name in self._names}
        """By instrument: when a vector came, and when its newest event was published; nanoseconds."""
        self.first = asyncio.Event()

    async def __aenter__(self) -> _Copy:
        self._tasks = [asyncio.create_task(self._cache.run()), asyncio.create_task(self._watch())]
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while not self._cache.connected:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def published(self, instrument: str) -> int:
        """When the newest event of an instrument's vector was published; 0 without one."""
        entry = self._cache.get(instrument)
        return entry.snapshot.publish_time_ns if entry else 0

    def reaches(self, newest: Mapping[str, int]) -> bool:
        """Whether each instrument's vector is as new as given by publish times."""
        return all(self.published(instrument) >= wanted for instrument, wanted in newest.items())

    async def _watch(self) -> None:
        updates = 0
        while True:
            if self._cache.updates != updates:
                updates = self._cache.updates
                now = time.time_ns()
                for name, seen in self.seen.items():
                    published = self.published(name)
                    if published and (not seen or seen[-1][1] < published):
                        seen.append((now, published))
                        self.first.set()
            await asyncio.sleep(0.0005)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _print(
    console: Console, steps: Mapping[str, Sequence[Step]], throughputs: Sequence[Throughput], freshness: Freshness
) -> None:
    table = Table("market", "step, one core", "a second", "levels/s", "median µs", "p99 µs", box=SIMPLE)
    for name, rows in steps.items():
        for step in rows:
            levels = f"{step.levels_per_second:,.0f}" if step.levels else ""
            cells = (f"{step.per_second:,.0f}", levels, f"{step.median_us:,.1f}", f"{step.p99_us:,.1f}")
            table.add_row(name, step.name, *cells)
    console.print(table)
    table = Table(
        "Kafka to Redis",
        "events/s",
        "levels/s",
        "events/s a core",
        "levels/s a core",
        "CPU s: worker",
        "broker",
        "Valkey",
    )
    for row in throughputs:
        cpu = row.worker_cpu_seconds
        rates = (row.events / row.seconds, row.levels / row.seconds, row.events / cpu, row.levels / cpu)
        used = (cpu, row.broker_cpu_seconds, row.valkey_cpu_seconds)
        table.add_row(row.market, *(f"{rate:,.0f}" for rate in rates), *(f"{share:.2f}" for share in used))
    console.print(table)
    console.print(
        f"freshness at {freshness.per_second:,.0f} events/s ({freshness.events:,} events): "
        f"median {freshness.median_ms:.1f} ms, p99 {freshness.p99_ms:.1f} ms, worst {freshness.worst_ms:.1f} ms",
        f"CPU: worker {freshness.worker_cpu_share:.0%}, broker {freshness.broker_cpu_share:.0%} of a core",
        sep="\n",
        highlight=False,
    )


def publish(bootstrap_servers: str, seconds: float, rate: float, path: Path) -> None:
    """Publishes simulated events at a rate and writes (instrument's number, publish time) of each to a file."""
    count = round(seconds * rate)
    source = simulate(1, _FRESHNESS_INSTRUMENTS, events_per_second=1000)
    events = [event for event, _ in zip(with_resets(source, "benchmark"), range(count), strict=False)]
    span = (events[-1].receive_time_ns - events[0].receive_time_ns) / 1e9

    async def send() -> None:
        async with EventPublisher(bootstrap_servers, linger_seconds=_LINGER_SECONDS) as publisher:
            await publisher.publish(events, speed=span / seconds)

    uvloop.run(send())
    numbers = [_FRESHNESS_INSTRUMENTS.index(event.instrument) for event in events]
    np.save(path, np.array([numbers, [event.publish_time_ns for event in events]], dtype=np.int64))


if __name__ == "__main__":
    publish(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
