"""`pretrade canary-demo`: three canaries on the whole stack under a flow of orders, each until it is decided.

A version that is as good as the champion goes through all steps and replaces it. One that answers late, and one whose
scores are inverted, are rolled back. Everything is real: the archives, TorchServe loading them while it serves, the
orders, the clock. Only the waiting times are shorter than in production: see `SETTINGS`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc.aio
import sqlalchemy as sa
import uvloop
from rich.console import Console
from rich.table import Table

from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from loadtest.generators.measurement import Answer
from loadtest.generators.open_loop import decide_at_rate
from loadtest.generators.orders import OrderFlow
from local.demo.live_features import mids, wait_for_features
from local.demo.variants import inverted, late, recalibrated
from local.stack.command import FAILED, OK, run_with_stack
from local.stack.parts import server
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.audit.store.canaries import SCORE_PAIRS
from server.audit.store.schema import DECISIONS
from server.models.registry import Registry

SETTINGS: Final = {
    "PRETRADE_CANARY__DWELL_SECONDS": "3",
    "PRETRADE_CANARY__PATIENCE_SECONDS": "120",
    "PRETRADE_CANARY__MIN_ORDERS": "20",
    "PRETRADE_CANARY__INDEPENDENT_SECONDS": "0.5",
    "PRETRADE_CANARY__MIN_PAIRS": "20",
    "PRETRADE_CANARY__MIN_OUTCOMES": "20",
    "PRETRADE_CANARY__MAX_BRIER_EXCESS": "0.1",
    "PRETRADE_CANARY__MAX_FALLBACK_SHARE": "0.4",
    "PRETRADE_CANARY__MAX_ERROR_EXCESS": "0.05",
    "PRETRADE_CANARY__SLOW_SECONDS": "0.018",
    "PRETRADE_SLO__OBJECTIVE": "0.9",
    "PRETRADE_SLO__CANARY_RATE": "5",
}
"""What is shorter and smaller than in earnest: minutes at a step, and evidence from thousands of orders. Rows half a
second apart pass for independent, though they share most of an outcome: else each step would take ten minutes. On a
machine that runs everything a batch is not slow before it takes several times as long as usual, and the error budget
is large: what a TorchServe that starts costs everybody is no fault of the canary's."""
LATE_SECONDS: Final = 0.02
_STEPS: Final = (0.05, 0.25, 0.5, 1.0)
_ALL_STEPS: Final = (0.01, 0.05, 0.25, 0.5, 1.0)
_FLOWS: Final = 400
"""Strategies: with each instrument one order flow, of which a canary gets its share."""
_DEADLINE_SECONDS: Final = 0.2
_LONGEST_SECONDS: Final = 240.0
_CHAMPION_SECONDS: Final = 60.0
_DRAIN_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.1


@dataclass
class Trial:
    """One canary, and how it ended."""

    name: str
    expected: str
    """`PROMOTED` or `ROLLED_BACK`."""
    version: str = ""
    champion: str = ""
    state: str = ""
    verdict: str = ""
    load_seconds: float = 0.0
    """Loading, warm-up and canned check."""
    seconds: float = 0.0
    """From its first share of the flows to its end."""
    first_decision_to_end_seconds: float | None = None
    """From the first decision that it answered; None when it answered none."""
    weights: list[float] = field(default_factory=list)
    decisions: int = 0
    """Decisions that it answered, as callers heard them."""
    audited: int = 0
    """The same, as the audit has them."""
    pairs: int = 0
    """Rows that both models scored, as the audit has them."""
    affected: list[str] = field(default_factory=list)
    """Ids of the decisions that it answered."""

    @property
    def sound(self) -> bool:
        """True when the canary ended as it should, and the audit has every decision that callers received from it.

        The audit also has those whose callers had given up.
        """
        return self.state == self.expected and self.decisions <= self.audited


@dataclass
class Orders:
    """What came of all orders."""

    sent: int = 0
    decided: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    latencies_seconds: list[float] = field(default_factory=list)
    by_canary: dict[str, list[pb.Decision]] = field(default_factory=dict)
    """Decisions that a canary answered, by its version."""

    def add(self, answer: Answer) -> None:
        """Adds what became of one order."""
        decision = answer.decision
        if decision is None:
            self.errors[answer.error] += 1
            return
        self.decided += 1
        self.latencies_seconds.append(answer.seconds)
        self.sources[enum_name(pb.Source, decision.source)] += 1
        if decision.source == pb.SOURCE_CANARY:
            self.by_canary.setdefault(decision.model_version, []).append(decision)


