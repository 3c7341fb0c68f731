"""`pretrade demo`: the whole product at work on this machine, with a replica failure halfway through."""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import grpc.aio
import sqlalchemy as sa
import uvloop
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from feature_cache import features
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from loadtest.generators.measurement import Answer
from loadtest.generators.open_loop import decide_at_rate
from loadtest.generators.orders import OrderFlow
from local.demo.live_features import mids, wait_for_features
from local.stack.command import FAILED, OK, run_with_stack
from local.stack.parts import server
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.views import replica_table
from pretrade.client.enum_names import enum_name
from pretrade.client.figures import figure
from pretrade.client.stack_file import Endpoints
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.audit.store.schema import DECISIONS

DEADLINE_SECONDS: Final = 0.2
"""What each order of the demo allows for its answer: the embedded server's cap."""

_KILL_AT, _RESTART_AT = 0.5, 0.6
"""Parts of the run after which the primary is killed, and started again."""
_SHOWN_ORDERS: Final = 12
_PICTURE_COLUMNS: Final = 126
_DRAIN_SECONDS: Final = 30.0
_SHOWN_FEATURES: Final = ("spread_bps", "imbalance_l5", "ofi_1s")


@dataclass(slots=True)
class _Row:
    """One order as the viewer sees it."""

    order: pb.Order
    decision: pb.Decision
    latency_seconds: float
    """From when it was due."""
    mid: float
    values: Sequence[float]


@dataclass(slots=True)
class _Tally:
    """What came of the orders."""

    sent: int = 0
    latencies_seconds: list[float] = field(default_factory=list)
    late: int = 0
    decision_ids: set[str] = field(default_factory=set)
    sources: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    feature_ages_seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    shown: deque[_Row] = field(default_factory=lambda: deque(maxlen=_SHOWN_ORDERS))

    def add(self, row: _Row) -> None:
        decision = row.decision
        self.latencies_seconds.append(row.latency_seconds)
        self.late += row.latency_seconds > DEADLINE_SECONDS
        self.decision_ids.add(decision.decision_id)
        self.sources[enum_name(pb.Source, decision.source)] += 1
        self.actions[enum_name(pb.Action, decision.action)] += 1
        if decision.HasField("feature_age"):
            self.feature_ages_seconds.append(decision.feature_age.ToNanoseconds() / 1e9)
        self.shown.append(row)


@dataclass(frozen=True, slots=True)
class Summary:
    """How the demo went; the keys of its JSON."""

    decisions: int
    """Orders that got a decision."""
    orders: int
    """Orders sent."""
    answered_in_deadline: float
    """Share of the orders that got a decision inside their deadline."""
    p50_ms: float
    p99_ms: float
    p999_ms: float
    by_source: Mapping[str, int]
    by_action: Mapping[str, int]
    errors: Mapping[str, int]
    """Orders without a decision, by gRPC status."""
    audit_rows: int
    """How many of the decisions are in the audit database."""
    feature_age_p99_ms: float
    events_consumed: int

    @property
    def sound(self) -> bool:
        """True when every order was answered and every answer audited."""
        return 0 < self.orders == self.decisions == self.audit_rows

    def problems(self, rate: float) -> Iterator[str]:
        """What was not as it should be, for people; nothing when it was sound."""
        if not self.orders:
            yield "no order was sent: send them for longer, or more a second"
        if self.decisions < self.orders:
            yield (
                f"{self.orders - self.decisions:,} of {self.orders:,} orders got no decision in"
                f" {DEADLINE_SECONDS * 1e3:.0f} ms: this machine is busy, or too small for {rate:g} orders a second"
                " beside the whole stack; --rate 20, or `make demo RATE=20`, sends fewer"
            )
        if self.audit_rows < self.decisions:
            yield f"{self.decisions - self.audit_rows:,} of {self.decisions:,} decisions are not in the audit database"

    def as_json(self) -> str:
        """The summary as a JSON object."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, indent=2)


def run_demo(
    given: Mapping[str, Any], duration_seconds: float, rate: float, json_path: Path | None, svg_path: Path | None
) -> int:
    """Starts the stack, sends orders for a while, kills the primary halfway, and sums up.

    Args:
        given: Settings of the stack given on the command line.
        duration_seconds: How long orders are sent.
        rate: How many a second.
        json_path: Where the summary goes as JSON; None for nowhere.
        svg_path: Where a picture of the last screen and the summary goes; None for nowhere.

    Returns:
        The exit code: 0 when every order was answered and audited, 1 when not or when a part failed, 2 when asked for
        something impossible, 130 when interrupted.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        console.print(
            f"market data: [bold]simulated by a seeded simulator[/], scenario {settings.scenario}"
            if settings.data is None
            else f"market data: [bold]recorded session {escape(str(settings.data))}[/] at speed {settings.speed}"
        )
        summary, last_screen = uvloop.run(_run(stack, duration_seconds, rate, console))
        verdict = Group(
            _summary_table(summary), *(Text.from_markup(f"[red]✗[/] {each}") for each in summary.problems(rate))
        )
        console.print(verdict, highlight=False)
        if svg_path is not None:
            picture = Console(record=True, width=_PICTURE_COLUMNS, file=io.StringIO(), force_terminal=True)
            picture.print(last_screen, "", verdict, highlight=False)
            picture.save_svg(str(svg_path), title="pretrade demo", unique_id="demo")
        if json_path is not None:
            json_path.write_text(summary.as_json() + "\n")
        return OK if summary.sound else FAILED

    return run_with_stack(given, use)


