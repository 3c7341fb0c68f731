"""`pretrade bench-features`: the feature worker's steps, its throughput from Kafka to Redis, and its freshness.

The throughput run stops the worker (SIGSTOP), fills its topic, lets it continue and waits until a server's copy holds
the features of the last events: how fast a real worker consumes when the log is full, while Valkey and the broker share
the machine. A freshness round publishes at a fixed rate, from a process of its own. It measures how long after its
publication each event is part of the vector that a server's copy holds, and where on the way that time passes. Every
round has a new broker, because the embedded one lists all batches it holds for every fetch: after a minute it would be
the broker's log that is measured.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import platform
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import psutil
import uvloop
from aiokafka import AIOKafkaProducer
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from feature_cache.sources.publisher import EventPublisher, with_resets
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import decode
from feature_cache.store.l1 import Arrival, FeatureCache, FeatureCacheSettings
from feature_cache.worker.delays import EDGES_SECONDS
from feature_cache.worker.metrics import WORKER_EVENT_DELAY_SECONDS
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
_WARM_UP_SECONDS: Final = 1.0
_OURS: Final[Mapping[str, str]] = {
    "PRETRADE_WORKER_POLL_INTERVAL_SECONDS": "0",
    "PRETRADE_WORKER_FLUSH_INTERVAL_SECONDS": "0.002",
    "PRETRADE_WORKER_FETCH_WAIT_SECONDS": "0.002",
}
"""What a worker that shall be fresh is given; the embedded stack's own values spare its broker."""
_LINGER_SECONDS: Final = 0.003
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
class Delay:
    """How long after their publication events have come so far."""

    median_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Freshness:
    """One round: how long after their publication events have come how far."""

    events: int
    per_second: float
    acknowledged: Delay
    """The broker has it."""
    read: Delay
    """The worker has computed it in."""
    written: Delay
    """Redis has a vector that includes it."""
    copied: Delay
    """A server's copy has such a vector."""
    from_broker: Delay
    """The same, but since the broker had the event: what the worker, Redis and the server take."""
    worst_ms: float
    """The longest until the copy."""
    worker_cpu_share: float
    broker_cpu_share: float


