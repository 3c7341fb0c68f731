"""Connects the parts of each model: its replicas, champion, canary, embedded model and cached scores."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fallback.cached_score import CachedScores
from fallback.embedded import Embedded
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import RoutedObjective
from server.canary.subjects import canary_subjects
from server.composition.canary import CanaryParts, assemble
from server.composition.replicas import component_of, open_replicas
from server.inference.champion import Champion
from server.inference.embedded_check import EmbeddedCheck
from server.inference.model_map import ModelMap
from server.inference.model_names import DEFAULT, qualified
from server.inference.replicas import Replicas
from server.inference.retry_budget import RetryBudget
from server.inference.routed import RoutedCheck, RoutedScores, RoutedShadow, RoutedStage
from server.models.embedding import EmbeddedModel
from server.process.health import Component

if TYPE_CHECKING:
    from fallback.chain import Stage, StageName
    from feature_cache.store.l1 import FeatureCache
    from server.canary.burn import Notes
    from server.composition.process import Process
    from server.control.state import ControlState
    from server.control.subjects import Subject
    from server.decision.admission import Admission
    from server.inference.routed import Check, Mirror, Scores
    from server.journal.journal import Journal
    from server.timing.loop_lag import LoopLag


@dataclass(frozen=True, slots=True)
class EmbeddedParts:
    """A champion in this process."""

    model: EmbeddedModel
    stage: Embedded
    check: EmbeddedCheck


@dataclass(frozen=True, slots=True)
class Model:
    """A model and everything that it has for itself."""

    name: str
    replicas: Replicas
    champion: Champion
    canary: CanaryParts
    embedded: EmbeddedParts
    cached_scores: CachedScores
    subjects: dict[str, Subject]
    """What the control state says of its champion and its canary."""

    def champion_version(self) -> str:
        """The version that decides without a canary; empty when none has answered yet."""
        return self.canary.deployment.champion_version


@dataclass(frozen=True, slots=True)
class Routing:
    """The parts of the request path that lead an order to its own model."""

    stages: dict[StageName, Stage]
    cached_scores: Scores
    shadow: Mirror
    objective: Notes
    check: Check


@dataclass(frozen=True, slots=True)
class Ground:
    """What models stand on."""

    process: Process
    loop_lag: LoopLag
    feature_cache: FeatureCache
    journal: Journal
    control: ControlState
    admission: Admission


async def open_models(ground: Ground) -> tuple[Model, ...]:
    """Every model, the default one first.

    Raises:
        OSError, ValueError: A replica of one could not be opened.
    """
    turn = asyncio.Lock()
    return tuple([await _open(ground, turn, name) for name in (DEFAULT, *ground.process.settings.models)])


async def _open(ground: Ground, turn: asyncio.Lock, name: str) -> Model:
    shared, control, admission = ground.process, ground.control, ground.admission
    settings = shared.settings.of_model(name)
    process = replace(shared, settings=settings)
    clock, uniform = process.clock, process.uniform
    replicas = await open_replicas(process, name, ground.loop_lag.stalled_seconds, lambda: admission.in_flight, turn)
    budget = RetryBudget(settings.retry, clock)
    champion = Champion(
        replicas.primary, replicas.secondary, budget, settings.retry.hedge, settings.budget, clock, uniform
    )
    canary = assemble(
        settings,
        name,
        replicas,
        champion,
        ground.feature_cache,
        ground.journal,
        control,
        process.instance_id,
        process.new_id,
        process.machine,
    )
    cached_scores = CachedScores(
        settings.cached_score,
        clock,
        enabled=lambda: control.cached_score,
        decides=canary.deployment.decides,
    )
    embedded = await _open_embedded(process, name, replicas, canary, control)
    subjects = canary_subjects(canary.rollout, canary.deployment, settings.replicas.champion_version, name)
    return Model(name, replicas, champion, canary, embedded, cached_scores, subjects)


async def _open_embedded(
    process: Process, name: str, replicas: Replicas, canary: CanaryParts, control: ControlState
) -> EmbeddedParts:
    """The champion in this process, which follows the version that decides."""
    settings, clock = process.settings, process.clock
    model = EmbeddedModel(
        settings.replay.model_store,
        settings.replicas.champion_model,
        lambda: canary.deployment.champion_version,
        clock,
        name,
    )
    await process.background(model.run(), "embedded-model" if name == DEFAULT else f"embedded-model-{name}")
    stage = Embedded(model, clock, lambda: control.embedded, canary.routing)
    return EmbeddedParts(model, stage, EmbeddedCheck(replicas.primary, settings.embedded, process.uniform, clock))


def routing_of(models: Sequence[Model], model_map: ModelMap) -> Routing:
    """What leads orders to their models; with one model that is the model's own part, and nothing stands before it."""
    if len(models) == 1:
        (only,) = models
        return Routing(
            {"model": only.canary.routing, "embedded": only.embedded.stage, "cached_score": only.cached_scores},
            only.cached_scores,
            only.canary.shadow,
            only.canary.objective,
            only.embedded.check,
        )
    scores = RoutedScores({one.name: one.cached_scores for one in models}, model_map)
    return Routing(
        {
            "model": RoutedStage({one.name: one.canary.routing for one in models}, model_map, pb.STAGE_PRIMARY),
            "embedded": RoutedStage({one.name: one.embedded.stage for one in models}, model_map, pb.STAGE_EMBEDDED),
            "cached_score": scores,
        },
        scores,
        RoutedShadow({one.name: one.canary.shadow for one in models}, model_map),
        RoutedObjective({one.name: one.canary.objective for one in models}, model_map.of),
        RoutedCheck({one.name: one.embedded.check for one in models}, model_map),
    )


def all_replicas(models: Sequence[Model]) -> Replicas:
    """The replicas of all models, for those who look at them or steer them; those of the default model come first."""
    first, *others = (one.replicas for one in models)
    beside = tuple(role for replicas in others for role in replicas.roles)
    return Replicas(first.primary, first.secondary, first.challengers, beside)


def components_of(models: Sequence[Model]) -> dict[str, Component]:
    """The models' parts as health sees them: by their own names of the default model, `scalper/embedded` of others."""
    components: dict[str, Component] = {}
    for model in models:
        embedded = model.embedded.model
        components[qualified(model.name, "embedded")] = Component(partial(_fault, embedded), required=False)
        at_rest = () if model.name == DEFAULT else model.replicas.challengers
        for role in model.replicas.roles:
            components[role.name] = component_of(role, may_rest=role in at_rest)
    return components


def _fault(embedded: EmbeddedModel) -> str:
    return embedded.fault