async def _run(stack: Stack, duration_seconds: float, rate: float, console: Console) -> tuple[Summary, Group]:
    """Sends the orders; returns what came of them, and what the screen showed last."""
    endpoints = stack.endpoints
    assert endpoints.decision is not None
    assert endpoints.admin is not None
    assert endpoints.redis_url is not None
    cache = FeatureCache(endpoints.redis_url, FeatureCacheSettings(), endpoints.instruments)
    following = asyncio.create_task(cache.run())
    async with (
        grpc.aio.insecure_channel(endpoints.decision) as decisions,
        server.admin_credentials(endpoints).aio_channel(endpoints.admin) as admin,
    ):
        await decisions.channel_ready()
        await wait_for_features(cache)
        tally = _Tally()
        screen = _Screen(tally, cache, admin_pb2_grpc.AdminServiceStub(admin), console)
        showing = asyncio.create_task(screen.run())
        failing = asyncio.create_task(_fail_primary(stack, screen, duration_seconds))
        await _send_orders(decision_pb2_grpc.DecisionServiceStub(decisions), cache, tally, duration_seconds, rate)
        await failing
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
        last_screen = await screen.now()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    audited = await asyncio.to_thread(_count_audited, endpoints, tally.decision_ids)
    return _summarise(tally, audited, await asyncio.to_thread(_events_consumed, endpoints)), last_screen


async def _send_orders(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    cache: FeatureCache,
    tally: _Tally,
    duration_seconds: float,
    rate: float,
) -> None:
    """Sends orders at random instants, whatever happens to earlier ones."""
    flow = OrderFlow(cache.instruments, seed=1)

    def next_order() -> pb.Order:
        tally.sent += 1
        return flow.next(mids(cache))

    def observe(answer: Answer) -> None:
        if answer.decision is None:
            tally.errors[answer.error] += 1
            return
        entry = cache.get(answer.order.instrument)
        values, mid = [], float("nan")
        if entry is not None:
            values = [float(entry.snapshot.values[features.MF1.index[name]]) for name in _SHOWN_FEATURES]
            mid = entry.snapshot.mid
        tally.add(_Row(answer.order, answer.decision, answer.seconds, mid, values))

    await decide_at_rate(
        stub,
        next_order,
        rate=rate,
        seconds=duration_seconds,
        deadline_seconds=DEADLINE_SECONDS,
        observe=observe,
        seed=2,
    )


async def _fail_primary(stack: Stack, screen: _Screen, duration_seconds: float) -> None:
    """Kills the primary halfway and starts it again a little later."""
    began = time.monotonic()
    await asyncio.sleep(_KILL_AT * duration_seconds)
    await asyncio.to_thread(stack["primary"].kill)
    screen.event(f"{time.monotonic() - began:5.1f} s  the primary replica was killed with SIGKILL")
    await asyncio.sleep((_RESTART_AT - _KILL_AT) * duration_seconds)
    screen.event(f"{time.monotonic() - began:5.1f} s  the primary replica is being started again")
    await asyncio.to_thread(stack.restart, "primary")
    screen.event(f"{time.monotonic() - began:5.1f} s  the primary replica is back")


