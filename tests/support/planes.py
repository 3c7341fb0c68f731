"""A data plane with scripted model servers, whose parts a test can look into."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import numpy as np

from fallback.budget import BudgetSettings
from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.chain import Chain, StageName
from fallback.embedded import Embedded, Scorer
from fallback.guards import Guards, GuardSettings
from fallback.model_limits import LimitGuards, ModelLimits
from fallback.order import Order
from fallback.rules import RulesBaseline, RulesSettings
from feature_cache import features
from feature_cache.engine.engine import FeatureEngine
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.market.v1 import market_pb2
from server.canary.burn import Objective, RoutedObjective, SloSettings
from server.canary.routing import CanaryRouting
from server.control.state import ControlSettings, ControlState
from server.decision.admission import Admission, AdmissionSettings
from server.decision.following import Observers
from server.decision.idempotency import IdempotencyWindow
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
from server.inference.champion import Champion
from server.inference.embedded_check import EmbeddedCheck, EmbeddedSettings
from server.inference.model_map import MapRule, ModelMap
from server.inference.model_names import DEFAULT
from server.inference.retry_budget import RetryBudget, RetrySettings
from server.inference.routed import RoutedCheck, RoutedScores, RoutedShadow, RoutedStage
from server.inference.shadow import Shadow
from server.journal.entries import entry_of, singly
from server.journal.journal import Durability, Journal, JournalSettings
from server.journal.journal_file import JournalReader
from server.timing.loop_lag import LoopLag
from support import control_files
from support.scripted_replica import Script, ScriptedReplica, hangs

INSTRUMENT = "BTCUSDT.BINANCE"
INSTRUMENTS = (INSTRUMENT, "ETHUSDT.BINANCE", "XRPUSDT.BINANCE")
IDS = itertools.count()
"""Of all planes, as ids are unique."""
NO_LIMITS = GuardSettings(price_collar_bps=None, max_notional=None)
PATIENT = BudgetSettings(cap_seconds=10, audit_reserve_seconds=1, reply_reserve_seconds=0.1)
"""No test here depends on being quick."""


@dataclasses.dataclass
class Held:
    """The model in this process; none, unless a test puts it there."""

    scorer: Scorer | None = None
    lack: pb.Degradation.ValueType = pb.DEGRADATION_EMBEDDED_NO_MODEL


@dataclasses.dataclass
class Second:
    """A second model, which decides the orders of one strategy."""

    feature_set: FeatureSet
    primary: Script
    secondary: Script
    strategy: str = "vwap"
    name: str = "second"
    version: str = "bb" * 8


class Plane:
    """A data plane whose parts a test can look into."""

    def __init__(
        self,
        journal: Journal,
        memory: int,
        primary: Script,
        secondary: Script,
        budget: BudgetSettings,
        max_in_flight: int,
        second: Second | None = None,
        first_stage: StageName = "model",
        max_age_seconds: float = 1.0,
        challenger: Script = hangs,
    ) -> None:
        clock = asyncio.get_running_loop().time
        ids = (f"decision-{number}" for number in IDS)
        control = ControlState(
            ControlSettings(shadow=False),
            control_files.that_trades(journal.settings.path.with_name("control.json")),
            {},
            journal,
            "server-1",
            lambda: next(ids),
            time.time_ns,
            clock,
        )
        patient = BatcherSettings(min_patience_seconds=10, max_patience_seconds=10)
        self.primary = ScriptedReplica("primary", primary, patient)
        self.secondary = ScriptedReplica("secondary", secondary, patient)
        self.challenger = ScriptedReplica("challenger", challenger, patient)
        """Serves canaries; none is on trial until a test says so to `routing`."""
        self.replicas = [self.primary, self.secondary, self.challenger]

        def champion_of(primary: ScriptedReplica, secondary: ScriptedReplica) -> Champion:
            retries = RetryBudget(RetrySettings(), clock)
            return Champion(primary, secondary, retries, False, budget, clock, lambda: 0.5)

        self.cached_scores = CachedScores(CachedScoreSettings(), clock)
        cached_scores: Any = self.cached_scores
        champion = champion_of(self.primary, self.secondary)
        admission = AdmissionSettings(max_in_flight=max_in_flight, min_in_flight=1, reserved_share=0.5)
        self.champion = champion
        self.control = control
        self.admission = Admission(admission, clock)
        self.metrics = DecisionMetrics()
        self.stood_still_seconds = 0.0
        """By how much the time has moved on, as far as the keys are concerned, while this process stood still."""
        keys = SharedKeys(memory, 60.0, lambda: clock() + self.stood_still_seconds)
        self.idempotency = IdempotencyWindow(clock, keys)
        self.state = admin_pb2.TRADING_STATE_ACTIVE
        self.limits = ModelLimits()
        """Of every model that has none of its own."""
        self.limits_of: dict[str, ModelLimits] = {}
        """By version."""
        limits = LimitGuards(lambda version: self.limits_of.get(version, self.limits), lambda: True, lambda: True)
        self.guards = Guards(NO_LIMITS, lambda: self.state, clock, lambda: 1_700_000_000.0, limits)
        self.objective = Objective(SloSettings(), budget.cap_seconds)
        self.routing = CanaryRouting(self.challenger, champion, lambda: 0.001, budget, self.objective, clock)
        self.observed = Counter[tuple[str, bool]]()
        """Orders that spoke for or against a model while a canary was on trial, by side and whether it answered."""
        self.shadow = Shadow([self.secondary], [self.primary])
        self.journal = journal
        self.clock = clock
        self.loop_lag = LoopLag(clock)
        self.feature_cache = FeatureCache("redis://unused", FeatureCacheSettings(), INSTRUMENTS)
        sampled = EmbeddedSettings(check_share=1.0)
        self.check = EmbeddedCheck(self.secondary, sampled, lambda: 0.5, clock)
        self.embedded = Held()
        stages: Any = {
            "model": self.routing,
            "embedded": Embedded(self.embedded, clock, trial=self.routing),
            "cached_score": cached_scores,
        }
        shadow: Any = self.shadow
        objective: Any = self.objective
        check: Any = self.check
        self.model_map: ModelMap | None = None
        others = None
        if second is not None:
            name, of = second.name, second.feature_set
            its = [
                ScriptedReplica(f"{name}/primary", second.primary, patient, feature_set=of),
                ScriptedReplica(f"{name}/secondary", second.secondary, patient, feature_set=of),
            ]
            self.replicas += its
            self.second_champion = champion_of(*its)
            self.second_embedded = Held()
            self.second_shadow = Shadow([its[1]])
            self.second_objective = Objective(SloSettings(), budget.cap_seconds)
            self.second_check = EmbeddedCheck(its[1], sampled, lambda: 0.5, clock)
            self.second_features = FeatureCache("redis://unused", FeatureCacheSettings(), INSTRUMENTS, of)
            model_map = self.model_map = ModelMap()
            model_map.set((MapRule(strategy=second.strategy, model=name), MapRule(strategy="gone", model="elsewhere")))
            second_stage = Embedded(self.second_embedded, clock)
            cached_scores = RoutedScores(
                {DEFAULT: cached_scores, name: CachedScores(CachedScoreSettings(), clock)}, model_map
            )
            of_second = CanaryRouting(
                self.challenger, self.second_champion, lambda: 0.001, budget, self.second_objective, clock
            )
            stages = {
                "model": RoutedStage({DEFAULT: self.routing, name: of_second}, model_map, pb.STAGE_PRIMARY),
                "embedded": RoutedStage(
                    {DEFAULT: stages["embedded"], name: second_stage}, model_map, pb.STAGE_EMBEDDED
                ),
                "cached_score": cached_scores,
            }
            shadow = RoutedShadow({DEFAULT: self.shadow, name: self.second_shadow}, model_map)
            objective = RoutedObjective({DEFAULT: self.objective, name: self.second_objective}, model_map.of)
            check = RoutedCheck({DEFAULT: self.check, name: self.second_check}, model_map)
            others = OtherSets(
                lambda: {DEFAULT: (MF1,), name: (of,)},
                lambda _: self.second_features,
                max_age_seconds,
                clock,
                model_map.of,
            )
            others.look()
        self.chain = Chain(
            stages | {"rules": RulesBaseline(RulesSettings(), clock)},
            (first_stage, *(one for one in ("model", "cached_score", "rules") if one != first_stage)),
            clock,
        )
        self.replies = Replies(journal, clock)
        self.packets = PacketWriter("server-1", "hash", "os", control)
        self.dataplane = DataPlane(
            admission=self.admission,
            idempotency=self.idempotency,
            markets=Markets(self.feature_cache, max_age_seconds, clock, others),
            chain=self.chain,
            cached_scores=cached_scores,
            guards=self.guards,
            shadow=shadow,
            recording=Recording(journal, self.replies, self.packets, lambda count: list(itertools.islice(ids, count))),
            control=control,
            observers=Observers(self.metrics, objective, DecisionReports(()), self.loop_lag, check),
            budget_settings=budget,
            clock=clock,
            models=self.model_map,
        )

    async def decide(
        self,
        timeout_seconds: float | None = None,
        reduce_only: bool = False,
        own_features: bool = True,
        own_book_age_ms: float = 0.0,
        key: str = "",
        quantity: float = 1.0,
        caller: str = "",
        side: pb.Side.ValueType = pb.SIDE_BUY,
        limit_price: float = 100.0,
    ) -> pb.Decision:
        """Decides an order, which brings its own features unless told otherwise."""
        own = np.zeros(features.N_FEATURES, dtype=np.float32) if own_features else None
        if own is not None:
            own[features.INDEX["book_age_ms"]] = own_book_age_ms
        message = pb.Order(instrument=INSTRUMENT, side=side, quantity=quantity, strategy="alpha", idempotency_key=key)
        order = Order(message.SerializeToString(), INSTRUMENT, side, quantity, limit_price, "alpha", reduce_only, own)
        order.idempotency_key, order.caller = key, caller
        arrived = self.clock()
        deadline = None if timeout_seconds is None else arrived + timeout_seconds
        decided = await self.dataplane.decide(order, arrived, deadline)
        return pb.Decision.FromString(decided.wire)


@asynccontextmanager
async def plane(
    path: Path,
    primary: Script,
    secondary: Script,
    budget: BudgetSettings = PATIENT,
    journal_mebibytes: int = 100,
    keys: int | None = None,
    max_in_flight: int = 2,
    second: Second | None = None,
    first_stage: StageName = "model",
    max_age_seconds: float = 1.0,
    challenger: Script = hangs,
) -> AsyncIterator[Plane]:
    """One with a journal in `path`; `keys` is the memory that it shares with others."""
    settings = JournalSettings(path=path / "journal.db", durability=Durability.OS, max_mebibytes=journal_mebibytes)
    memory = keys or make_memory(1)
    try:
        async with Journal(settings) as journal:
            made = Plane(
                journal,
                memory,
                primary,
                secondary,
                budget,
                max_in_flight,
                second,
                first_stage,
                max_age_seconds,
                challenger,
            )
            try:
                yield made
            finally:
                for replica in made.replicas:
                    await replica.batcher.close()
    finally:
        if keys is None:
            os.close(memory)


def packets_in(path: Path) -> list[packet_pb2.DecisionPacket]:
    return [entry.decision for entry in entries_in(path) if entry.HasField("decision")]


def entries_in(path: Path) -> list[packet_pb2.JournalEntry]:
    with closing(JournalReader(path / "journal.db")) as journal:
        journal.verify()
        rows = journal.rows_after(journal.anchor().position, -1)
        return [entry for row in rows for entry in singly(entry_of(row.entry))]


def market(late_seconds: float) -> FeatureSnapshot:
    """A sound market as a worker sees it now whose feed is steadily this late."""
    engine = FeatureEngine(INSTRUMENT)
    now = time.time_ns()
    for number in range(2):
        event = market_pb2.MarketEvent(
            instrument=INSTRUMENT,
            price_decimals=2,
            size_decimals=3,
            event_time_ns=now - round(late_seconds * 1e9) + number,
            receive_time_ns=now + number,
            publish_time_ns=now + number,
            snapshot=market_pb2.BookSnapshot(
                last_update_id=number + 1, bid_ticks=[9999], bid_lots=[5], ask_ticks=[10001], ask_lots=[5]
            ),
        )
        engine.on_event(event)
    return engine.snapshot()


def notes_in(path: Path) -> list[packet_pb2.ReplyUnconfirmed]:
    """What the journal says about replies, in order."""
    return [entry.reply_unconfirmed for entry in entries_in(path) if entry.HasField("reply_unconfirmed")]