def run_canaries(given: Mapping[str, Any], rate: float, only: list[str], json_path: Path | None) -> int:
    """Runs the stack and the canaries.

    Args:
        given: Settings of the stack given on the command line.
        rate: Orders a second.
        only: Names of the canaries to run: `good`, `late`, `inverted`; all when empty.
        json_path: Where the results go as JSON; None for nowhere.

    Returns:
        The exit code: 0 when each ended as it should and the audit has every decision that it made, 1 when not.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

    def use(stack: Stack, _settings: LocalSettings, console: Console) -> int:
        trials, orders = uvloop.run(_run(stack, rate, only, console))
        console.print(_table(trials))
        slow = sorted(orders.latencies_seconds)[int(0.99 * len(orders.latencies_seconds))] if orders.decided else 0.0
        console.print(
            f"{orders.decided:,} of {orders.sent:,} orders decided, p99 {slow * 1e3:.1f} ms; {dict(orders.sources)}"
            + (f"  [red]{dict(orders.errors)}[/]" if orders.errors else ""),
            highlight=False,
        )
        if json_path is not None:
            summary = {
                "canaries": [asdict(trial) for trial in trials],
                "orders": orders.sent,
                "decided": orders.decided,
                "sources": orders.sources,
                "errors": orders.errors,
                "p99_ms": round(slow * 1e3, 3),
            }
            json_path.write_text(json.dumps(summary, indent=2) + "\n")
        return OK if all(trial.sound for trial in trials) else FAILED

    return run_with_stack(given, use, parts=PARTS)


async def _run(stack: Stack, rate: float, only: list[str], console: Console) -> tuple[list[Trial], Orders]:
    endpoints = stack.endpoints
    assert endpoints.decision is not None
    assert endpoints.admin is not None
    assert endpoints.redis_url is not None
    assert endpoints.model_store is not None
    registry = Registry(Path(endpoints.model_store))
    variants: dict[str, tuple[str, Callable[[str], str]]] = {
        "good": ("PROMOTED", lambda champion: recalibrated(registry, champion)),
        "late": ("ROLLED_BACK", lambda champion: late(registry, champion, LATE_SECONDS)),
        "inverted": ("ROLLED_BACK", lambda champion: inverted(registry, champion)),
    }
    cache = FeatureCache(endpoints.redis_url, FeatureCacheSettings(), endpoints.instruments)
    following = asyncio.create_task(cache.run())
    orders, trials = Orders(), []
    async with (
        grpc.aio.insecure_channel(endpoints.decision) as decisions,
        server.admin_credentials(endpoints).aio_channel(endpoints.admin) as admin,
    ):
        await decisions.channel_ready()
        await wait_for_features(cache)
        stub = admin_pb2_grpc.AdminServiceStub(admin)
        stopped, decision_stub = asyncio.Event(), decision_pb2_grpc.DecisionServiceStub(decisions)
        sending = asyncio.create_task(_send(decision_stub, cache, orders, rate, stopped))
        for name, (expected, make) in variants.items():
            if only and name not in only:
                continue
            trials.append(await _try(stub, Trial(name, expected), make, console))
        stopped.set()
        await sending
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert endpoints.database_url is not None
    for trial in trials:
        _conclude(trial, orders)
        await asyncio.to_thread(_look_up, endpoints.database_url, trial)
    return trials, orders


async def _try(
    stub: admin_pb2_grpc.AdminServiceAsyncStub, trial: Trial, make: Callable[[str], str], console: Console
) -> Trial:
    """Starts a canary and follows it to its end."""
    status = await stub.GetStatus(admin_pb2.GetStatusRequest(this_process_only=True), timeout=5.0)
    trial.champion = status.replicas[0].model_version
    trial.version = await asyncio.to_thread(make, trial.champion)
    console.print(f"[bold]{trial.name}[/]: canary {trial.version} against champion {trial.champion}", highlight=False)
    began = time.monotonic()
    request = admin_pb2.StartCanaryRequest(
        model_version=trial.version,
        steps=_ALL_STEPS if trial.expected == "PROMOTED" else _STEPS,
        author="canary-demo",
        reason=f"the {trial.name} one",
    )
    await stub.StartCanary(request, timeout=120.0)
    trial.load_seconds = round(time.monotonic() - began, 3)
    deadline = time.monotonic() + _LONGEST_SECONDS
    while True:
        canary = (await stub.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0)).canary
        if canary.weight and canary.weight not in trial.weights:
            trial.weights.append(canary.weight)
            console.print(f"  {canary.weight:.0%} of the flows", highlight=False)
        if canary.state != admin_pb2.CANARY_STATE_RUNNING or time.monotonic() > deadline:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    trial.state = enum_name(admin_pb2.CanaryState, canary.state)
    trial.verdict = canary.verdict_reason
    trial.seconds = round((canary.ended_at.ToNanoseconds() - canary.started_at.ToNanoseconds()) / 1e9, 3)
    trial.first_decision_to_end_seconds = canary.ended_at.ToNanoseconds() / 1e9
    console.print(f"  {trial.state} after {trial.seconds:.1f} s: {trial.verdict}", highlight=False, markup=False)
    if trial.state == "PROMOTED":
        await _wait_for_champion(stub, trial.version)
    return trial


async def _wait_for_champion(stub: admin_pb2_grpc.AdminServiceAsyncStub, version: str) -> None:
    """Waits until both of the champion's replicas answer with a version."""
    async with asyncio.timeout(_CHAMPION_SECONDS):
        while True:
            status = await stub.GetStatus(admin_pb2.GetStatusRequest(this_process_only=True), timeout=5.0)
            if all(replica.model_version == version for replica in status.replicas[:2]):
                return
            await asyncio.sleep(_LOOK_SECONDS)