def run_feature_bench(given: Mapping[str, Any], seconds: float, rounds: int, rate: float, report: Path | None) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack; `data` is a folder of recordings, or of folders of them by venue.
        seconds: Length of a freshness round.
        rounds: Freshness rounds.
        rate: Their events a second.
        report: JSON file for all figures.
    """
    data = given.get("data")
    for name, value in _OURS.items():
        os.environ.setdefault(name, value)

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        markets = _markets(data)
        steps = {name: [*measure_steps(events), *measure_pandas(events)] for name, events in markets.items()}
        throughputs = [uvloop.run(_measure_throughput(stack, name, events)) for name, events in markets.items()]
        freshness = [_measure_round(stack, seconds, rate, settings.dir / "published.npy") for _ in range(rounds)]
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
                "freshness": [asdict(row) for row in freshness],
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
    async with _copy(stack, last) as copy:
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
            while not _reaches(copy, newest):  # noqa: ASYNC110 - another process's work
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


def _measure_round(stack: Stack, seconds: float, rate: float, path: Path) -> Freshness:
    stack.restart("broker")
    stack.restart("worker")
    return uvloop.run(_measure_freshness(stack, seconds, rate, path))


async def _measure_freshness(stack: Stack, seconds: float, rate: float, path: Path) -> Freshness:
    argv = [sys.executable, "-m", __name__, str(stack.endpoints.kafka_bootstrap_servers), str(seconds), str(rate)]
    async with _copy(stack, _FRESHNESS_INSTRUMENTS) as copy:
        processes = {part: psutil.Process(stack[part].pid) for part in ("worker", "broker")}
        publisher = await asyncio.create_subprocess_exec(*argv, str(path))
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await copy.first.wait()
            await asyncio.sleep(_WARM_UP_SECONDS)
            used = {part: -_cpu_seconds(process) for part, process in processes.items()}
            before = await asyncio.to_thread(_worker_delays, stack)
            began = time.monotonic()
            async with asyncio.timeout(seconds + _PATIENCE_SECONDS):
                if await publisher.wait() != 0:
                    raise RuntimeError("the publisher failed")
            elapsed = time.monotonic() - began
            used = {part: used[part] + _cpu_seconds(process) for part, process in processes.items()}
            after = await asyncio.to_thread(_worker_delays, stack)
        finally:
            if publisher.returncode is None:
                publisher.kill()
                await publisher.wait()
        seen = {name: np.array(copy.seen[name]) for name in _FRESHNESS_INSTRUMENTS}
    instruments, published, acknowledged = np.load(path)
    measured = published >= published[0] + _WARM_UP_SECONDS * 1e9
    shown = np.zeros_like(published)
    for number, name in enumerate(_FRESHNESS_INSTRUMENTS):
        shown[instruments == number] = _shown(published[instruments == number], seen[name])
    measured &= shown > 0
    copied = (shown - published)[measured]
    return Freshness(
        events=len(copied),
        per_second=len(published) / (float(published[-1] - published[0]) / 1e9),
        acknowledged=_delay(acknowledged[measured] - published[measured]),
        read=_delay_of_buckets(after["read"] - before["read"]),
        written=_delay_of_buckets(after["written"] - before["written"]),
        copied=_delay(copied),
        from_broker=_delay((shown - acknowledged)[measured]),
        worst_ms=float(copied.max()) / 1e6,
        worker_cpu_share=used["worker"] / elapsed,
        broker_cpu_share=used["broker"] / elapsed,
    )


def _shown(published: NDArray[np.int64], seen: NDArray[np.int64]) -> NDArray[np.int64]:
    """When the first vector that includes each event came; 0 for events after the last vector."""
    came = np.append(seen[:, 0], 0)
    shown: NDArray[np.int64] = came[np.searchsorted(seen[:, 1], published)]
    return shown


def _delay(latencies_ns: NDArray[np.int64]) -> Delay:
    return Delay(*(float(value) / 1e6 for value in np.percentile(latencies_ns, (50, 99))))


def _worker_delays(stack: Stack) -> dict[str, NDArray[np.float64]]:
    """The worker's cumulative counts of delays, by step."""
    with urllib.request.urlopen(f"{stack.endpoints.worker_url}/metrics", timeout=5.0) as answer:  # noqa: S310 - our own
        text = answer.read().decode()
    name = WORKER_EVENT_DELAY_SECONDS.scraped_name
    counts: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name == name else ():
            if sample.name == f"{name}_bucket":
                counts.setdefault(sample.labels["step"], []).append(sample.value)
    return {step: np.array(values) for step, values in counts.items()}


def _delay_of_buckets(cumulative: NDArray[np.float64]) -> Delay:
    """The delay by a histogram, as if those of a bucket were spread evenly over it."""
    edges_ms = [0.0, *(1e3 * edge for edge in EDGES_SECONDS)]
    shares = np.concatenate(([0.0], cumulative[:-1])) / cumulative[-1]
    return Delay(*(float(np.interp(share, shares, edges_ms)) for share in (0.5, 0.99)))


class _Noting(FeatureCache):
    """A copy of the features that notes when it got which."""

    def __init__(self, redis_url: str, instruments: Iterable[str]) -> None:
        # No vector may be too old to count: the full log is.
        super().__init__(redis_url, FeatureCacheSettings(ttl_seconds=3600, timeout_seconds=5), instruments)
        self.seen: dict[str, list[tuple[int, int]]] = {name: [] for name in self.instruments}
        """By instrument: when a vector came, and when its newest event was published; nanoseconds."""
        self.first = asyncio.Event()
        """Set when any vector has come."""

    def accept(self, packed: bytes, arrival: Arrival | None = None) -> bool:
        accepted = super().accept(packed, arrival)
        if accepted:
            snapshot = decode(packed)
            self.seen[snapshot.instrument].append((time.time_ns(), snapshot.publish_time_ns))
            self.first.set()
        return accepted


