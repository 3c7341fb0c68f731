"""The server that the benchmark of the decision path measures: the parts of a real one, without network.

What stands for the model servers answers every batch after two milliseconds, and takes no CPU for it. A second model
takes a set of its own, with features of `mf1`, computed ones and one that callers may bring, and decides the orders of
one strategy of three.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np

from fallback.budget import BudgetSettings
from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.chain import Chain
from fallback.guards import Guards, GuardSettings
from fallback.model_limits import LimitGuards, limits_of
from fallback.rules import RulesBaseline, RulesSettings
from feature_cache import feature_sets, features
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.token_bucket import TokenBuckets
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import Objective, SloSettings
from server.canary.pairs import PairRecorder
from server.control.file import ControlFile
from server.control.state import ControlSettings, ControlState
from server.decision.admission import Admission, AdmissionSettings
from server.decision.convert import OrderReader
from server.decision.following import Observers
from server.decision.idempotency import IdempotencyWindow
from server.decision.ids import Ids
from server.decision.markets import Markets
from server.decision.metrics import DecisionMetrics
from server.decision.other_sets import OtherSets
from server.decision.packets import PacketWriter
from server.decision.plane import DataPlane
from server.decision.recorder import Recording
from server.decision.replies import Replies
from server.decision.reports import DecisionReports
from server.decision.shared_keys import SharedKeys, make_memory
from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.champion import Champion
from server.inference.embedded_check import EmbeddedCheck, EmbeddedSettings
from server.inference.model_map import MapRule, ModelMap
from server.inference.model_names import DEFAULT
from server.inference.pool import Pool
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.routed import RoutedScores, RoutedShadow, RoutedStage
from server.inference.shadow import Shadow
from server.inference.wire import ModelIdentity, ScoreBatch
from server.journal.journal import Durability, Journal, JournalSettings
from server.rpc.call_context import CallContexts
from server.rpc.decision import DecisionServicer
from server.rpc.stream import StreamSettings
from server.security.orders import OrderAccess
from server.security.refusals import Refusals
from server.telemetry.decision_log import DecisionLogSettings, decision_log
from server.timing.loop_lag import LoopLag

INSTRUMENTS: Final = tuple(f"COIN{number}USDT.SIM" for number in range(10))
_MARKET_SECONDS: Final = 0.05
_FLUSH_SECONDS: Final = 0.1
_MODEL_SECONDS: Final = 0.002
_CAP_SECONDS: Final = 10.0
"""Long: a decision that a busy machine holds up is measured as well."""
_VERSION: Final = "ab" * 8
_SECOND_VERSION: Final = "cd" * 8
_SECOND: Final = "second"
SECOND_STRATEGY: Final = "vwap"
"""Whose orders the second model decides."""
BROUGHT: Final = pb.FeatureVector(feature_set_id="bench", values=[math.nan] * 5 + [0.5])
"""What a caller may bring to the second model."""
_ROLES: Final = ("primary", "secondary", "challenger")
_SETS: Final = """
from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet

