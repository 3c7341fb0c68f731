"""A soak: open-loop load for a long time, while somebody watches what the server's processes hold.

    python -m loadtest.studies.soak --target HOST:PORT --rate 300 --minutes 30 \
        --process server=PID --metrics http://HOST:PORT/metrics --json soak.json

`pretrade soak` starts the stack and this. Processes are watched on this machine only; a server elsewhere shows its
tasks and queues through `--metrics`. What is flat, `trend.py` says; these may grow over the run, after a warm-up:

| what | allowed |
|---|---|
| memory of each process | 8 MiB or 5 % |
| descriptors of each process | 8 |
| threads of each process | 4 |
| processes of each tree | 1 |
| tasks of each event loop | 32 |
| rows not yet shipped to the database | what ten seconds bring |
| p50 of each minute | 2 ms or 50 % |

A process that was there after the warm-up and is not at the end has been lost, which no sound server does: it counts as
a failure, too, as does every order without a decision beyond `--errors-allowed`. One that came later is judged when it
was there for half of the time.

A run that is interrupted is judged by what it saw. Exit codes: 0 all flat; 1 not; 2 wrong usage, or too short to tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import grpc.aio
import typer
import uvloop
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.generators.measurement import SOURCES, Answer, clock, percentile
from loadtest.generators.open_loop import decide_at_rate
from loadtest.generators.orders import OrderFlow
from loadtest.studies.trend import Allowance, Trend, trend
from loadtest.studies.watched import DESCRIPTORS, KINDS, MEMORY, PROCESSES, TASKS, THREADS, UNSHIPPED, Key, sample
from pretrade.decision.v1 import decision_pb2_grpc

P50: Final = "p50 ms"
CALLERS: Final = "callers"
_ALLOWED: Final[Mapping[str, Allowance]] = {
    MEMORY: Allowance(8.0, 0.05),
    DESCRIPTORS: Allowance(8.0, 0.0),
    THREADS: Allowance(4.0, 0.0),
    PROCESSES: Allowance(1.0, 0.0),
    TASKS: Allowance(32.0, 0.0),
    P50: Allowance(2.0, 0.5),
}
_UNSHIPPED_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 10.0
_SLICES: Final = 30
"""Latencies are summed up by the minute, or by a thirtieth of a shorter run."""


@dataclass(slots=True)
class Slice:
    """The answers to the orders that were due in one slice of the run."""

    latencies: list[float] = field(default_factory=list)
    """Seconds; emptied once they are summed up."""
    errors: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Summary:
    """One slice of the run, summed up; milliseconds of the orders that got a decision, None when none did."""

    seconds: float
    """When it began."""
    decisions: int
    p50_ms: float | None
    p99_ms: float | None
    highest_ms: float | None
    errors: Mapping[str, int]
    sources: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """What the soak found."""

    rate: float
    seconds: float
    warm_up_seconds: float
    slices: Sequence[Summary]
    trends: Mapping[Key, Trend]
    lost: Sequence[str]
    """Processes that were there after the warm-up and are not at the end."""
    errors: int
    """Orders without a decision."""
    errors_allowed: int

    @property
    def flat(self) -> bool:
        """Whether the server could go on like this."""
        return self.errors <= self.errors_allowed and not self.lost and all(t.flat for t in self.trends.values())


@dataclass(slots=True)
class Series:
    """Samples of everything watched, one row of them at a time."""

    times: list[float] = field(default_factory=list)
    """Seconds since the load began."""
    rows: list[Mapping[Key, float]] = field(default_factory=list)

    def keys(self) -> set[Key]:
        """Everything that was ever sampled."""
        return {key for row in self.rows for key in row}

    def values(self, key: Key) -> list[float]:
        """A series as long as `times`; NaN where it was not there."""
        return [row.get(key, math.nan) for row in self.rows]


async def soak(
    target: str,
    instruments: Sequence[str],
    *,
    rate: float,
    seconds: float,
    deadline_seconds: float,
    roots: Mapping[str, int],
    metrics: Sequence[str],
    every_seconds: float,
    told: Callable[[Summary], None] = lambda summary: None,
) -> tuple[list[Summary], Series]:
    """Sends orders and takes samples; SIGINT and SIGTERM end it early.

    Args:
        target: `HOST:PORT` of the decision service.
        instruments: Those that it decides.
        rate: Orders a second.
        seconds: How long.
        deadline_seconds: Of each order.
        roots: Processes to watch, by name, with all that they start.
        metrics: URLs of metrics to watch.
        every_seconds: Between two samples.
        told: Called for each slice of the run when it is over.

    Raises:
        TimeoutError: There is no connection within ten seconds.
    """
    length = min(60.0, seconds / _SLICES)
    slices: defaultdict[int, Slice] = defaultdict(Slice)
    summaries: list[Summary] = []

    def observe(answer: Answer) -> None:
        one = slices[int((answer.since - began) / length)]
        if answer.decision is None:
            one.errors[answer.error] += 1
        else:
            one.latencies.append(answer.seconds)
            one.sources[SOURCES[answer.decision.source]] += 1

    def sum_up(until: float) -> None:
        for number in sorted(slices):
            if (number + 1) * length + deadline_seconds <= until:
                summaries.append(_summary(number * length, slices.pop(number)))
                told(summaries[-1])

    flow = OrderFlow(instruments, ref_prefix=f"soak-{time.time_ns():x}-")
    series = Series()
    async with grpc.aio.insecure_channel(target) as channel:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await channel.channel_ready()
        stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)
        async with _watching(series, roots, metrics, every_seconds, sum_up):
            began = clock()
            load = asyncio.create_task(
                decide_at_rate(
                    stub,
                    lambda: flow.next({}),
                    rate=rate,
                    seconds=seconds,
                    deadline_seconds=deadline_seconds,
                    observe=observe,
                )
            )
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, load.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await load
    sum_up(math.inf)
    return summaries, series


@asynccontextmanager
async def _watching(
    series: Series,
    roots: Mapping[str, int],
    metrics: Sequence[str],
    every_seconds: float,
    sum_up: Callable[[float], None],
) -> AsyncIterator[None]:
    """Takes a sample now and then, until it is left."""

    async def watch() -> None:
        began = time.perf_counter()
        while True:
            row = await asyncio.to_thread(sample, roots, metrics)
            series.times.append(time.perf_counter() - began)
            series.rows.append(row)
            sum_up(series.times[-1])
            await asyncio.sleep(every_seconds)

    watcher = asyncio.create_task(watch())
    try:
        yield
        if watcher.done():
            watcher.result()
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


def _summary(begins: float, one: Slice) -> Summary:
    ms = [1e3 * seconds for seconds in one.latencies]
    p50, p99, highest = (percentile(ms, share) if ms else None for share in (0.5, 0.99, 1.0))
    return Summary(begins, len(ms), p50, p99, highest, dict(one.errors), dict(one.sources))


def judge(
    slices: Sequence[Summary],
    series: Series,
    *,
    rate: float,
    seconds: float,
    warm_up_seconds: float,
    errors_allowed: int,
) -> Report:
    """The verdict on what a soak saw.

    Raises:
        ValueError: The run was too short to tell.
    """
    allowed = {**_ALLOWED, UNSHIPPED: Allowance(rate * _UNSHIPPED_SECONDS, 0.0)}
    judged = [row for at, row in zip(series.times, series.rows, strict=True) if at >= warm_up_seconds]
    there = Counter(key for row in judged for key in row)
    lost = {who for who, what in judged[0].keys() - judged[-1].keys() if what == MEMORY} if judged else set()
    trends = {
        key: trend(series.times, series.values(key), allowed[key[1]], warm_up_seconds)
        for key, rows in sorted(there.items())
        if rows >= len(judged) / 2 and key[0] not in lost
    }
    decided = [one for one in slices if one.p50_ms is not None]
    begins, p50 = [one.seconds for one in decided], [one.p50_ms or 0.0 for one in decided]
    trends[CALLERS, P50] = trend(begins, p50, allowed[P50], warm_up_seconds)
    return Report(
        rate=rate,
        seconds=seconds,
        warm_up_seconds=warm_up_seconds,
        slices=slices,
        trends=trends,
        lost=sorted(lost),
        errors=sum(sum(one.errors.values()) for one in slices),
        errors_allowed=errors_allowed,
    )


def document(report: Report, series: Series) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "flat": report.flat,
        "rate": report.rate,
        "seconds": report.seconds,
        "warm_up_seconds": report.warm_up_seconds,
        "decisions": sum(one.decisions for one in report.slices),
        "errors": report.errors,
        "errors_allowed": report.errors_allowed,
        "lost": list(report.lost),
        "trends": [
            {"who": who, "what": what, "flat": found.flat, **asdict(found)}
            for (who, what), found in report.trends.items()
        ],
        "slices": [asdict(one) for one in report.slices],
        "samples": {
            "seconds": series.times,
            # A sample that is missing is null: JSON knows no NaN.
            **{f"{who} {what}": [row.get((who, what)) for row in series.rows] for who, what in sorted(series.keys())},
        },
    }


def tables(report: Report) -> list[Table]:
    """What each process held, and the rest: what it was, what it became, and what it grew by."""
    decisions = sum(one.decisions for one in report.slices)
    processes = Table(
        title=f"{decisions:,} decisions in {report.seconds / 60:g} minutes, {report.errors} orders without one",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    for heading in ("process", *KINDS):
        processes.add_column(heading, justify="left" if heading == "process" else "right")
    for who in sorted({who for who, what in report.trends if what in KINDS}):
        processes.add_row(who, *(_cell(report.trends[who, kind]) for kind in KINDS))
    for who in report.lost:
        processes.add_row(who, "[red]lost[/]")
    others = Table(
        caption=f"from the end of the warm-up ({report.warm_up_seconds:g} s) to the end, and growth by the slope",
        box=SIMPLE,
        padding=(0, 0, 0, 1),
    )
    for heading in ("", "what", "from→to"):
        others.add_column(heading, justify="right" if heading.startswith("from") else "left")
    for (who, what), found in report.trends.items():
        if what not in KINDS:
            others.add_row(who, what, _cell(found))
    return [processes, others]


def _cell(found: Trend) -> str:
    text = f"{found.first:,.4g}→{found.last:,.4g} {found.growth:+.1f}"
    return text if found.flat else f"[red]{text}, allowed {found.allowed:,.1f}[/]"


def _pairs(given: Sequence[str]) -> dict[str, int]:
    try:
        return {name: int(pid) for name, pid in (one.split("=", 1) for one in given)}
    except ValueError:
        raise typer.BadParameter("must be NAME=PID", param_hint="--process") from None


def main(
    target: Annotated[str, typer.Option(help="HOST:PORT of the decision service.")],
    instrument: Annotated[list[str], typer.Option(help="SYMBOL.VENUE; can be repeated.")],
    rate: Annotated[float, typer.Option(min=1, max=100_000, help="Orders a second.")] = 300.0,
    minutes: Annotated[float, typer.Option(min=0.05, max=10_000, help="How long orders are sent.")] = 30.0,
    warm_up: Annotated[
        float | None, typer.Option(min=0, help="Seconds at the beginning that are not judged. [a fifth of the run]")
    ] = None,
    deadline_ms: Annotated[float, typer.Option(min=1, max=10_000, help="Deadline of every order.")] = 200.0,
    process: Annotated[
        list[str] | None, typer.Option(help="NAME=PID of a process to watch with its children; can be repeated.")
    ] = None,
    metrics: Annotated[list[str] | None, typer.Option(help="URL of metrics to watch; can be repeated.")] = None,
    every: Annotated[float, typer.Option(min=0.05, max=600, help="Seconds between two samples.")] = 5.0,
    errors_allowed: Annotated[int, typer.Option(min=0, help="Orders that may go without a decision.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for everything that was seen.")] = None,
) -> None:
    """Send orders for a long time; say whether memory, descriptors, threads, tasks, queues and latency stay flat."""
    console = Console()
    seconds = 60 * minutes
    warm_up_seconds = seconds / 5 if warm_up is None else warm_up

    def told(one: Summary) -> None:
        failed = f", [red]{dict(one.errors)}[/]" if one.errors else ""
        latency = "" if one.p50_ms is None else f"  p50 {one.p50_ms:.1f} ms  p99 {one.p99_ms:.1f} ms"
        line = f"{one.seconds / 60:6.1f} min  {one.decisions:>8,} decisions{latency}{failed}"
        console.print(line, highlight=False, soft_wrap=True)

    slices, series = uvloop.run(
        soak(
            target,
            instrument,
            rate=rate,
            seconds=seconds,
            deadline_seconds=deadline_ms / 1e3,
            roots=_pairs(process or ()),
            metrics=metrics or (),
            every_seconds=every,
            told=told,
        )
    )
    try:
        report = judge(
            slices,
            series,
            rate=rate,
            seconds=min(seconds, series.times[-1] if series.times else 0.0),
            warm_up_seconds=warm_up_seconds,
            errors_allowed=errors_allowed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--minutes") from error
    for each in tables(report):
        console.print(each)
    console.print("flat" if report.flat else "[red]not flat[/]")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(document(report, series), indent=1) + "\n")
    raise typer.Exit(0 if report.flat else 1)


if __name__ == "__main__":
    typer.run(main)
