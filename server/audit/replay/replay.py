"""Recomputes decisions from their packets, with the code that decided them.

These values are recomputed: whether the features could be used, the feature vector if the caller sent it, the score and
those of an ensemble's parts (by the model version that the packet names, in a batch of the same shape), the cached
score and its eligibility, the rules and the guards. Action and reasons follow from them. A replay is equal when all of
these are equal, scores to the last bit.

Some facts depend on what else happened at that time, and are taken from the packet instead: which replica answered,
failed or was passed over; that there was no cached score to use; how old a cached score was to the microsecond; that a
strategy was over its rate; that a feature was stuck or turned; that a model's limits were not known. `Replay.facts`
names those that a decision rests on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from fallback import embedded
from fallback.budget import Budget
from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.chain import ChainSettings
from fallback.guards import Guards, GuardSettings
from fallback.model_limits import NO_LIMITS, UNKNOWN, LimitGuards, ModelLimits
from fallback.order import Answer, Case, Order, held_against
from fallback.rules import RulesBaseline, RulesSettings
from fallback.staleness import DEGRADATIONS, FeatureSettings, judge, problem_of
from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet, SetRow
from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.vectors import vectors_in
from server.decision.convert import OrderReader
from server.decision.record import hash_of
from server.errors import InvalidOrderError, NotReplayableError
from server.inference import model_sets
from server.inference.endpoints import role_of
from server.inference.model_names import DEFAULT
from server.models.archive import Archive, Rescored, RunningModels
from server.models.embedding import EmbeddedModels
from server.models.registry import record_of

_BOOK_STATES: Final = {
    packet_pb2.BOOK_STATE_UNKNOWN: BookState.UNKNOWN,
    packet_pb2.BOOK_STATE_VALID: BookState.VALID,
    packet_pb2.BOOK_STATE_LOCKED: BookState.LOCKED,
}
_PROBLEMS: Final = frozenset(DEGRADATIONS.values())
_REPLICAS: Final = {
    pb.SOURCE_PRIMARY: "primary",
    pb.SOURCE_SECONDARY: "secondary",
    pb.SOURCE_CANARY: "challenger",
    pb.SOURCE_EMBEDDED: embedded.NAME,
}
_STAGES: Final = {
    pb.SOURCE_PRIMARY: "model",
    pb.SOURCE_SECONDARY: "model",
    pb.SOURCE_CANARY: "model",
    pb.SOURCE_EMBEDDED: "embedded",
    pb.SOURCE_CACHED_SCORE: "cached_score",
    pb.SOURCE_RULES: "rules",
}
_MOST_BATCH_ROWS: Final = 65_536
_MOST_LIMITS: Final = 64
"""Model versions whose limits are kept."""


class ReplaySettingsInForce(BaseModel):
    """Where the server that decided looked for models: without a place it knew of no limits of theirs."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_store: str | None = None


class DecidingSettings(BaseModel):
    """Those sections of a server's settings that decide what is answered; the others decide how fast."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    features: FeatureSettings
    chain: ChainSettings
    cached_score: CachedScoreSettings
    rules: RulesSettings
    guards: GuardSettings
    replay: ReplaySettingsInForce = ReplaySettingsInForce()


@dataclass(frozen=True, slots=True)
class WhatIf:
    """What to decide with instead of what the packet names; None: as it was."""

    model: Archive | None = None
    threshold: float | None = None


AS_RECORDED: Final = WhatIf()
"""With what the packet names."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that came out otherwise."""

    field: str
    recorded: str
    replayed: str


@dataclass(frozen=True, slots=True)
class Replay:
    """A recomputed decision."""

    packet: packet_pb2.DecisionPacket
    action: pb.Action.ValueType
    reasons: tuple[pb.ReasonCode.ValueType, ...]
    score: float
    """NaN when nobody scored."""
    threshold: float
    """NaN when nobody scored."""
    first_difference: Difference | None
    """None when all that was recomputed equals what was recorded."""
    facts: tuple[str, ...]
    """What was taken from the packet, for people."""


