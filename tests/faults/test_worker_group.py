"""Several workers of one group: members that join, leave, freeze and die, and what is stored meanwhile.

They end one after the other, since the embedded broker does not bear two at once: see `local.stack.parts.broker`.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis
from support.feature_conditions import Seen, copy_of, fresh, url
from support.waiting import until

from feature_cache.store.codec import decode
from feature_cache.store.report import InstrumentReport
from feature_cache.store.vectors import FeatureStore, connect, key_of, report_key_of
from local.stack.parts import worker as worker_part
from local.stack.process import Process
from local.stack.settings import LocalSettings
from local.stack.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

NAMES: Final = tuple(f"{name}.SIM" for name in ("BTCUSDT", "ETHUSDT", "A", "B", "C", "D", "E", "F"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A simulated market over all four partitions; every test leaves one worker, which holds them all."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("group"), instruments=NAMES)
    with Stack(settings, parts={"valkey", "broker", "worker", "market"}) as stack:
        yield stack


def metrics(stack: Stack) -> str:
    with urllib.request.urlopen(f"{stack.endpoints.worker_url}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def partitions_taken(worker: Process) -> int:
    """How often a worker of the stack has taken a partition over, by its log."""
    return worker.log_path.read_text().count("worker.partition_taken")


class Workers:
    """Further workers of the stack's group.

    Args:
        stack: With a broker and a Valkey.
        logs: Folder for what they say.
    """

    def __init__(self, stack: Stack, logs: Path) -> None:
        self._stack = stack
        self._logs = logs
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        """Starts one; returns its process id."""
        env = worker_part.env(self._stack.endpoints, 0, None)
        with (self._logs / f"worker-{len(self.running)}.log").open("wb") as log:
            self.running.append(subprocess.Popen(worker_part.argv(), env=env, stderr=log, stdout=subprocess.DEVNULL))
        return self.running[-1].pid

    async def end(self, number: signal.Signals) -> None:
        """Ends the one started last."""
        one = self.running.pop()
        one.send_signal(number)
        await asyncio.to_thread(one.wait)


@asynccontextmanager
async def more_workers(stack: Stack, logs: Path) -> AsyncIterator[Workers]:
    workers = Workers(stack, logs)
    try:
        yield workers
    finally:
        while workers.running:
            await workers.end(signal.SIGKILL)


class Watch:
    """Follows what is stored and what is notified of every instrument.

    Args:
        redis: Asked on and on.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._store = FeatureStore(redis, 10.0, 2.0)
        self._stored: dict[str, int] = {}
        self._values: dict[tuple[str, int], bytes] = {}
        self._newest: Counter[str] = Counter()
        self.vectors = 0
        """Stored vectors seen."""
        self.backwards: list[tuple[str, int, int]] = []
        """Stored vectors that gave way to ones of lower sequences."""
        self.notified = 0
        self.notified_late = 0
        """Notifications of a lower sequence than was notified before; every copy refuses them."""
        self.twofold: list[tuple[str, int]] = []
        """Sequences that were notified with two different vectors."""

    @property
    def summary(self) -> str:
        return f"{self.vectors} stored vectors, none went back; of {self.notified} notified {self.notified_late} late"

    async def owners(self) -> dict[str, int]:
        """The process that reports each instrument, by instrument."""
        found = await self._store.read_texts(report_key_of, NAMES)
        return {
            name: int(InstrumentReport.model_validate_json(one).worker.split(":")[1]) for name, one in found.items()
        }

    async def until_owned(self, condition: Callable[[dict[str, int]], bool]) -> float:
        """Waits until every instrument is reported and the owners are as wanted; returns the seconds it took."""
        began = time.monotonic()
        async with asyncio.timeout(60):
            while len(owners := await self.owners()) < len(NAMES) or not condition(owners):  # noqa: ASYNC110 - others' state
                await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_stored())
            tasks.create_task(self._read_notified())

    async def _read_stored(self) -> None:
        keys = [key_of(name) for name in NAMES]
        while True:
            for packed in await self._redis.mget(keys):
                if isinstance(packed, bytes):
                    found = decode(packed)
                    before = self._stored.get(found.instrument, 0)
                    self.vectors += found.sequence != before
                    if found.sequence < before:
                        self.backwards.append((found.instrument, before, found.sequence))
                    self._stored[found.instrument] = found.sequence
            await asyncio.sleep(0.005)

    async def _read_notified(self) -> None:
        async with self._redis.pubsub() as pubsub:
            await pubsub.subscribe(*map(key_of, NAMES))
            async for message in pubsub.listen():
                if message["type"] == "message":
                    self._take_notified(message["data"])

    def _take_notified(self, packed: bytes) -> None:
        found = decode(packed)
        self.notified += 1
        self.notified_late += found.sequence < self._newest[found.instrument]
        self._newest[found.instrument] = max(found.sequence, self._newest[found.instrument])
        values = self._values.setdefault((found.instrument, found.sequence), found.values.tobytes())
        if values != found.values.tobytes():
            self.twofold.append((found.instrument, found.sequence))