FEATURE_SETS = [ComputedSet(FeatureSet("bench", (
    Feature("spread_bps", "bps", "Copied.", 0.0, source="mf1"),
    Feature("imbalance_l5", "", "Copied.", -1.0, 1.0, signed=True, source="mf1"),
    Feature("weighted_mid_bps", "bps", "Copied.", signed=True, source="mf1"),
    Feature("momentum_bps", "bps", "Computed.", signed=True),
    Feature("flow", "", "Computed.", -1.0, 1.0, signed=True),
    Feature("urgency", "", "Brought.", 0.0, 1.0, source=CALLER),
)), object)]
"""


class Model(Replica):
    """Answers each batch after some time, whatever is in it."""

    def __init__(
        self, name: str, lag: LoopLag, under_way: Callable[[], int], version: str = _VERSION, of: FeatureSet = MF1
    ) -> None:
        # A machine that is busy delays answers; they are waited for, or something else would be measured.
        patient = BatcherSettings(min_patience_seconds=5.0, max_patience_seconds=5.0)
        limits = ReplicaLimits(ReplicaSettings(warm_up_seconds=0.0), patient, BreakerSettings())
        clock = time.monotonic
        super().__init__(
            name,
            "nowhere",
            "champion",
            None,
            limits,
            clock=clock,
            random=lambda: 0.5,
            stalled_seconds=lag.stalled_seconds,
            under_way=under_way,
        )
        self._identity = ModelIdentity("champion", version, 0.5, 0, of)

    @property
    def feature_set(self) -> FeatureSet:
        """That of its model."""
        return self._identity.feature_set

    async def _score(self, rows: list[bytes], traceparent: str = "") -> ScoreBatch:
        await asyncio.sleep(_MODEL_SECONDS)
        return ScoreBatch(self._identity, np.full(len(rows), 0.75, dtype=np.float32))


class Server(NamedTuple):
    """What is measured."""

    servicer: DecisionServicer
    primaries: list[Model]
    metrics: DecisionMetrics


async def open_server(
    stack: AsyncExitStack, folder: Path, durability: Durability, limited: int, endpoints: int, models: int
) -> Server:
    """Opens it, until the stack is closed.

    Args:
        stack: Closes it.
        folder: Where the journal is made.
        durability: Of the journal.
        limited: Features that the guards of the model's limits look at.
        endpoints: Of the primary.
        models: That decide side by side: one, or two with different feature sets.
    """
    clock, new_id = time.monotonic, Ids()
    lag, budget = LoopLag(clock), BudgetSettings(cap_seconds=_CAP_SECONDS)
    journal = await stack.enter_async_context(
        Journal(JournalSettings(path=folder / "journal.db", durability=durability))
    )
    replies = await stack.enter_async_context(Replies(journal, clock))
    control = ControlState(
        ControlSettings(), ControlFile(folder / "control.json"), {}, journal, "bench", new_id,
        time.time_ns, clock,
    )  # fmt: skip
    admission = Admission(AdmissionSettings(max_in_flight=4_096), clock)
    primaries = [Model(f"primary-{one}", lag, lambda: admission.in_flight) for one in range(1, endpoints + 1)]
    secondary, challenger = (Model(name, lag, lambda: admission.in_flight) for name in ("secondary", "challenger"))
    primary = primaries[0] if endpoints == 1 else Pool("primary", primaries, Random(0).random)  # noqa: S311
    for model in (*primaries, secondary, challenger):
        stack.push_async_callback(model.batcher.close)
    keys = make_memory(1_000)
    stack.callback(os.close, keys)
    cache = FeatureCache("redis://unused", FeatureCacheSettings(), INSTRUMENTS)
    second = _second_set(folder) if models > 1 else None
    others = None if second is None else FeatureCache("redis://unused", FeatureCacheSettings(), INSTRUMENTS, second)
    market = asyncio.create_task(_market(cache, *(() if others is None else (others,))))
    lagging = asyncio.create_task(lag.run())
    stack.callback(market.cancel)
    stack.callback(lagging.cancel)
    await asyncio.sleep(0)
    metrics = DecisionMetrics()
    cached_scores = CachedScores(CachedScoreSettings(), clock)
    reports = DecisionReports(
        (stack.enter_context(decision_log(DecisionLogSettings(one_in=0, slow_seconds=10), everything=False)),)
    )
    champion = Champion(primary, secondary, RetryBudget(RetrySettings(), clock), False, budget, clock, lambda: 0.5)
    pairs = PairRecorder(journal, time.time_ns)
    flushing = asyncio.create_task(_flush(pairs))
    stack.callback(flushing.cancel)
    shadow = Shadow(
        [challenger],
        (primary, secondary),
        observe=pairs.add,
        observe_together=pairs.add_together,
    )
    stages: Any = {"model": champion, "cached_score": cached_scores}
    routed: Any = (cached_scores, shadow)
    other_sets = model_map = None
    if second is not None and others is not None:
        own = [Model(f"{_SECOND}/{one}", lag, lambda: admission.in_flight, _SECOND_VERSION, second) for one in _ROLES]
        for model in own:
            stack.push_async_callback(model.batcher.close)
        budgets = RetryBudget(RetrySettings(), clock)
        its = Champion(own[0], own[1], budgets, False, budget, clock, lambda: 0.5)
        model_map = ModelMap()
        model_map.set((MapRule(strategy=SECOND_STRATEGY, model=_SECOND),))
        scores = RoutedScores({DEFAULT: cached_scores, _SECOND: CachedScores(CachedScoreSettings(), clock)}, model_map)
        stages = {
            "model": RoutedStage({DEFAULT: champion, _SECOND: its}, model_map, pb.STAGE_PRIMARY),
            "cached_score": scores,
        }
        routed = scores, RoutedShadow({DEFAULT: shadow, _SECOND: Shadow([own[2]], own[:2])}, model_map)
        other_sets = OtherSets(
            lambda: {DEFAULT: (MF1,), _SECOND: (second,)}, lambda _: others, 1.0, clock, model_map.of
        )
        other_sets.look()
        primaries.append(own[0])
    stages["rules"] = RulesBaseline(RulesSettings(), clock)
    dataplane = DataPlane(
        admission=admission,
        idempotency=IdempotencyWindow(clock, SharedKeys(keys, 60.0, clock)),
        markets=Markets(cache, 1.0, clock, other_sets),
        chain=Chain(stages, ("model", "cached_score", "rules"), clock),
        cached_scores=routed[0],
        guards=Guards(GuardSettings(), lambda: admin_pb2.TRADING_STATE_ACTIVE, clock, time.time, _limits(limited)),
        recording=Recording(journal, replies, PacketWriter("bench", "hash", durability.value, control), new_id.several),
        shadow=routed[1],
        control=control,
        observers=Observers(
            metrics,
            Objective(SloSettings(), budget.cap_seconds),
            reports,
            lag,
            EmbeddedCheck(primary, EmbeddedSettings(), lambda: 0.5, clock),
        ),
        budget_settings=budget,
        clock=clock,
        models=model_map,
    )
    explaining: Any = None  # nobody asks for an explanation
    servicer = DecisionServicer(
        dataplane,
        OrderReader(INSTRUMENTS),
        metrics,
        StreamSettings(),
        CallContexts(),
        reports,
        explaining,
        clock,
        OrderAccess(
            TokenBuckets(math.inf, 1.0, clock),
            Refusals(journal.append, TokenBuckets(0.0, 1.0, clock), "", time.time_ns),
        ),
    )
    return Server(servicer, primaries, metrics)


def _limits(limited: int) -> LimitGuards | None:
    """Both guards that hold a model to its limits, of a model that looks at so many features; None for 0."""
    if not limited:
        return None
    described = {
        "features": features.MF1.names[:limited],
        "patterns": [0],
        "low": [-1e9] * limited,
        "high": [1e9] * limited,
        "values": [[float(one) for one in range(-18, 18)]] * limited,
        "scores": [[one / 6 for one in range(-18, 18)]] * limited,
        "whitening": np.eye(limited).tolist(),
        "distance": 1e9,
        "most_same": [2**60] * limited,
        "most_turned": [1e18] * limited,
    }
    limits = limits_of({"band": {"low": 0.1, "high": 0.2}, "domain": described})
    return LimitGuards(lambda _: limits, lambda: True, lambda: True)


def _second_set(folder: Path) -> FeatureSet:
    """The set of the second model, which this process then knows."""
    (folder / "sets.py").write_text(_SETS)
    found = feature_sets.load(folder / "sets.py").by_id("bench")
    assert found is not None
    return found.feature_set


async def _flush(pairs: PairRecorder) -> None:
    """Hands the challenger's scores to the journal as a server does: ten times a second."""
    while True:
        await asyncio.sleep(_FLUSH_SECONDS)
        pairs.flush()


async def _market(cache: FeatureCache, *others: FeatureCache) -> None:
    """Brings a new vector of every instrument, again and again."""
    values = np.zeros(len(features.MF1), dtype=np.float32)
    for sequence in itertools.count(1):
        now = time.time_ns()
        for name in INSTRUMENTS:
            snapshot = FeatureSnapshot(
                name, sequence, now, now, now, now, 0, 99.5, 100.5, BookState.VALID, values + np.float32(sequence % 7)
            )
            snapshot.values[features.MF1.index["book_age_ms"]] = 0.0
            cache.accept(encode(snapshot))
            for other in others:
                own = np.zeros(len(other.feature_set), dtype=np.float32)
                other.accept(encode(replace(snapshot, values=own, feature_set=other.feature_set)))
        await asyncio.sleep(_MARKET_SECONDS)