@asynccontextmanager
async def _copy(stack: Stack, instruments: Iterable[str]) -> AsyncIterator[_Noting]:
    """A server's copy of some instruments, connected."""
    copy = _Noting(str(stack.endpoints.redis_url), instruments)
    following = asyncio.create_task(copy.run())
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while not copy.connected:  # noqa: ASYNC110 - a plain attribute
                await asyncio.sleep(0.01)
        yield copy
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def _reaches(copy: FeatureCache, newest: Mapping[str, int]) -> bool:
    """Whether each instrument's vector is as new as given by publish times."""
    entries = {instrument: copy.get(instrument) for instrument in newest}
    return all(entry and entry.snapshot.publish_time_ns >= newest[name] for name, entry in entries.items())


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _print(
    console: Console,
    steps: Mapping[str, Sequence[Step]],
    throughputs: Sequence[Throughput],
    freshness: Sequence[Freshness],
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
    table = Table(
        "event to copy, ms: median, p99",
        "broker",
        "worker",
        "Redis",
        "copy",
        "from broker",
        "worst",
        "CPU: worker",
        "broker",
        box=SIMPLE,
    )
    for number, one in enumerate(freshness, 1):
        delays = (one.acknowledged, one.read, one.written, one.copied, one.from_broker)
        table.add_row(
            f"{number}: {one.events:,} at {one.per_second:,.0f}/s",
            *(f"{delay.median_ms:.1f} {delay.p99_ms:.1f}" for delay in delays),
            f"{one.worst_ms:.1f}",
            f"{one.worker_cpu_share:.0%}",
            f"{one.broker_cpu_share:.0%}",
        )
    console.print(table)
    published, arrived = (
        median(delay.p99_ms for delay in delays)
        for delays in zip(*((one.copied, one.from_broker) for one in freshness), strict=True)
    )
    console.print(
        f"freshness, median of the rounds' p99: {published:.1f} ms from publication, {arrived:.1f} ms from the broker",
        highlight=False,
    )


class _NotingPublisher(EventPublisher):
    """Notes when the broker had which event, nanoseconds by the event's number."""

    def __init__(self, bootstrap_servers: str) -> None:
        super().__init__(bootstrap_servers, linger_seconds=_LINGER_SECONDS)
        self.acknowledged: dict[int, int] = {}

    async def send(self, event: pb.MarketEvent) -> asyncio.Future[object]:
        number = self.sent
        sending = await super().send(event)
        sending.add_done_callback(lambda _: self.acknowledged.__setitem__(number, time.time_ns()))
        return sending


def publish(bootstrap_servers: str, seconds: float, rate: float, path: Path) -> None:
    """Publishes simulated events at a rate and writes (instrument's number, publish time, when the broker had it)."""
    count = round(seconds * rate)
    source = simulate(1, _FRESHNESS_INSTRUMENTS, events_per_second=1000)
    events = [event for event, _ in zip(with_resets(source, "benchmark"), range(count), strict=False)]
    span = (events[-1].receive_time_ns - events[0].receive_time_ns) / 1e9
    gc.collect()
    gc.freeze()

    async def send() -> list[int]:
        publisher = _NotingPublisher(bootstrap_servers)
        async with publisher:
            await publisher.publish(events, speed=span / seconds)
        return [publisher.acknowledged[number] for number in range(count)]

    acknowledged = uvloop.run(send())
    numbers = [_FRESHNESS_INSTRUMENTS.index(event.instrument) for event in events]
    published = [event.publish_time_ns for event in events]
    np.save(path, np.array([numbers, published, acknowledged], dtype=np.int64))


if __name__ == "__main__":
    publish(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