class Replayer:
    """Replays decisions, one after another; a context manager that keeps models running between them.

    Args:
        settings_of: The settings with this hash, or None.
        packet_of: The packet of this decision, or None.
        archive_of: The archive of this model version; raises `ModelUnknownError`.
        what_if: What to decide with instead.
    """

    def __init__(
        self,
        settings_of: Callable[[str], packet_pb2.SettingsInForce | None],
        packet_of: Callable[[str], packet_pb2.DecisionPacket | None],
        archive_of: Callable[[str], Archive],
        what_if: WhatIf = AS_RECORDED,
    ) -> None:
        self._settings_of = settings_of
        self._packet_of = packet_of
        self._what_if = what_if
        instead = what_if.model
        given = archive_of if instead is None else lambda _: instead
        self._models = RunningModels(given)
        self._embedded = EmbeddedModels(given)
        self._settings: dict[str, DecidingSettings] = {}

        @lru_cache(_MOST_LIMITS)
        def limits(version: str) -> ModelLimits:
            return record_of(given(version), created_at=0.0).limits

        @lru_cache(_MOST_LIMITS)
        def taken_by(version: str) -> str:
            return given(version).feature_set

        self._limits = limits
        self._taken_by = taken_by

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the models."""
        self._models.__exit__()

    async def replay(self, packet: packet_pb2.DecisionPacket) -> Replay:
        """Recomputes a decision and compares it with the packet.

        Raises:
            NotReplayableError: Something it needs is missing: settings, model, or the decision of a cached score.
        """
        recorded = packet.decision
        settings = self._deciding_settings(packet.config_hash)
        case = _case(packet, settings.features)
        answer = await self._answer(case, packet, settings)
        if isinstance(answer, Difference):
            return Replay(packet, pb.ACTION_UNSPECIFIED, (), math.nan, math.nan, answer, _facts(packet))
        action, reasons = self._guarded(case, answer, packet, settings)
        comparison = (
            ("features_problem", _problems(recorded.degradations), _problems(case.degradations)),
            ("model_input", packet.model_input.hex(), _bytes(case).hex()),
            ("source", _name(pb.Source, recorded.source), _name(pb.Source, answer.source)),
            ("model_name", recorded.model_name, answer.model_name),
            ("model_version", recorded.model_version, answer.model_version),
            ("model_expires_at", str(packet.model_expires_at), str(answer.model_expires_at)),
            ("score", _number(recorded.score, recorded.HasField("score")), _number(answer.score)),
            (
                "parts",
                _parts((one.model_version, one.weight, one.score) for one in packet.parts),
                _parts((*part, score) for part, score in zip(answer.parts, answer.part_scores, strict=True)),
            ),
            ("threshold", _number(recorded.threshold, recorded.HasField("threshold")), _number(answer.threshold)),
            ("action", _name(pb.Action, recorded.action), _name(pb.Action, action)),
            ("reasons", _names(recorded.reasons), _names(reasons)),
        )
        difference = next((Difference(*one) for one in comparison if one[1] != one[2]), None)
        return Replay(packet, action, tuple(reasons), answer.score, answer.threshold, difference, _facts(packet))

    def _deciding_settings(self, config_hash: str) -> DecidingSettings:
        settings = self._settings.get(config_hash)
        if settings is None:
            found = self._settings_of(config_hash)
            if found is None:
                raise NotReplayableError(f"the audit does not hold the settings {config_hash}")
            if hash_of(found.settings_json) != config_hash:
                raise NotReplayableError(f"the settings {config_hash} are not what their hash says")
            try:
                settings = DecidingSettings.model_validate(json.loads(found.settings_json))
            except ValidationError as error:
                raise NotReplayableError(
                    f"the settings {config_hash} are of version {found.software_version}: {error}"
                ) from error
            self._settings[config_hash] = settings
        return settings

    async def _answer(
        self, case: Case, packet: packet_pb2.DecisionPacket, settings: DecidingSettings
    ) -> Answer | Difference:
        """What the recorded source answers to the case, or why it cannot have answered."""
        source = packet.decision.source
        stage = _STAGES.get(source)
        stages = tuple(packet.chain_stages) or settings.chain.stages
        if stage is not None and stage not in stages:
            return Difference("source", _name(pb.Source, source), f"no stage {stage} in the chain")
        if source in _REPLICAS:
            return self._model_answer(packet)
        if source == pb.SOURCE_CACHED_SCORE:
            return await self._cached_answer(case, packet, settings)
        by_rules = None
        if "rules" in stages and (source == pb.SOURCE_RULES or not _broke_off(packet)):
            by_rules = await RulesBaseline(settings.rules, lambda: case.budget.arrived).answer(case)
        return by_rules or Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)

    def _model_answer(self, packet: packet_pb2.DecisionPacket) -> Answer | Difference:
        """The model's answer to a packet that a replica answered."""
        source, version = packet.decision.source, packet.decision.model_version
        attempt = next((one for one in packet.attempts if one.outcome == "success"), None)
        expected = f"{_REPLICAS[source]} {version}"
        if attempt is None or f"{role_of(attempt.replica)} {attempt.model_version}" != expected:
            answered = f"{attempt.replica} {attempt.model_version}" if attempt else "no attempt succeeded"
            return Difference("attempts", expected, answered)
        model = attempt.replica.rpartition("/")[0]
        if source != pb.SOURCE_EMBEDDED and model != packet.chosen_model:
            return Difference("chosen_model", packet.chosen_model or DEFAULT, model or DEFAULT)
        if not attempt.batch_index < attempt.batch_rows <= _MOST_BATCH_ROWS:
            raise NotReplayableError("the packet does not say in which batch the model scored")
        version = version if self._what_if.model is None else self._what_if.model.version
        row = self._row(packet, version)
        if isinstance(row, Difference):
            return row
        if source == pb.SOURCE_EMBEDDED:
            scored = self._embedded.score(version, row, attempt.batch_rows, attempt.batch_index)
        else:
            scored = self._models.ask(version, lambda model: model.score(row, attempt.batch_rows, attempt.batch_index))
        if self._what_if.model is None:
            # A version may be served under another name than it was made for: a canary is.
            scored = scored._replace(model=replace(scored.model, name=packet.decision.model_name))
        return self._held(scored, source)

    def _row(self, packet: packet_pb2.DecisionPacket, version: str) -> bytes | Difference:
        """The vector in a packet that a model version takes.

        Raises:
            NotReplayableError: There is none, or this process does not know its set as it was.
        """
        wanted, held = self._taken_by(version), vectors_in(packet)
        if self._what_if.model is None and (scored := packet.scored_feature_set or MF1.version) != wanted:
            return Difference("scored_feature_set", scored, wanted)
        if wanted not in held:
            raise NotReplayableError(
                f"model {version} takes features of the set {wanted}; the decision holds"
                f" {' and '.join(sorted(held)) or 'none'}"
            )
        return model_sets.row_of(_known(wanted, held[wanted]), held[wanted])

    def _guarded(
        self, case: Case, answer: Answer, packet: packet_pb2.DecisionPacket, settings: DecidingSettings
    ) -> tuple[pb.Action.ValueType, list[pb.ReasonCode.ValueType]]:
        """Action and reasons after all guards; whether the strategy was over its rate is a fact of the packet."""
        state = admin_pb2.TradingState.Value(f"TRADING_STATE_{packet.trading_state}")

        def limits(version: str) -> ModelLimits:
            if settings.replay.model_store is None:
                return NO_LIMITS
            if pb.DEGRADATION_MODEL_LIMITS_UNKNOWN in packet.decision.degradations:
                return UNKNOWN
            return self._limits(version)

        guards = Guards(
            settings.guards.model_copy(update={"max_decisions_per_second": None}),
            lambda: state,
            lambda: case.budget.arrived,
            # Of a snapshot that the server had, the instant of the market: models expire by that.
            lambda: (packet.features.event_time_ns or packet.decision.decided_at.ToNanoseconds()) / 1e9,
            LimitGuards(limits, lambda: "uncertain" in packet.flags_on, lambda: "out_of_domain" in packet.flags_on),
        )
        if pb.DEGRADATION_FEATURE_IMPLAUSIBLE in packet.decision.degradations:
            case.degradations.append(pb.DEGRADATION_FEATURE_IMPLAUSIBLE)
        action, reasons = guards.apply(case, answer)
        if action == pb.ACTION_TRADE and pb.REASON_CODE_STRATEGY_RATE in packet.decision.reasons:
            return pb.ACTION_NO_TRADE, [*reasons, pb.REASON_CODE_STRATEGY_RATE]
        return action, reasons

    def _held(self, scored: Rescored, source: pb.Source.ValueType) -> Answer:
        model = scored.model
        threshold = model.threshold if self._what_if.threshold is None else self._what_if.threshold
        action, reason = held_against(scored.score, threshold)
        return Answer(
            action,
            source,
            reason,
            scored.score,
            threshold,
            model.name,
            model.version,
            model.expires_at,
            parts=model.parts,
            part_scores=scored.part_scores,
        )

    async def _cached_answer(
        self, case: Case, packet: packet_pb2.DecisionPacket, settings: DecidingSettings
    ) -> Answer | Difference:
        """The score of the decision that the packet names, if it may answer this one."""
        origin_id = packet.cached_from_decision_id
        origin = self._packet_of(origin_id)
        if origin is None:
            raise NotReplayableError(f"the audit does not hold decision {origin_id}, whose score was used again")
        if origin.decision.source not in _REPLICAS:
            return Difference("cached_from_decision_id", "a score of a model", _name(pb.Source, origin.decision.source))
        answer = self._model_answer(origin)
        if isinstance(answer, Difference):
            return answer
        scores = CachedScores(settings.cached_score, lambda: case.budget.arrived)
        scores.remember(_case(origin, self._deciding_settings(origin.config_hash).features), answer, origin_id)
        return await scores.answer(case) or Difference(
            "cached_score", f"of decision {origin_id}", "too old, or the market had moved too far"
        )


