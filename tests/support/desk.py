"""Makes decisions and their packets as the decision path does, without a server around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fallback.budget import Budget
from fallback.cached_score import CachedScores
from fallback.chain import Chain, Stage, StageName
from fallback.embedded import Embedded
from fallback.guards import Guards
from fallback.model_limits import NO_LIMITS, LimitGuards, ModelLimits
from fallback.order import MODEL_SOURCES, Answer, Attempt, Case, held_against
from fallback.rules import RulesBaseline
from fallback.staleness import judge, problem_of
from feature_cache import features
from feature_cache.feature_set import FeatureSet, SetRow
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.control.state import ControlSettings, ControlState
from server.decision.convert import OrderReader
from server.decision.packets import PacketWriter
from server.decision.record import Decided
from server.inference import model_sets
from server.inference.embedded import EmbeddedScorer
from server.journal.entries import entry_of, packet_of
from server.journal.journal import Journal, JournalSettings
from server.models.archive import RunningModel
from server.settings import Settings
from support import control_files

SETTINGS = Settings()
SETTINGS_JSON = SETTINGS.model_dump_json()
_ANY = np.random.default_rng(5).normal(size=(64, features.N_FEATURES)).astype(np.float32)
ROWS = np.clip(_ANY, features.MF1.lowest, features.MF1.highest)


class Held:
    """The embedded model that a test gives, or none."""

    lack = pb.DEGRADATION_UNSPECIFIED

    def __init__(self) -> None:
        self.scorer: EmbeddedScorer | None = None


class Desk:
    """Decides with the code of the decision path, and keeps the packets."""

    def __init__(self, directory: Path, running: RunningModel | None = None, settings: Settings = SETTINGS) -> None:
        self.limits: ModelLimits = NO_LIMITS
        """Of every model."""
        journal = Journal(JournalSettings(path=directory / "journal.db"))
        file = control_files.that_trades(directory / "control.json")
        self.control = ControlState(ControlSettings(), file, {}, journal, "server-1", str, lambda: 0, lambda: 0.0)
        self.running = running
        self.packets: dict[str, packet_pb2.DecisionPacket] = {}
        self.now = 1_000.0
        self.market_ns = 7
        """The instant of the market that is decided on."""
        self.model_answers = True
        self.others: dict[FeatureSet, SetRow] | None = None
        """What models of other sets get."""
        self._writer = PacketWriter("server-1", settings.config_hash(), "fsync", self.control)
        models = LimitGuards(lambda _: self.limits, lambda: self.control.uncertain, lambda: self.control.out_of_domain)
        self._guards = Guards(settings.guards, lambda: self.control.trading_state, self._clock, lambda: 1.7e9, models)
        self._cached = CachedScores(settings.cached_score, self._clock)
        rules = RulesBaseline(settings.rules, self._clock)
        self.embedded = Held()
        stages: dict[StageName, Stage] = {
            "model": self,
            "embedded": Embedded(self.embedded, self._clock),
            "cached_score": self._cached,
            "rules": rules,
        }
        self._chain = Chain(stages, settings.chain.stages, self._clock)
        self._max_age_seconds = settings.features.max_age_seconds
        self._rng = np.random.default_rng(7)

    def _clock(self) -> float:
        return self.now

    async def answer(self, case: Case) -> Answer | None:
        """The first stage: the archived model instead of a replica that serves it."""
        if case.features is None or self.running is None or not self.model_answers:
            case.degradations.append(pb.DEGRADATION_PRIMARY_TIMEOUT)
            case.attempts.append(Attempt("primary", "timeout", 0.01, ""))
            return None
        rows = int(self._rng.integers(1, 33))
        index = int(self._rng.integers(rows))
        row = case.row_of(model_sets.of(self.running.archive.version))
        assert row is not None
        scored = self.running.score(row, rows, index)
        identity = scored.model
        case.attempts.append(Attempt("primary", "success", 0.001, identity.version, rows, index))
        action, reason = held_against(scored.score, identity.threshold)
        return Answer(
            action,
            pb.SOURCE_PRIMARY,
            reason,
            scored.score,
            identity.threshold,
            identity.name,
            identity.version,
            identity.expires_at,
            parts=identity.parts,
            part_scores=scored.part_scores,
        )

    async def decide(
        self, values: np.ndarray[Any, np.dtype[np.float32]], *, age: float = 0.1, **order: Any
    ) -> packet_pb2.DecisionPacket:
        self.now += 0.01
        asked = pb.Order(instrument="BTCUSDT.SIM", side=pb.SIDE_BUY, quantity=1.0, strategy="twap")
        asked.MergeFrom(pb.Order(**order))
        case = Case(OrderReader(("BTCUSDT.SIM",)).read(asked), Budget(self.now, self.now + 0.05, 0.005))
        at = (self.market_ns,) * 4
        case.snapshot = FeatureSnapshot("BTCUSDT.SIM", 42, *at, 0, 99.0, 101.0, BookState.VALID, values)
        case.snapshot_age_seconds = age
        book_age_seconds = float(values[features.INDEX["book_age_ms"]]) / 1e3
        problem = problem_of(BookState.VALID, age, book_age_seconds, self._max_age_seconds)
        judge(case, problem, self._max_age_seconds)
        if problem is None:
            case.mid = 100.0
        given = case.order.caller_features
        if case.features_problem is None:
            used = values if given is None else given
            case.features = features.MF1.for_sell(used) if case.order.side == pb.SIDE_SELL else used
        case.others = self.others
        answer = await self._chain.decide(case)
        action, reasons = self._guards.apply(case, answer)
        decision_id = f"decision-{len(self.packets):05}"
        wall_ns = 1_700_000_000_000_000_000
        decided = Decided(case, answer, action, reasons, decision_id, self.now, wall_ns)
        if answer.source in MODEL_SOURCES:
            self._cached.remember(case, answer, decision_id)
        batch = self._writer.batch()
        batch.add(case, answer, decided, self.now, wall_ns)
        packet = packet_of(entry_of(batch.entry()), 0)
        self.packets[decision_id] = packet
        return packet


def values(row: int, **changes: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    changed: np.ndarray[Any, np.dtype[np.float32]] = ROWS[row].copy()
    changed[features.INDEX["book_age_ms"]] = 5.0
    for name, value in changes.items():
        changed[features.INDEX[name]] = value
    return changed


CALM = {"spread_bps": 0.1, "rv_5s_bps": 1.0, "weighted_mid_bps": 0.0, "imbalance_l5": 0.0, "ofi_1s": 0.0}