class _Screen:
    """The live view: the newest orders, the replicas, and what happened."""

    def __init__(
        self,
        tally: _Tally,
        cache: FeatureCache,
        admin: admin_pb2_grpc.AdminServiceAsyncStub,
        console: Console,
    ) -> None:
        self._tally = tally
        self._cache = cache
        self._admin = admin
        self._console = console
        self._events: list[str] = []

    def event(self, text: str) -> None:
        """Adds a line to what happened; printed for good where there is no terminal to draw on."""
        self._events.append(text)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    async def run(self) -> None:
        """Draws until cancelled. Without a terminal it prints a line every two seconds instead, if there is news."""
        if not self._console.is_terminal:
            printed = ""
            while True:
                await asyncio.sleep(2.0)
                if (line := self._line()) != printed:
                    self._console.print(line, highlight=False, soft_wrap=True)
                    printed = line
        with Live(console=self._console, auto_refresh=False) as live:
            while True:
                live.update(await self.now(), refresh=True)
                await asyncio.sleep(0.25)

    async def now(self) -> Group:
        """What is to be seen at this moment."""
        status = await self._admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=2.0)
        return Group(self._orders(), replica_table(status.replicas), self._line(), *self._events)

    def _orders(self) -> Table:
        columns = ("instrument", "side", "mid", *_SHOWN_FEATURES, "action", "score", "source", "latency")
        table = Table(*columns, title="newest decisions", title_justify="left")
        for row in reversed(self._tally.shown):
            decision = row.decision
            table.add_row(
                row.order.instrument,
                enum_name(pb.Side, row.order.side),
                figure(row.mid, ",.2f"),
                *(figure(value, "+.3f") for value in row.values),
                enum_name(pb.Action, decision.action),
                f"{decision.score:.3f} / {decision.threshold:.3f}" if decision.HasField("score") else "",
                enum_name(pb.Source, decision.source),
                f"{row.latency_seconds * 1e3:.1f} ms",
            )
        return table

    def _line(self) -> str:
        tally = self._tally
        sources = "  ".join(f"{source} {count}" for source, count in tally.sources.items())
        recent = sorted(tally.latencies_seconds[-500:])
        p99 = f"p99 of the last 500: {_quantile(recent, 0.99) * 1e3:.1f} ms" if recent else ""
        errors = f"  errors {dict(tally.errors)}" if tally.errors else ""
        return f"{len(tally.latencies_seconds)} of {tally.sent} orders decided  {sources}  {p99}{errors}"


def _count_audited(endpoints: Endpoints, decision_ids: set[str]) -> int:
    """How many of the decisions are in the audit database; waits `_DRAIN_SECONDS` at most until all are."""
    assert endpoints.database_url is not None
    if not decision_ids:
        return 0
    # Ids rise with time, so that one range holds them all.
    query = sa.select(DECISIONS.c.decision_id).where(
        DECISIONS.c.decision_id.between(min(decision_ids), max(decision_ids))
    )
    engine = sa.create_engine(endpoints.database_url)
    deadline = time.monotonic() + _DRAIN_SECONDS
    try:
        while True:
            with engine.connect() as connection:
                rows = [decision_id for decision_id in connection.scalars(query) if decision_id in decision_ids]
            if len(rows) >= len(decision_ids) or time.monotonic() > deadline:
                return len(rows)
            time.sleep(0.1)
    finally:
        engine.dispose()


def _events_consumed(endpoints: Endpoints) -> int:
    """Market events that the feature worker has taken in, from its metrics."""
    with urlopen(f"{endpoints.worker_url}/metrics", timeout=5.0) as response:  # noqa: S310 - our own loopback URL
        lines = response.read().decode().splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("pretrade_worker_events_total")))


def _summarise(tally: _Tally, audit_rows: int, events_consumed: int) -> Summary:
    latencies = sorted(tally.latencies_seconds) or [float("nan")]
    ages = sorted(tally.feature_ages_seconds) or [float("nan")]
    in_time = len(tally.latencies_seconds) - tally.late
    return Summary(
        decisions=len(tally.latencies_seconds),
        orders=tally.sent,
        answered_in_deadline=in_time / tally.sent if tally.sent else 0.0,
        p50_ms=round(statistics.median(latencies) * 1e3, 3),
        p99_ms=round(_quantile(latencies, 0.99) * 1e3, 3),
        p999_ms=round(_quantile(latencies, 0.999) * 1e3, 3),
        by_source=dict(tally.sources),
        by_action=dict(tally.actions),
        errors=dict(tally.errors),
        audit_rows=audit_rows,
        feature_age_p99_ms=round(_quantile(ages, 0.99) * 1e3, 3),
        events_consumed=events_consumed,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _summary_table(summary: Summary) -> Table:
    table = Table(show_header=False, title="summary", title_justify="left")
    table.add_row("orders", f"{summary.orders:,}")
    table.add_row("decisions", f"{summary.decisions:,}")
    table.add_row(f"answered inside {DEADLINE_SECONDS * 1e3:.0f} ms", f"{summary.answered_in_deadline:.4%}")
    latencies = (figure(value, ".2f") for value in (summary.p50_ms, summary.p99_ms, summary.p999_ms))
    table.add_row("latency p50 / p99 / p99.9", f"{' / '.join(latencies)} ms")
    table.add_row("by source", _counts(summary.by_source))
    table.add_row("by action", _counts(summary.by_action))
    if summary.errors:
        table.add_row("[red]without a decision[/]", _counts(summary.errors))
    table.add_row("audit rows", f"{summary.audit_rows:,}")
    table.add_row("feature age p99", f"{figure(summary.feature_age_p99_ms, '.1f')} ms")
    table.add_row("market events consumed", f"{summary.events_consumed:,}")
    return table


def _counts(counts: Mapping[str, int]) -> str:
    items: Iterable[tuple[str, int]] = sorted(counts.items(), key=lambda item: -item[1])
    return "  ".join(f"{name} {count:,}" for name, count in items)