def _case(packet: packet_pb2.DecisionPacket, settings: FeatureSettings) -> Case:
    """The case as the chain saw it.

    Raises:
        NotReplayableError: The order is none that this version accepts.
    """
    arrived = packet.arrived_monotonic_ns / 1e9
    order = _order(packet.order)
    case = Case(order, Budget(arrived, arrived + packet.decision.budget.allowed_us / 1e6, 0.0))
    known = packet.features
    state, oldest = _BOOK_STATES.get(known.book_state), settings.max_age_seconds
    judge(case, problem_of(state, known.age_seconds, known.book_age_ms / 1e3, oldest), oldest)
    case.mid = packet.mid_price or math.nan
    case.others = _others(packet)
    if case.features_problem is None:
        own = order.caller_features
        if own is None:
            case.features = np.frombuffer(packet.model_input, dtype="<f4")
        else:
            case.features = MF1.for_sell(own) if order.side == pb.SIDE_SELL else own
    return case


def _others(packet: packet_pb2.DecisionPacket) -> dict[FeatureSet, SetRow] | None:
    """What a model of another set scored.

    Raises:
        NotReplayableError: This process does not know the set as it was.
    """
    if not packet.scored_feature_set:
        return None
    found = _known(packet.scored_feature_set, packet.scored_input)
    return {found: SetRow.of(found, packet.scored_input)}


