"""`pretrade features` and `pretrade status`, against a real Redis, worker and server."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from rich.console import Console
from support.harness import INSTRUMENTS, Product, eventually

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.features import INDEX, MF1, N_FEATURES
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.report import InstrumentReport
from feature_cache.store.vectors import key_of as vector_key_of
from feature_cache.store.vectors import report_key_of as key_of
from feature_cache.store.watch import view
from pretrade.admin.v1 import admin_pb2

pytestmark = pytest.mark.stack

NAME = "WATCH.SIM"
TIDE = FeatureSet("tide", (Feature("height", "", "How high."), Feature("flow", "", "How fast.", signed=True)))
SETS = """
from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

TIDE = FeatureSet("tide", (Feature("height", "", "How high."), Feature("flow", "", "How fast.", signed=True)))
FEATURE_SETS = [ComputedSet(TIDE, lambda instrument: None)]
"""


def vector(sequence: int, now_ns: int, spread: float = 1.5) -> FeatureSnapshot:
    values = np.full(N_FEATURES, np.nan, dtype=np.float32)
    values[INDEX["spread_bps"]] = spread
    return FeatureSnapshot(NAME, sequence, now_ns, now_ns, 0, now_ns, 0, 99.5, np.nan, BookState.VALID, values)


def write(redis: Redis, snapshot: FeatureSnapshot) -> None:
    packed = encode(snapshot)
    redis.set(vector_key_of(NAME), packed, px=120_000)
    redis.publish(vector_key_of(NAME), packed)


def report(**changes: object) -> InstrumentReport:
    fields: dict[str, object] = {
        "worker": "w-1:42",
        "state": BookState.UNKNOWN,
        "unknown_because": "gap",
        "event_age_seconds": 0.1,
        "lag_records": 7,
        "vector_version": MF1.version,
        "events": 10,
        "gaps": 2,
        "crossings": 1,
        "resets": 0,
        "time_restarts": 0,
    }
    return InstrumentReport.model_validate(fields | changes)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


def features(redis_url: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "local", "features", NAME, "--redis", redis_url, *options]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def vectors(redis: Redis) -> Iterator[None]:
    """A new vector ten times a second, each with its sequence as spread: a command may take long to start."""
    stopped = threading.Event()

    def run() -> None:
        for sequence in itertools.count(5):
            seconds, micros = redis.time()
            write(redis, vector(sequence, seconds * 10**9 + micros * 1000, spread=float(sequence)))
            if stopped.wait(0.1):
                return

    writer = threading.Thread(target=run)
    writer.start()
    try:
        yield
    finally:
        stopped.set()
        writer.join()


def test_features_are_shown_once_with_what_the_worker_reports(redis: Redis, redis_url: str) -> None:
    ended = features(redis_url, "--once")
    assert (ended.returncode, "no features" in ended.stdout) == (1, True), ended.stderr
    redis.set(key_of(NAME), report(state=BookState.VALID, unknown_because="").model_dump_json())
    with vectors(redis):
        ended = features(redis_url, "--once", "--json")
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert (shown["book"], shown["bid"], shown["ask"]) == ("valid", 99.5, None)
    assert (shown["features"]["spread_bps"], shown["features"]["ret_1s_bps"]) == (shown["sequence"], None)
    assert (shown["lag_records"], shown["worker"], shown["vector_version"]) == (7, "w-1:42", MF1.version)
    assert 0 <= shown["age_seconds"] < 10


async def test_features_are_shown_again_whenever_they_change(redis: Redis, redis_url: str) -> None:
    argv = [sys.executable, "-m", "local", "features", NAME, "--redis", redis_url, "--json"]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    seen: list[int] = []
    try:
        with vectors(redis):
            async with asyncio.timeout(60):
                while len(seen) < 3:
                    shown = json.loads(await process.stdout.readline())
                    if shown["features"] is None:  # it started before the first
                        continue
                    assert shown["features"]["spread_bps"] == shown["sequence"]
                    seen.append(shown["sequence"])
    finally:
        process.kill()
        await process.wait()
    assert seen == sorted(set(seen))


@pytest.mark.long
def test_another_set_is_watched_by_its_own_names(redis: Redis, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "sets.py").write_text(SETS)
    name = "features:tide:{WATCH.SIM}"
    seconds, micros = redis.time()
    now_ns = seconds * 10**9 + micros * 1000
    values = np.array([0.25, np.nan], np.float32)
    snapshot = FeatureSnapshot(
        NAME, 1, now_ns, now_ns, 0, now_ns, 0, 99.5, 100.5, BookState.VALID, values, feature_set=TIDE
    )
    redis.set(name, encode(snapshot), px=60_000)
    ended = features(redis_url, "--once", "--json", "--features", "tide", "--file", str(tmp_path / "sets.py"))
    assert ended.returncode == 0, ended.stderr
    shown = json.loads(ended.stdout)
    assert (shown["vector_version"], shown["features"]) == (TIDE.version, {"height": 0.25, "flow": None})
    ended = features(redis_url, "--once", "--features", "nosuch")
    assert ended.returncode == 2
    assert "'nosuch' is no set known here" in ended.stderr


def test_without_redis_the_command_says_so(tmp_path: Path) -> None:
    ended = features("redis://127.0.0.1:1/0", "--once")
    assert (ended.returncode, "Redis cannot be reached" in ended.stderr) == (3, True), ended.stderr


def test_an_unknown_book_is_shown_with_its_reason() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(view(NAME, None, report()))
    assert "no features (gap)" in captured.get()
    assert "lag 7 records" in captured.get()


def test_the_status_of_the_server_tells_of_book_lag_and_vector(product: Product) -> None:
    first, second = INSTRUMENTS[:2]
    url = product.stack.endpoints.redis_url
    assert url is not None
    product.market.state = BookState.UNKNOWN
    with Redis.from_url(url) as redis:
        redis.set(key_of(first), report().model_dump_json())
        redis.set(key_of(second), b"not a report")
        unknown, other = eventually(
            lambda: product.status().features[:2],  # each has a vector of its own, and one comes first
            lambda features: all(feature.problem == "book unknown" for feature in features),
        )
        try:
            assert (unknown.instrument, unknown.usable) == (first, False)
            assert (unknown.book, unknown.book_reason) == (admin_pb2.BOOK_STATE_UNKNOWN, "gap")
            assert (unknown.lag_records, unknown.worker, unknown.book_losses) == (7, "w-1:42", 3)
            assert unknown.vector_version == MF1.version
            assert (other.HasField("lag_records"), other.worker, other.book) == (False, "", unknown.book)
            product.market.state = BookState.VALID
            known = eventually(lambda: product.status().features[0], lambda feature: feature.usable)
            assert (known.book, known.book_reason) == (admin_pb2.BOOK_STATE_VALID, "")
            assert known.age.ToNanoseconds() >= 0
        finally:
            redis.delete(key_of(first), key_of(second))
