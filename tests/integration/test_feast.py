"""Feast's online and historical values against ours: a real Feast feature server beside a real Valkey."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import urllib.request
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from feature_cache.features import NAMES
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.engines import Engines
from feature_cache.worker.feast_push import FeastPush
from local.stack.ports import free_ports

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "feature_cache" / "feature_repo"
FEAST = Path(os.environ.get("PRETRADE_FEAST_VENV", ROOT / ".venv-feast")) / "bin"
INSTRUMENTS = ("BTCUSDT.SIM", "ETHUSDT.SIM")
TRAINING = """
import json, sys
import pandas
from feast import FeatureStore
sys.path.insert(0, ".")
from mf1 import training_set
orders = pandas.DataFrame(json.load(sys.stdin))
orders["event_timestamp"] = pandas.to_datetime(orders["event_timestamp"], utc=True, format="ISO8601")
found = training_set(FeatureStore("."), orders).sort_values("order")
print(found.drop(columns="event_timestamp").to_json(orient="records", double_precision=15))
"""

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (FEAST / "feast").exists(), reason="Feast's own environment is not there: make feast"),
]


@pytest.fixture
def environment(tmp_path: Path, redis_url: str) -> dict[str, str]:
    there = urlsplit(redis_url)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "proto" / "gen"))),
        "PRETRADE_FEAST_DIR": str(tmp_path),
        "PRETRADE_FEAST_REDIS": f"{there.hostname}:{there.port},password={there.password}",
        "FEAST_USAGE": "False",
    }


@contextmanager
def feature_server(environment: dict[str, str], log: Path) -> Iterator[str]:
    feast = [str(FEAST / "feast"), "--chdir", str(REPOSITORY)]
    subprocess.run([*feast, "apply"], env=environment, check=True, capture_output=True, timeout=120)
    [port] = free_ports(1)
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*feast, "serve", "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=file, stderr=file
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()  # it writes what it has gathered for the Parquet file before it ends
        server.wait(60)


def ask(url: str, body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


async def until_healthy(url: str) -> None:
    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except OSError:
            return False

    async with asyncio.timeout(120):
        while not await asyncio.to_thread(healthy):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.2)


async def push_market(url: str) -> dict[str, list[FeatureSnapshot]]:
    """Twelve seconds of a market through engines, pushed every second of it; what was pushed, by instrument."""
    start = datetime.now(UTC) - timedelta(seconds=60)
    engines = Engines(max_instruments=10)
    engines.assign(0, 0, 0)
    push = FeastPush(url, engines, interval_seconds=0.01)
    history: dict[str, list[FeatureSnapshot]] = {name: [] for name in INSTRUMENTS}
    events = list(simulate(7, INSTRUMENTS, duration_seconds=12))
    shift = int(start.timestamp() * 1e9) - events[0].event_time_ns
    running: asyncio.Task[None] | None = None
    offset = taken = 0
    for second in range(1, 13):
        while offset < len(events) and events[offset].event_time_ns <= events[0].event_time_ns + second * 10**9:
            event = type(events[offset])()
            event.CopyFrom(events[offset])
            event.event_time_ns += shift
            event.receive_time_ns += shift
            engines.take(0, offset, event.instrument.encode(), event.SerializeToString())
            offset += 1
        for name, engine in engines.all().items():
            history[name].append(engine.snapshot())
        taken += len(INSTRUMENTS)
        running = running or asyncio.create_task(push.run())
        async with asyncio.timeout(60):
            while push.pushed < taken:
                assert not push.failures
                await asyncio.sleep(0.01)
    assert running is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return history


def assert_equal(found: dict[str, float | None], wanted: FeatureSnapshot | None) -> None:
    values = [math.nan if (value := found[name]) is None else value for name in NAMES]
    expected = wanted.values if wanted is not None else np.full(len(NAMES), np.nan)
    np.testing.assert_array_equal(np.array(values, np.float32), expected)


def train(orders: list[dict[str, Any]], environment: dict[str, str]) -> str:
    """What Feast's own environment prints of the training set for these orders."""
    ended = subprocess.run(
        [str(FEAST / "python"), "-c", TRAINING],
        cwd=REPOSITORY,
        env=environment,
        input=json.dumps(orders),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    )
    return ended.stdout


def at(time_ns: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_ns // 1000)).isoformat()


async def test_feasts_online_and_historical_values_are_ours(environment: dict[str, str], tmp_path: Path) -> None:
    with feature_server(environment, tmp_path / "feast.log") as url:
        await until_healthy(url)
        history = await push_market(url)
        answer = await asyncio.to_thread(
            ask, f"{url}/get-online-features", {"feature_service": "mf1", "entities": {"instrument": INSTRUMENTS}}
        )
    columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
    for index, name in enumerate(INSTRUMENTS):
        assert_equal({key: column["values"][index] for key, column in columns.items()}, history[name][-1])

    orders: list[dict[str, Any]] = []
    expected: list[FeatureSnapshot | None] = []
    for name, pushed in history.items():
        times = [one.event_time_ns // 1000 * 1000 for one in pushed]
        before, after = [one - 10**6 for one in times], [one + 3 * 10**8 for one in times]
        for time_ns in (*times, *before, *after, times[-1] + 20 * 10**9):
            known = bisect_right(times, time_ns) - 1
            fresh = known >= 0 and time_ns - times[known] <= 10 * 10**9
            expected.append(pushed[known] if fresh else None)
            orders.append({"order": len(orders), "instrument": name, "event_timestamp": at(time_ns)})
    ended = await asyncio.to_thread(train, orders, environment)
    rows = json.loads(ended.splitlines()[-1])
    assert len(rows) == len(orders)
    assert sum(one is None for one in expected) == 2 * len(INSTRUMENTS), "before the first vector, and past its TTL"
    for row, wanted in zip(rows, expected, strict=True):
        assert_equal(row, wanted)