def _conclude(trial: Trial, orders: Orders) -> None:
    """What the callers saw of a canary."""
    answered = sorted(orders.by_canary.get(trial.version, ()), key=lambda decision: decision.decision_id)
    trial.decisions = len(answered)
    trial.affected = [decision.decision_id for decision in answered]
    ended_at = trial.first_decision_to_end_seconds
    assert ended_at is not None
    trial.first_decision_to_end_seconds = (
        round(ended_at - answered[0].decided_at.ToNanoseconds() / 1e9, 3) if answered else None
    )


def _look_up(database_url: str, trial: Trial) -> None:
    """What the audit has of a canary; waits `_DRAIN_SECONDS` at most for all of it."""
    mine = sa.and_(DECISIONS.c.source == "CANARY", DECISIONS.c.model_version == trial.version)
    queries = (
        sa.select(sa.func.count()).select_from(DECISIONS).where(mine),
        sa.select(sa.func.count()).select_from(SCORE_PAIRS).where(SCORE_PAIRS.c.challenger_version == trial.version),
    )
    engine = sa.create_engine(database_url)
    deadline = time.monotonic() + _DRAIN_SECONDS
    try:
        while True:
            with engine.connect() as connection:
                trial.audited, trial.pairs = (connection.scalar(query) or 0 for query in queries)
            if trial.audited >= trial.decisions or time.monotonic() > deadline:
                return
            time.sleep(0.1)
    finally:
        engine.dispose()


async def _send(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    cache: FeatureCache,
    orders: Orders,
    rate: float,
    stopped: asyncio.Event,
) -> None:
    """Sends orders of many strategies at random instants until stopped, and then waits for their answers."""
    flow, dice = OrderFlow(cache.instruments, seed=1), random.Random(2)  # noqa: S311 - no cryptography

    def next_order() -> pb.Order:
        orders.sent += 1
        order = flow.next(mids(cache))
        order.strategy = f"{order.strategy}-{dice.randrange(_FLOWS)}"
        return order

    await decide_at_rate(
        stub,
        next_order,
        rate=rate,
        deadline_seconds=_DEADLINE_SECONDS,
        observe=orders.add,
        seed=3,
        stopped=stopped,
    )


def _table(trials: list[Trial]) -> Table:
    columns = (
        "canary",
        "end",
        "steps",
        "load s",
        "trial s",
        "first decision → end s",
        "its decisions",
        "audited",
        "pairs",
    )
    table = Table(*columns, title="canaries", title_justify="left")
    for trial in trials:
        to_end = trial.first_decision_to_end_seconds
        table.add_row(
            trial.name,
            trial.state if trial.sound else f"[red]{trial.state}, wanted {trial.expected}[/]",
            " ".join(f"{weight:.0%}" for weight in trial.weights),
            f"{trial.load_seconds:.1f}",
            f"{trial.seconds:.1f}",
            "none" if to_end is None else f"{to_end:.1f}",
            f"{trial.decisions:,}",
            f"{trial.audited:,}",
            f"{trial.pairs:,}",
        )
    return table