@asynccontextmanager
async def watching(stack: Stack) -> AsyncIterator[Watch]:
    """A watch that runs; at the end no stored vector may have gone back."""
    async with connect(url(stack), 1.0) as redis:
        watch = Watch(redis)
        task = asyncio.create_task(watch.run())
        try:
            yield watch
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert watch.vectors > 0
    assert not watch.backwards


@pytest.mark.long
@pytest.mark.fault(
    "C2",
    "A feature worker joins and leaves again",
    "Instruments move without a stale or duplicate vector. Every server's copy keeps being updated.",
)
async def test_instruments_move_to_a_worker_that_joins_and_back(stack: Stack, tmp_path: Path, seen: Seen) -> None:
    first = stack["worker"].pid
    async with watching(stack) as watch, copy_of(url(stack), NAMES) as cache, more_workers(stack, tmp_path) as workers:
        await until(lambda: fresh(cache))
        await watch.until_owned(lambda owners: set(owners.values()) == {first})
        second = workers.start()
        took = await watch.until_owned(lambda owners: set(owners.values()) == {first, second})
        await until(lambda: fresh(cache))
        seen(f"joined: shared after {took:.1f} s, of which most is its start")
        await workers.end(signal.SIGTERM)
        took = await watch.until_owned(lambda owners: set(owners.values()) == {first})
        await until(lambda: fresh(cache))
        seen(f"left: all with the first after {took:.1f} s")
    seen(watch.summary)
    assert not watch.twofold
    assert "\npretrade_worker_log_truncations_total 0.0\n" in await asyncio.to_thread(metrics, stack)


@pytest.mark.long
@pytest.mark.fault(
    "C2",
    "A feature worker freezes beyond its session and wakes up; others are killed",
    "Other workers take its instruments over, and it rejoins. No stored vector is replaced by an older one.",
)
async def test_what_a_frozen_or_killed_worker_held_goes_to_others(stack: Stack, tmp_path: Path, seen: Seen) -> None:
    main = stack["worker"]
    async with watching(stack) as watch, copy_of(url(stack), NAMES) as cache, more_workers(stack, tmp_path) as workers:
        await until(lambda: fresh(cache))
        others = {workers.start(), workers.start()}
        await watch.until_owned(lambda owners: set(owners.values()) == {main.pid, *others})
        main.pause()
        try:
            took = await watch.until_owned(lambda owners: set(owners.values()) <= others)
            await until(lambda: fresh(cache))
            seen(f"frozen: replaced after {took:.1f} s")
        finally:
            taken = partitions_taken(main)
            main.resume()
        await until(lambda: partitions_taken(main) > taken)
        took = await watch.until_owned(lambda owners: set(owners.values()) == {main.pid, *others})
        await until(lambda: fresh(cache))
        seen(f"woken: holds some again, shared {took:.1f} s later")
        killed = workers.running[-1].pid
        await workers.end(signal.SIGKILL)
        took = await watch.until_owned(lambda owners: killed not in owners.values())
        await until(lambda: fresh(cache))
        seen(f"killed: replaced after {took:.1f} s")
        await workers.end(signal.SIGTERM)
        took = await watch.until_owned(lambda owners: set(owners.values()) == {main.pid})
        await until(lambda: fresh(cache))
        seen(f"alone again after {took:.1f} s")
    seen(watch.summary)
