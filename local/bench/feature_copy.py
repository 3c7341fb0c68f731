"""What a server's copy of many busy instruments takes: `python -m local.bench.feature_copy`, or `make bench-copy`.

A process writes vectors into a Valkey of its own as a feature worker does, and another follows them as a decision
server does, with compiled code and without in turn. Shown is the CPU that the follower takes of one core, medians of
all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import uvloop
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from feature_cache import logs
from feature_cache.compiled import SWITCH
from feature_cache.features import N_FEATURES
from feature_cache.store.codec import BookState, FeatureSnapshot
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.vectors import FeatureStore, connect
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack

_TTL_SECONDS: Final = 10.0
_TIMEOUT_SECONDS: Final = 5.0
_WARM_UP_SECONDS: Final = 0.5
_WRITES_A_SECOND: Final = 500
"""A worker that shall be fresh writes what has changed every two milliseconds."""
_WAYS: Final = ("compiled", "python")


def _names(instruments: int) -> list[str]:
    return [f"N{number:03d}USDT.SIM" for number in range(instruments)]


async def _write(url: str, instruments: int, changes: float) -> None:
    """Writes so many vectors of each instrument a second, until it is ended."""
    names, values = _names(instruments), np.zeros(N_FEATURES, dtype=np.float32)
    at_once = max(1, round(instruments * changes / _WRITES_A_SECOND))
    pause = at_once / (instruments * changes)
    first, due, sequence = 0, time.monotonic(), time.time_ns()
    async with connect(url, _TIMEOUT_SECONDS) as redis:
        store = FeatureStore(redis, _TTL_SECONDS, _TIMEOUT_SECONDS)
        while True:
            sequence, now = sequence + 1, time.time_ns()
            some = [names[number % instruments] for number in range(first, first + at_once)]
            await store.write(
                FeatureSnapshot(name, sequence, now, now, now, now, 0, 1.0, 2.0, BookState.VALID, values)
                for name in some
            )
            first, due = (first + at_once) % instruments, due + pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _follow(url: str, instruments: int, seconds: float) -> None:
    """Follows them, and prints what that took of a core, and how many vectors a second came."""
    cache = FeatureCache(url, FeatureCacheSettings(), _names(instruments))
    following = asyncio.create_task(cache.run())
    while not cache.connected:  # noqa: ASYNC110 - set by the task that follows
        await asyncio.sleep(0.01)
    await asyncio.sleep(_WARM_UP_SECONDS)
    taken, began, used = cache.updates, time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    print((time.process_time() - used) / took, (cache.updates - taken) / took)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


@contextlib.contextmanager
def _writer(url: str, given: argparse.Namespace) -> Iterator[None]:
    with subprocess.Popen(_command("write", given), stdin=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            assert process.stdin is not None
            process.stdin.write(f"{url}\n")
            process.stdin.flush()
            yield
            if process.poll() is not None:
                raise RuntimeError("the process that writes has ended")
        finally:
            process.terminate()


def _command(part: str, given: argparse.Namespace) -> list[str]:
    """This program as one of its parts, which reads the URL: others may see arguments, and it has a password."""
    numbers = [f"--instruments={given.instruments}", f"--changes={given.changes}", f"--seconds={given.seconds}"]
    return [sys.executable, "-m", "local.bench.feature_copy", f"--part={part}", *numbers]


def _measure(url: str, given: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Share of a core and vectors a second of each round, with compiled code and without."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in _WAYS}
    with _writer(url, given):
        for _ in range(given.rounds):
            for way in _WAYS:
                said = subprocess.run(  # noqa: S603
                    _command("follow", given),
                    input=f"{url}\n",
                    capture_output=True,
                    text=True,
                    check=True,
                    env=os.environ | ({} if way == "compiled" else {SWITCH: "0"}),
                )
                share, rate = map(float, said.stdout.split())
                found[way].append((share, rate))
                print(f"{way}: {share:.1%} of a core, {rate:,.0f} vectors/s", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruments", type=int, default=200)
    parser.add_argument("--changes", type=float, default=50.0, help="of each instrument, a second")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--part", choices=("write", "follow"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    logs.configure("warning", "bench")
    if given.part:
        url = sys.stdin.readline().strip()
        with contextlib.suppress(KeyboardInterrupt):
            if given.part == "write":
                uvloop.run(_write(url, given.instruments, given.changes))
            else:
                uvloop.run(_follow(url, given.instruments, given.seconds))
        return OK

    def use(stack: Stack, _: LocalSettings, console: Console) -> int:
        assert stack.endpoints.redis_url is not None
        table = Table("", "of a core", "vectors/s", box=SIMPLE)
        for way, rounds in _measure(stack.endpoints.redis_url, given).items():
            share, rate = (median(column) for column in zip(*rounds, strict=True))
            table.add_row(way, f"{share:.1%}", f"{rate:,.0f}")
        console.print(table)
        return OK

    with TemporaryDirectory(prefix="pretrade-copy-") as directory:
        return run_with_stack({"dir": Path(directory), "market": False}, use, parts={"valkey"})


if __name__ == "__main__":
    sys.exit(main())
