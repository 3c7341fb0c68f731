"""Connects the request path and what it depends on, for the composition root."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fallback.chain import Chain
from fallback.guards import Guards
from fallback.model_limits import LimitGuards
from fallback.rules import RulesBaseline
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.cluster import ClusterFeatureStore, open_store
from feature_cache.store.l1 import FeatureCache
from feature_cache.store.vectors import FeatureStore
from pretrade.client.operator_token import token_path
from server.audit.shipping.shipper import Shipper
from server.composition.control import apply_configuration, open_control, subjects_of
from server.composition.models import Ground, Model, all_replicas, open_models, routing_of
from server.configuration import Configuration
from server.control.alert_rules import UserAlerts
from server.control.state import ControlState
from server.control.subjects import alert_rule_subjects, model_map_subjects
from server.decision.admission import Admission
from server.decision.following import Observers
from server.decision.idempotency import IdempotencyWindow
from server.decision.left_keys import LeftKeys
from server.decision.markets import Markets
from server.decision.other_sets import OtherSets
from server.decision.packets import PacketWriter
from server.decision.plane import DataPlane
from server.decision.recorder import Recording
from server.decision.replies import Replies
from server.decision.reports import DecisionReports
from server.decision.shared_keys import SharedKeys, make_memory
from server.inference.model_map import ModelMap
from server.inference.replicas import Replicas
from server.journal.journal import Journal
from server.models.expiry import ModelExpiry
from server.models.limits import KnownLimits
from server.process.slot import journal_path
from server.security import operator
from server.security.security import Security
from server.settings import Settings, load
from server.telemetry.decision_log import decision_log
from server.telemetry.tracing import Tracing, open_tracing
from server.timing.loop_lag import LoopLag

if TYPE_CHECKING:
    from server.composition.process import Process
    from server.envoy.edge import EnvoyEdge


@dataclass(frozen=True, slots=True)
class Foundation:
    """What the request path stands on."""

    loop_lag: LoopLag
    journal: Journal
    shipper: Shipper
    replies: Replies
    security: Security
    feature_cache: FeatureCache
    feature_store: FeatureStore | ClusterFeatureStore
    idempotency: IdempotencyWindow


@dataclass(frozen=True, slots=True)
class RequestPath:
    """The request path, and those of its parts that are steered and measured."""

    dataplane: DataPlane
    replicas: Replicas
    """Those of all models."""
    models: tuple[Model, ...]
    """The default one first."""
    model_map: ModelMap
    alerts: UserAlerts
    chain: Chain
    configuration: Configuration[Settings]
    control: ControlState
    admission: Admission
    idempotency: IdempotencyWindow
    reports: DecisionReports
    tracing: Tracing | None
    expiry: ModelExpiry
    other_sets: OtherSets


async def open_foundation(process: Process, envoy: EnvoyEdge | None) -> Foundation:
    """Opens loop-lag measurement, the journal and its shipping, credentials and policies, and features.

    Args:
        process: What they are built with.
        envoy: The Envoy in whose process this runs; it gets new certificates. None without one.

    Raises:
        OSError, AuditError: One could not be started.
    """
    settings, stack, clock = process.settings, process.stack, process.clock
    loop_lag = LoopLag(clock)
    await process.background(loop_lag.run(), "loop-lag")
    journals = 1 if process.slot is None else process.slot.processes + 1
    keys = _shared_keys(process)
    left_keys = _left_keys(process, keys)
    journal = await stack.enter_async_context(Journal(settings.journal, process.machine, journals, left_keys.take_over))
    left_keys.has_taken_over()
    shipper = await stack.enter_async_context(
        Shipper(journal, settings.database_url.get_secret_value(), settings.shipping, settings.decisions_topic)
    )
    journal.on_full(shipper.trim)
    replies = await stack.enter_async_context(Replies(journal, clock))
    publish = None if envoy is None else envoy.publish
    # Not even if full: refused callers must not fill the disk.
    security = Security(
        settings.tls,
        settings.tokens,
        settings.access,
        _operator_token(process),
        journal.append,
        process.instance_id,
        clock,
        publish,
        process.machine.wall_clock,
    )
    await process.background(security.run(), "security")
    redis_url = settings.redis_url.get_secret_value()
    feature_cache = _cache_of(MF1, process)
    await process.background(feature_cache.run(), "feature-cache")
    feature_store = await stack.enter_async_context(
        open_store(redis_url, settings.feature_cache.ttl_seconds, settings.feature_cache.timeout_seconds)
    )
    idempotency = IdempotencyWindow(clock, keys, left_keys.resolve)
    return Foundation(loop_lag, journal, shipper, replies, security, feature_cache, feature_store, idempotency)


def _cache_of(feature_set: FeatureSet, process: Process) -> FeatureCache:
    """This server's copy of a set's vectors, still to be run."""
    settings = process.settings
    return FeatureCache(
        settings.redis_url.get_secret_value(),
        settings.feature_cache,
        settings.instruments,
        feature_set,
        monotonic=process.clock,
        wall_ns=process.machine.wall_clock_ns,
        uniform=process.uniform,
    )


def _operator_token(process: Process) -> bytes | None:
    """Digest of the operator token, which a supervisor makes before its processes start; None if it is not used.

    Raises:
        OSError: Its file cannot be written, or read.
    """
    if process.shared.access.admin != "operator_token":
        return None
    path = token_path(process.shared.journal.path)
    return (operator.make_token if process.slot is None else operator.read_token)(path, process.machine)


async def open_request_path(process: Process, base: Foundation) -> RequestPath:
    """Everything that a decision passes through, and what steers it.

    Raises:
        OSError, ValueError, FlagProviderError: A part of it could not be started.
    """
    settings, clock = process.settings, process.clock
    control = open_control(process, base.journal)
    admission = Admission(settings.admission, clock)
    models = await open_models(Ground(process, base.loop_lag, base.feature_cache, base.journal, control, admission))
    replicas, model_map = all_replicas(models), ModelMap()
    routing = routing_of(models, model_map)
    rules = RulesBaseline(settings.rules, clock)
    chain = Chain(routing.stages | {"rules": rules}, settings.chain.stages, clock)
    configuration = Configuration(process.shared, load, process.shared.journal.path)
    alerts = UserAlerts()
    process.metrics.strategies.named = lambda: alerts.strategies
    others = model_map_subjects(model_map) | alert_rule_subjects(alerts) | configuration.subjects()
    for model in models:
        others |= model.subjects
    control.steer(subjects_of(replicas.roles, chain, process.shared.chain.stages, others))
    await control.synchronise()
    await process.background(control.watch(), "control")
    for model in models:
        await process.background(model.canary.rollout.run(), "canary" if model is models[0] else f"canary-{model.name}")
    reports, tracing = _open_reports(process)
    base.security.tell_of([*(replica.tls for replica in replicas.values()), None if tracing is None else tracing.tls])
    durability = settings.journal.durability.value
    packets = PacketWriter(process.instance_id, process.shared.config_hash(), durability, control)
    limits = KnownLimits(settings.replay.model_store, clock, [model.name for model in models])
    await limits.read_aliases()
    await process.background(limits.run(), "model-limits")
    of_models = LimitGuards(limits.of, lambda: control.uncertain, lambda: control.out_of_domain)
    guards = Guards(settings.guards, lambda: control.trading_state, clock, process.machine.wall_clock, of_models)
    apply_configuration(configuration, routing.cached_scores, rules, guards, packets, base.journal, process.stack)
    other_sets = OtherSets(
        lambda: _sets_of(models),
        lambda feature_set: _cache_of(feature_set, process),
        settings.features.max_age_seconds,
        clock,
        *(() if len(models) == 1 else (model_map.of,)),
    )
    await process.background(other_sets.run(), "other-sets")
    dataplane = DataPlane(
        admission=admission,
        idempotency=base.idempotency,
        markets=Markets(base.feature_cache, settings.features.max_age_seconds, clock, other_sets),
        chain=chain,
        cached_scores=routing.cached_scores,
        guards=guards,
        recording=Recording(base.journal, base.replies, packets, process.new_id.several),
        shadow=routing.shadow,
        control=control,
        observers=Observers(process.metrics, routing.objective, reports, base.loop_lag, routing.check),
        budget_settings=settings.budget,
        clock=clock,
        wall_clock_ns=process.machine.wall_clock_ns,
        models=model_map if len(models) > 1 else None,
    )
    return RequestPath(
        dataplane=dataplane,
        replicas=replicas,
        models=models,
        model_map=model_map,
        alerts=alerts,
        chain=chain,
        configuration=configuration,
        control=control,
        admission=admission,
        idempotency=base.idempotency,
        reports=reports,
        tracing=tracing,
        expiry=ModelExpiry(base.feature_cache, lambda: guards.model_grace_seconds),
        other_sets=other_sets,
    )


def _sets_of(models: Iterable[Model]) -> dict[str, list[FeatureSet]]:
    """The feature sets that each model takes, of the versions that may decide or be asked now."""
    sets = {}
    for model in models:
        taken = sets[model.name] = [replica.feature_set for replica in model.replicas.values()]
        if (scorer := model.embedded.model.scorer) is not None:
            taken.append(scorer.feature_set)
    return sets


def _shared_keys(process: Process) -> SharedKeys:
    """The idempotency keys of all processes, or those of one that is alone."""
    slot, settings = process.slot, process.settings.idempotency
    memory = None if slot is None else slot.keys
    if memory is None:
        memory = make_memory(settings.max_keys)
        process.stack.callback(os.close, memory)
    place = 0 if slot is None else slot.index
    return SharedKeys(memory, settings.window_seconds, process.clock, slot=place)


def _left_keys(process: Process, keys: SharedKeys) -> LeftKeys:
    """What brings into the table of keys what killed processes had decided."""
    path = process.shared.journal.path
    window_seconds = process.settings.idempotency.window_seconds
    return LeftKeys(keys, window_seconds, partial(journal_path, path), process.machine)


def _open_reports(process: Process) -> tuple[DecisionReports, Tracing | None]:
    """Opens the reports of single decisions: to the log and, if a collector is named, to traces."""
    settings, stack = process.settings, process.stack
    tracing = stack.enter_context(open_tracing(settings.tracing, process.instance_id, process.machine.wall_clock))
    log = stack.enter_context(decision_log(settings.decision_log, settings.log_level == "debug", process.machine))
    sinks = (log,) if tracing is None else (log, tracing.sink)
    return DecisionReports(sinks, process.machine, traces=tracing is not None), tracing
