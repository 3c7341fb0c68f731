"""Connects the parts of canary and shadow traffic, for the composition root."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pretrade.admin.v1 import admin_pb2
from server.canary.burn import Objective
from server.canary.events import EventLog
from server.canary.markouts import Markouts
from server.canary.pairing import Side
from server.canary.pairs import PairRecorder
from server.canary.rollout import Rollout
from server.canary.routing import CanaryRouting
from server.canary.subjects import canary_subject, champion_subject
from server.control.state import Wanted
from server.inference.model_names import DEFAULT
from server.inference.shadow import Shadow
from server.models.deployment import Deployment
from server.models.loading import ModelLoader
from server.models.registry import Registry

if TYPE_CHECKING:
    from feature_cache.store.l1 import FeatureCache
    from server.canary.plan import Canary
    from server.control.state import ControlState
    from server.inference.champion import Champion
    from server.inference.pool import Role
    from server.inference.replicas import Replicas
    from server.journal.journal import Journal
    from server.machine import Machine
    from server.settings import Settings


@dataclass(frozen=True, slots=True)
class CanaryParts:
    """What the rest of the server knows of it."""

    routing: CanaryRouting
    """The model stage of the chain."""
    shadow: Shadow
    rollout: Rollout
    objective: Objective
    """Which calls count, and what became of them."""
    deployment: Deployment
    recorder: PairRecorder | None


def assemble(
    settings: Settings,
    model: str,
    replicas: Replicas,
    champion: Champion,
    feature_cache: FeatureCache,
    journal: Journal,
    control: ControlState,
    instance_id: str,
    new_id: Callable[[], str],
    machine: Machine,
) -> CanaryParts:
    """Makes the parts.

    Args:
        settings: Of the server, as the model has them.
        model: Its name.
        replicas: Who serves the models.
        champion: The model stage without a canary.
        feature_cache: Where the market's outcomes are read.
        journal: Where pairs and the canary's events are recorded.
        control: The control state, which begins to steer these parts later.
        instance_id: This server process.
        new_id: Makes a unique, time-ordered id.
        machine: Whose clocks and chance they use.
    """
    clock, wall_clock_ns = machine.clock, machine.wall_clock_ns
    primary, secondary, challenger = replicas.primary, replicas.secondary, replicas.challenger
    store = settings.replay.model_store
    loader = ModelLoader(
        replicas.management, settings.canary.archive_url, settings.canary.load_seconds, oip=settings.oip
    )
    recorder = PairRecorder(journal, wall_clock_ns) if settings.shadow.keep_pairs else None

    def reserve_seconds() -> float:
        replica = primary.pick() or (None if secondary is None else secondary.pick())
        replica = replica or next(iter(primary.replicas), None)
        return 0.0 if replica is None else max(replica.batcher.expected_seconds, replica.latency.p95)

    objective = Objective(settings.slo, settings.budget.cap_seconds)
    routing = CanaryRouting(challenger, champion, reserve_seconds, settings.budget, objective, clock)

    def set_canary(canary: Canary, author: str, reason: str, unchanged: bool) -> Awaitable[admin_pb2.Change]:
        value, expected = canary.model_dump_json(), control.version if unchanged else None
        return control.change(
            Wanted(canary_subject(model), value, author, reason, expected_version=expected, needs_all=unchanged)
        )

    def set_champion(version: str, author: str, reason: str, unchanged: bool) -> Awaitable[admin_pb2.Change]:
        expected = control.version if unchanged else None
        return control.change(
            Wanted(champion_subject(model), version, author, reason, expected_version=expected, needs_all=unchanged)
        )

    deployment = Deployment(
        Registry(store, model) if store is not None else None,
        loader,
        replicas.champions,
        settings.replicas.champion_version,
        set_champion,
        settings.canary.keep_previous_seconds,
        clock,
        may_be_first=model != DEFAULT,
    )
    markouts = Markouts(feature_cache, clock)
    rollout = Rollout(
        settings=settings.canary,
        slo=settings.slo,
        processes=settings.processes or 1,
        deployment=deployment,
        challenger=challenger,
        routing=routing,
        markouts=markouts,
        set_canary=set_canary,
        objective=objective,
        events=EventLog(journal, new_id, instance_id, wall_clock_ns),
        recorder=recorder,
        clock=clock,
    )
    listen(rollout, deployment, markouts, routing, challenger, replicas.champions)
    shadow = Shadow(
        replicas.challengers,
        replicas.champions,
        settings.shadow.sample_share,
        machine.uniform,
        lambda role: role is challenger and routing.canary is not None,
        routing.tells,
        rollout.observe_pair,
        rollout.observe_pairs,
        rollout.observe_decision,
    )
    return CanaryParts(routing, shadow, rollout, objective, deployment, recorder)


def listen(
    rollout: Rollout,
    deployment: Deployment,
    markouts: Markouts,
    routing: CanaryRouting,
    challenger: Role,
    champions: Iterable[Role],
) -> None:
    """Connects the rollout to outcomes, orders and batches, and to endpoints that come."""
    markouts.on_outcome(rollout.observe_outcome)
    routing.on_order(rollout.observe_order)
    challenger.on_batch(partial(rollout.observe_batch, Side.CANARY))
    challenger.on_join(rollout.join)
    for role in champions:
        role.on_batch(partial(rollout.observe_batch, Side.CHAMPION))
        role.on_join(partial(deployment.join, role))
