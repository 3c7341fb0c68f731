"""Shows one instrument's features in the terminal, live: what a decision server would decide on, read from Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable

from redis.exceptions import RedisError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.cluster import open_store
from feature_cache.store.codec import BookState
from feature_cache.store.l1 import CachedFeatures, FeatureCache, FeatureCacheSettings
from feature_cache.store.report import InstrumentReport, ReportReader

_FRAMES_PER_SECOND = 10
_REPORT_SECONDS = 1.0
_CONNECT_SECONDS = 3.0
_TTL_SECONDS = 1.0  # nothing is written
_FOUND, _ABSENT, _UNREACHABLE = 0, 1, 3


async def watch(
    redis_url: str, instrument: str, feature_set: FeatureSet = MF1, *, once: bool, as_json: bool, console: Console
) -> int:
    """Shows an instrument's features, again whenever they change, until cancelled.

    Args:
        redis_url: The Redis that the feature worker writes to.
        instrument: `SYMBOL.VENUE`.
        feature_set: Which features.
        once: End after showing what there is now.
        as_json: One JSON object a line for every vector, instead of a table.
        console: Where the table goes.

    Returns:
        The exit code: 0, 1 when there are no features (with `once`), 3 when Redis cannot be reached.
    """
    cache = FeatureCache(redis_url, FeatureCacheSettings(), [instrument], feature_set)
    following = asyncio.create_task(cache.run())
    try:
        async with open_store(redis_url, _TTL_SECONDS, _CONNECT_SECONDS) as store:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await store.check()
                    while not cache.connected:  # noqa: ASYNC110 — set by the task that follows
                        await asyncio.sleep(0.01)
            except (RedisError, OSError) as error:
                print(f"Redis cannot be reached: {error or 'no answer'}", file=sys.stderr)
                return _UNREACHABLE
            reader = ReportReader(store)
            if once:
                report = (await reader.read([instrument])).get(instrument)
                entry = cache.get(instrument)
                if as_json:
                    print(json.dumps(as_object(instrument, entry, report)))
                else:
                    console.print(view(instrument, entry, report))
                return _ABSENT if entry is None else _FOUND
            await _follow(cache, reader, instrument, as_json, console)
            return _FOUND
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _follow(cache: FeatureCache, reader: ReportReader, instrument: str, as_json: bool, console: Console) -> None:
    report: InstrumentReport | None = None
    asked = -math.inf
    shown = -1
    live = None if as_json else Live(console=console, auto_refresh=False)
    with live or contextlib.nullcontext():
        while True:
            if time.monotonic() - asked > _REPORT_SECONDS:
                asked = time.monotonic()
                report = (await reader.read([instrument])).get(instrument)
            entry = cache.get(instrument)
            if live is not None:
                live.update(view(instrument, entry, report), refresh=True)
                await asyncio.sleep(1 / _FRAMES_PER_SECOND)
                continue
            if entry is not None and entry.snapshot.sequence != shown:
                shown = entry.snapshot.sequence
                print(json.dumps(as_object(instrument, entry, report)), flush=True)
            await asyncio.sleep(0.005)


def as_object(
    instrument: str,
    entry: CachedFeatures | None,
    report: InstrumentReport | None,
    monotonic: Callable[[], float] = time.monotonic,
) -> dict[str, object]:
    """What is known, for JSON; an undefined feature is null."""
    found: dict[str, object] = {"instrument": instrument}
    if report is not None:
        found |= {"worker": report.worker, "lag_records": report.lag_records, "unknown_because": report.unknown_because}
    if entry is None:
        return found | {"features": None}
    snapshot = entry.snapshot
    return found | {
        "vector_version": snapshot.feature_set.version,
        "sequence": snapshot.sequence,
        "event_time_ns": snapshot.event_time_ns,
        "age_seconds": round(entry.age_seconds(monotonic()), 6),
        "book": snapshot.state.name.lower(),
        "bid": _number(snapshot.bid),
        "ask": _number(snapshot.ask),
        "features": {
            name: _number(float(value)) for name, value in zip(snapshot.feature_set.names, snapshot.values, strict=True)
        },
    }


def view(
    instrument: str,
    entry: CachedFeatures | None,
    report: InstrumentReport | None,
    monotonic: Callable[[], float] = time.monotonic,
) -> Group:
    """What is known, for a terminal."""
    table = Table("feature", "value")
    table.columns[1].justify = "right"
    lag = "" if report is None or report.lag_records is None else f"  lag {report.lag_records:,} records"
    worker = "  [red]no worker reports[/]" if report is None else f"  worker {report.worker}"
    if entry is None:
        why = f" ({report.unknown_because})" if report is not None and report.unknown_because else ""
        return Group(f"[bold]{instrument}[/]  [red]no features{why}[/]{lag}{worker}")
    snapshot = entry.snapshot
    book = snapshot.state.name.lower()
    if snapshot.state is BookState.UNKNOWN:
        book = f"[red]{book}{f': {report.unknown_because}' if report is not None and report.unknown_because else ''}[/]"
    for name, value in zip(snapshot.feature_set.names, snapshot.values, strict=True):
        table.add_row(name, "" if math.isnan(value) else f"{value:,.6g}")
    return Group(
        f"[bold]{instrument}[/]  bid {snapshot.bid:,.8g}  ask {snapshot.ask:,.8g}  book {book}",
        f"age {1000 * entry.age_seconds(monotonic()):,.1f} ms  {snapshot.feature_set.version}  "
        f"sequence {snapshot.sequence}{lag}{worker}",
        table,
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