def _known(version: str, vector: bytes) -> FeatureSet:
    """The set that a vector is of.

    Raises:
        NotReplayableError: This process does not know it as it was.
    """
    found = feature_sets.by_version(version)
    if found is None or len(vector) != found.row_bytes:
        raise NotReplayableError(
            f"the model took features of the set {version}; known here are {feature_sets.names()}:"
            f" name the file of yours in {feature_sets.FILE_VARIABLE}"
        )
    return found


def _order(message: pb.Order) -> Order:
    try:
        return OrderReader((message.instrument,)).read(message)
    except InvalidOrderError as error:
        hint = f"; {feature_sets.FILE_VARIABLE} names a file with others" if message.HasField("features") else ""
        raise NotReplayableError(f"the order is none that this version accepts: {error}{hint}") from error


def _facts(packet: packet_pb2.DecisionPacket) -> tuple[str, ...]:
    """What the decision rests on that cannot be recomputed."""
    facts = [
        f"{attempt.replica}: {attempt.outcome} after {attempt.used_us / 1e3:.3f} ms"
        for attempt in packet.attempts
        if attempt.outcome != "success"
    ]
    facts += [
        f"{enum_name(pb.Stage, use.stage)} passed over: " + enum_name(pb.Degradation, use.skipped)
        for use in packet.decision.budget.stages
        if use.skipped
    ]
    if packet.chosen_model:
        facts.append(f"the model map of version {packet.decision.control_version} chose {packet.chosen_model}")
    if packet.decision.source not in _REPLICAS and pb.DEGRADATION_NO_CACHED_SCORE in packet.decision.degradations:
        facts.append("there was no cached score to use")
    if _broke_off(packet):
        facts.append("a stage broke off with a fault of the server, which its log explains")
    if packet.cached_from_decision_id:
        facts.append(f"the cached score of {packet.cached_from_decision_id} was young enough when it was used")
    if pb.DEGRADATION_FEATURE_IMPLAUSIBLE in packet.decision.degradations:
        facts.append("a feature was stuck or had its sign turned, by the vectors that came before")
    if pb.DEGRADATION_MODEL_LIMITS_UNKNOWN in packet.decision.degradations:
        facts.append("the server did not know what the model says of its own limits")
    if pb.REASON_CODE_STRATEGY_RATE in packet.decision.reasons:
        facts.append(f"strategy {packet.order.strategy!r} was over its rate")
    return tuple(facts)


def _broke_off(packet: packet_pb2.DecisionPacket) -> bool:
    """True when a stage broke off with a fault of ours, which no replay repeats."""
    return pb.DEGRADATION_STAGE_BROKEN in packet.decision.degradations


def _bytes(case: Case) -> bytes:
    return b"" if case.features is None else case.row()


def _number(value: float, present: bool = True) -> str:
    """A number so that equal text means equal bits."""
    return repr(value) if present and not math.isnan(value) else "none"


def _parts(parts: Iterable[tuple[str, float, float]]) -> str:
    """What the parts of an ensemble say, so that equal text means equal bits."""
    return ", ".join(f"{version} {weight!r}: {score!r}" for version, weight, score in parts) or "none"


def _problems(degradations: Iterable[pb.Degradation.ValueType]) -> str:
    """What was wrong with the features, the server's or the caller's own."""
    return ", ".join(_name(pb.Degradation, one) for one in degradations if one in _PROBLEMS) or "none"


def _name(enum: type[pb.Action] | type[pb.Source] | type[pb.ReasonCode] | type[pb.Degradation], value: int) -> str:
    return str(enum.DESCRIPTOR.values_by_number[value].name)


def _names(reasons: object) -> str:
    return ", ".join(_name(pb.ReasonCode, one) for one in reasons)  # type: ignore[attr-defined]
