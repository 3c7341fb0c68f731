"""The composition root: builds the server from its settings, starts it in dependency order and stops it in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from importlib.metadata import version
from typing import cast

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import CollectorRegistry, start_http_server

from fallback.cached_score import CachedScores
from fallback.chain import Chain, Stage, StageName
from fallback.guards import Guards
from fallback.rules import RulesBaseline
from feature_cache.cluster import open_store
from feature_cache.l1 import FeatureCache
from feature_cache.report import ReportReader
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from server.admission import Admission
from server.audit.errors import JournalError
from server.audit.journal import Journal
from server.audit.lock import FileLock
from server.audit.reading import Reading
from server.audit.reading import Task as ReadingTask
from server.audit.shipper import Shipper
from server.canary.assembly import assemble
from server.canary.subjects import canary_subjects
from server.control.configuration import Configuration
from server.control.file import ControlFile
from server.control.flags import provider_from
from server.control.shared import SharedControl
from server.control.state import ControlState, halt_at_start
from server.control.subjects import Subject, breaker_subjects, chain_subjects, drain_subjects
from server.dataplane import DataPlane
from server.decision_log import decision_log
from server.drift.watch import DriftWatch
from server.envoy import EnvoyEdge
from server.explaining import Explaining
from server.garbage import spare_the_hot_path
from server.health import Component, Health
from server.idempotency import IdempotencyWindow
from server.ids import uuid7_source
from server.inference.champion import Champion
from server.inference.codec import TORCHSERVE, Codec, ProtocolName
from server.inference.oip import ModelDescription, OpenInference
from server.inference.replica import Replica
from server.inference.retry_budget import RetryBudget
from server.inference.token import ReplicaToken
from server.loop_lag import LoopLag
from server.metrics import DecisionMetrics, ServerCollector
from server.record import PacketWriter
from server.reports import DecisionReports
from server.rpc.access import AccessInterceptor
from server.rpc.admin import AdminServicer
from server.rpc.asgi import GrpcApplication
from server.rpc.audit import SERVICE as AUDIT_SERVICE
from server.rpc.audit import AuditServicer
from server.rpc.call_context import CallContexts
from server.rpc.canary import CanarySteering
from server.rpc.convert import OrderReader
from server.rpc.decision import SERVICE as DECISION_SERVICE
from server.rpc.decision import DecisionServicer
from server.rpc.parsing import ParsingInterceptor
from server.rpc.steering import Steering
from server.security.security import Plane, Security
from server.settings import GrpcSettings, Settings, control_path, load
from server.shared_keys import SharedKeys
from server.slot import READY, Slot
from server.tracing import Tracing, open_tracing

_log = structlog.get_logger(__name__)

_RECORD_AGAIN_SECONDS = 1.0
"""Between two attempts to put the settings into the journal."""


_LAST_CALLS_SECONDS = 0.5
"""What calls under way on the admin port get when everything else has ended."""


class ComponentEndedError(Exception):
    """A component's loop ended while the server was running."""


async def serve(settings: Settings, slot: Slot | None = None) -> None:
    """Runs the server until SIGTERM or SIGINT, then drains it. A second signal exits at once.

    Args:
        settings: Those of the whole server.
        slot: The place of this process among several. It then drains when its standard input ends, too, writes `ready`
            to its standard output when it serves, and leaves it to its supervisor to end it at once.

    Raises:
        OSError, AuditError: It could not be started.
        ComponentEndedError: A part of it ended that must not; it was drained all the same.
    """
    stop = _stop_on_signal(alone=slot is None)
    if slot is not None:
        stop_at_end_of_input(stop)
    async with AsyncExitStack() as stack:
        server = await start(settings, slot, stack, stop)
        spare_the_hot_path()
        announcement = asyncio.create_task(server.announce()) if slot is not None else None
        await asyncio.wait((stop,))
        if announcement is not None:
            announcement.cancel()
        await server.drain()
    stop.result()


class Server:
    """The started server, as far as stopping it in order is concerned.

    Args:
        settings: Of the decision port.
        health_state: Told of the end first.
        admission: Refuses orders on streams in the end.
        refuse: Tells callers of the decision port to go elsewhere and gives calls under way so many seconds.
    """

    def __init__(
        self,
        settings: GrpcSettings,
        health_state: Health,
        admission: Admission,
        refuse: Callable[[float], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._health = health_state
        self._admission = admission
        self._refuse = refuse

    async def drain(self) -> None:
        """Health NOT_SERVING → time to notice → no new connections → calls under way finish."""
        _log.info("draining", in_flight=self._admission.in_flight)
        await self._health.drain()
        await asyncio.sleep(self._settings.drain_seconds)
        # Callers hear of it (GOAWAY) before anything is refused: what they sent meanwhile is still answered.
        stopped = asyncio.ensure_future(self._refuse(self._settings.grace_seconds))
        await asyncio.wait((stopped,), timeout=self._settings.grace_seconds / 4)
        self._admission.draining = True  # for orders on streams that go on
        await stopped

    async def announce(self) -> None:
        """Tells the supervisor, once the server is ready."""
        await self._health.serving.wait()
        with contextlib.suppress(OSError):  # the supervisor is gone, and our input ends
            os.write(sys.stdout.fileno(), READY + b"\n")


async def start(
    shared: Settings,
    slot: Slot | None,
    stack: AsyncExitStack,
    stop: asyncio.Future[None],
    envoy: EnvoyEdge | None = None,
) -> Server:
    """Builds and starts every component.

    Args:
        shared: Settings of all processes of the server.
        slot: The place of this one; None when it is alone.
        stack: Ends the components when it is left, in reverse order.
        stop: Ends the server when it is done; an exception is the reason why it had to end.
        envoy: The Envoy in whose process this runs; None for a grpc.aio server on the decision port.

    Raises:
        OSError, AuditError: It could not be started.
    """
    settings = shared if slot is None else slot.settings(shared)
    clock, uniform, new_id = time.monotonic, random.random, uuid7_source()
    instance_id = f"{socket.gethostname()}-{os.getpid()}-{new_id()[:13]}"
    metrics = DecisionMetrics()
    loop_lag = await _watch_loop(stack, clock, metrics, stop)

    journal = await stack.enter_async_context(Journal(settings.journal, on_commit=metrics.committed))
    shipper = await stack.enter_async_context(
        Shipper(journal, settings.database_url.get_secret_value(), settings.shipping, settings.decisions_topic)
    )
    security = await _open_security(settings, stack, stop, journal, instance_id, clock, envoy)
    feature_cache = FeatureCache(settings.redis_url.get_secret_value(), settings.feature_cache, settings.instruments)
    await stack.enter_async_context(_background(feature_cache.run(), "feature-cache", stop))
    store = await stack.enter_async_context(
        open_store(
            settings.redis_url.get_secret_value(),
            settings.feature_cache.ttl_seconds,
            settings.feature_cache.timeout_seconds,
        )
    )
    replicas = await _open_replicas(settings, stack, clock, uniform, loop_lag.stalled_seconds)
    primary, secondary, *_ = replicas

    cached_scores = CachedScores(settings.cached_score, clock, lambda: control.cached_score)
    champion = Champion(
        primary,
        secondary,
        RetryBudget(settings.retry, clock),
        settings.retry.hedge,
        settings.budget,
        clock,
        uniform,
    )
    canary = assemble(
        settings,
        replicas,
        champion,
        feature_cache,
        metrics,
        journal,
        lambda: control,
        instance_id,
        new_id,
        clock,
        uniform,
    )
    shadow, rollout = canary.shadow, canary.rollout
    rules = RulesBaseline(settings.rules, clock)
    stages: dict[StageName, Stage] = {
        "model": canary.routing,
        "cached_score": cached_scores,
        "rules": rules,
    }
    chain = Chain(stages, settings.chain.stages, clock)
    configuration = Configuration(shared, load, shared.journal.path)
    control = await _open_control(
        shared,
        slot,
        replicas,
        chain,
        canary_subjects(rollout, canary.deployment, settings.replicas.champion_version) | configuration.subjects(),
        journal,
        instance_id,
        new_id,
        stack,
    )
    await stack.enter_async_context(_background(control.watch(), "control", stop))
    await stack.enter_async_context(_background(rollout.run(), "canary", stop))
    admission = Admission(settings.admission, clock)
    idempotency = IdempotencyWindow(settings.idempotency, clock, _shared_keys(settings, slot, clock))
    reports, tracing = _open_reports(settings, stack, instance_id)
    packets = PacketWriter(instance_id, shared.config_hash(), settings.journal.durability.value, control)
    guards = Guards(settings.guards, lambda: control.trading_state, clock, time.time)

    _obey_configuration(configuration, cached_scores, rules, guards, packets, journal, stack)
    dataplane = DataPlane(
        admission=admission,
        idempotency=idempotency,
        feature_cache=feature_cache,
        max_feature_age_seconds=settings.features.max_age_seconds,
        chain=chain,
        cached_scores=cached_scores,
        guards=guards,
        journal=journal,
        packets=packets,
        shadow=shadow,
        shadow_on=lambda: control.shadow,
        control_stale=lambda: control.stale,
        metrics=metrics,
        budget_settings=settings.budget,
        reports=reports,
        clock=clock,
        new_id=new_id,
    )

    health_servicers = (health.aio.HealthServicer(), health.aio.HealthServicer(), health.aio.HealthServicer())
    health_state = Health(
        {
            "journal": Component(lambda: journal.problem, required=True),
            "audit_store": Component(lambda: shipper.last_error, required=False),
            "decisions_topic": Component(lambda: shipper.topic.last_error if shipper.topic else "", required=False),
            "control": Component(lambda: control.problem, required=False),
            "feature_cache": Component(lambda: _feature_problem(feature_cache, settings.instruments), required=False),
            **{replica.name: Component(_replica_problem(replica), required=False) for replica in replicas},
            **security.components(),
        },
        health_servicers,
        settings.startup_patience_seconds,
        clock,
    )
    # Nothing is healthy until it is proven; the servicers start as SERVING.
    await health_state.update()

    audit, explaining, readings, drift = await _open_audit(shared, stack, stop, journal, metrics, clock)
    collector = ServerCollector(
        decisions=metrics,
        admission=admission,
        idempotency=idempotency,
        loop_lag=loop_lag,
        control=control,
        configuration=configuration,
        champion=champion,
        chain=chain,
        restarts=0 if slot is None else slot.restarts,
        replicas=replicas,
        canary=canary,
        journal=journal,
        shipper=shipper,
        reports=reports,
        exporter=None if tracing is None else tracing.exporter,
        readings=readings,
        drift=drift,
        feature_cache=feature_cache,
        instruments=settings.instruments,
        security=security,
        clock=clock,
        loop=asyncio.get_running_loop(),
    )
    metrics_port = _serve_metrics(settings, stack, collector)

    by_name = {replica.name: replica for replica in replicas}
    admin = _grpc_server(settings, _access(security, "admin"), metrics.errors)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(
        AdminServicer(
            instance_id=instance_id,
            control=control,
            configuration=configuration,
            steering=Steering(control, by_name),
            canaries=CanarySteering(
                rollout, canary.deployment, control, by_name, settings.canary.steps, new_id, time.time
            ),
            changes=audit.changes,
            journal=journal,
            unshipped=lambda: shipper.unshipped,
            feature_cache=feature_cache,
            reports=ReportReader(store),
            drift=drift,
            instruments=settings.instruments,
            max_feature_age_seconds=settings.features.max_age_seconds,
            health=health_state,
            metrics=metrics,
            admission=admission,
            slot=slot,
            clock=clock,
        ),
        admin,
    )
    if slot is not None:
        admin.add_insecure_port(slot.admin_address(slot.index))
    audit.add_to(admin)
    admin_port = await _listen(
        stack,
        admin,
        health_servicers[0],
        (admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name, AUDIT_SERVICE),
        f"{settings.admin.host}:{settings.admin.port}",
        security.credentials("admin"),
    )
    await _open_probes(settings, stack, health_servicers[2], metrics)
    # What grpc.aio says of a deadline depends on the wall clock; what we read in Envoy does not.
    deadline_clock = time.time if envoy is None else clock
    decision_port, refuse = await _open_decisions(
        settings,
        stack,
        stop,
        DecisionServicer(
            dataplane,
            OrderReader(settings.instruments),
            metrics,
            settings.stream,
            CallContexts(tracing=tracing is not None),
            reports,
            explaining,
            clock,
            deadline_clock,
            security.charge,
        ),
        health_servicers[1],
        admission,
        security,
        metrics,
        clock,
        envoy,
    )
    await stack.enter_async_context(_background(health_state.run(), "health", stop))
    _log.info(
        "started",
        instance_id=instance_id,
        config_hash=shared.config_hash(),
        decision=f"{settings.grpc.host}:{decision_port}",
        admin=f"{settings.admin.host}:{admin_port}",
        metrics=f"{settings.metrics.host}:{metrics_port}",
        durability=settings.journal.durability.value,
    )
    return Server(settings.grpc, health_state, admission, refuse)


async def _open_security(
    settings: Settings,
    stack: AsyncExitStack,
    stop: asyncio.Future[None],
    journal: Journal,
    instance_id: str,
    clock: Callable[[], float],
    envoy: EnvoyEdge | None,
) -> Security:
    """Certificates, keys and policies, kept up to date."""
    publish = None if envoy is None else envoy.publish
    # Not even if full: whoever is refused must not fill the disk.
    security = Security(settings.tls, settings.tokens, settings.access, journal.append, instance_id, clock, publish)
    await stack.enter_async_context(_background(security.run(), "security", stop))
    return security


async def _open_probes(
    settings: Settings, stack: AsyncExitStack, health_servicer: health.aio.HealthServicer, metrics: DecisionMetrics
) -> None:
    """Opens the port of health checks alone, where there is to be one."""
    if settings.grpc.health_port is not None:
        at = f"{settings.grpc.host}:{settings.grpc.health_port}"
        await _listen(stack, _grpc_server(settings, (), metrics.errors), health_servicer, (), at, None)


async def _open_replicas(
    settings: Settings,
    stack: AsyncExitStack,
    clock: Callable[[], float],
    uniform: Callable[[], float],
    stalled_seconds: Callable[[float], float],
) -> tuple[Replica, ...]:
    """Primary, secondary and challenger, and the other challengers.

    Raises:
        OSError, ValueError: A model that is served by the Open Inference Protocol is not described.
    """
    endpoints = settings.replicas
    token_files = {str(name): path for name, path in endpoints.token_files.items()}

    async def opened(name: str, endpoint: str, model: str, version: str | None) -> Replica:
        sections = (settings.replica, settings.batcher, settings.breaker)
        codec = TORCHSERVE if name in endpoints.other_challengers else _codec(settings, name)
        path = token_files.get(name)
        token = None if path is None else ReplicaToken(name, path, time.time)
        replica = Replica(name, endpoint, model, version, *sections, clock, uniform, stalled_seconds, codec, token)
        return await stack.enter_async_context(replica)

    return (
        await opened("primary", endpoints.primary, endpoints.champion_model, endpoints.champion_version),
        await opened("secondary", endpoints.secondary, endpoints.champion_model, endpoints.champion_version),
        await opened("challenger", endpoints.challenger, endpoints.challenger_model, None),
        *[await opened(name, other.endpoint, other.model, None) for name, other in endpoints.other_challengers.items()],
    )


def _shared_keys(settings: Settings, slot: Slot | None, clock: Callable[[], float]) -> SharedKeys | None:
    """The idempotency keys of all processes, where there are several."""
    if slot is None or slot.keys is None:
        return None
    return SharedKeys(slot.keys, settings.idempotency.window_seconds, clock)


async def _open_control(
    settings: Settings,
    slot: Slot | None,
    replicas: Iterable[Replica],
    chain: Chain,
    others: Mapping[str, Subject],
    journal: Journal,
    instance_id: str,
    new_id: Callable[[], str],
    stack: AsyncExitStack,
) -> ControlState:
    """The control state, as all servers know it where Redis answers.

    Raises:
        OSError: The server is to start halted, and that cannot be written.
        FlagProviderError: There is no such provider of flags.
    """
    file, clock = ControlFile(control_path(settings)), time.monotonic
    if slot is None:
        halt_at_start(settings.control, file, new_id)
    by_name = {replica.name: replica for replica in replicas}
    subjects = {
        **breaker_subjects({name: replica.breaker for name, replica in by_name.items()}),
        **drain_subjects(by_name),
        **chain_subjects(chain, settings.chain.stages),
        **others,
    }
    shared = provider = None
    if settings.control.store == "redis":
        shared = SharedControl(settings.redis_url.get_secret_value(), settings.control.shared, clock)
        stack.push_async_callback(shared.aclose)
    if settings.control.flag_provider is not None:
        provider = provider_from(settings.control.flag_provider, settings.control.flag_provider_options)
        stack.callback(provider.shutdown)
    control = ControlState(
        settings.control, file, subjects, journal, instance_id, new_id, time.time_ns, clock, shared, provider
    )
    await control.synchronise()
    return control


def _codec(settings: Settings, replica: str) -> Codec:
    """What a replica speaks."""
    protocol: ProtocolName = getattr(settings.replicas, f"{replica}_protocol")
    if protocol == "torchserve":
        return TORCHSERVE
    description = settings.oip.challenger if replica == "challenger" else settings.oip.champion
    assert description is not None
    return OpenInference(protocol, settings.oip, ModelDescription.read(description))


def _obey_configuration(
    configuration: Configuration,
    cached_scores: CachedScores,
    rules: RulesBaseline,
    guards: Guards,
    packets: PacketWriter,
    journal: Journal,
    stack: AsyncExitStack,
) -> None:
    """Records the settings in force, and puts those sections in force at a reload that need no restart."""

    def obey(settings: Settings) -> None:
        cached_scores.configure(settings.cached_score)
        rules.configure(settings.rules)
        guards.configure(settings.guards)
        packets.config_hash = settings.config_hash()
        _record_settings(settings, stack, packets, journal)

    _record_settings(configuration.settings, stack, packets, journal)
    configuration.on_reload(obey)


async def _watch_loop(
    stack: AsyncExitStack, clock: Callable[[], float], metrics: DecisionMetrics, stop: asyncio.Future[None]
) -> LoopLag:
    """What measures the event loop's own delays."""
    loop_lag = LoopLag(clock, metrics.loop_lag.observe)
    await stack.enter_async_context(_background(loop_lag.run(), "loop-lag", stop))
    return loop_lag


def _open_reports(
    settings: Settings, stack: AsyncExitStack, instance_id: str
) -> tuple[DecisionReports, Tracing | None]:
    """What is told of single decisions, in the log and, where a collector is named, in traces."""
    tracing = stack.enter_context(open_tracing(settings.tracing, instance_id))
    log = stack.enter_context(decision_log(settings.decision_log, everything=settings.log_level == "debug"))
    return DecisionReports((log,) if tracing is None else (log, tracing.outlet)), tracing


def _record_settings(settings: Settings, stack: AsyncExitStack, packets: PacketWriter, journal: Journal) -> None:
    """Puts the settings into the journal, which then holds what packets name; again and again where that fails."""
    entry = packets.settings(settings.model_dump_json(), version("pretrade"), time.time_ns())

    async def record() -> None:
        while True:
            try:
                await journal.append(entry, even_if_full=True)
            except JournalError as error:
                _log.warning("settings not in the audit yet", error=str(error))
                await asyncio.sleep(_RECORD_AGAIN_SECONDS)
            else:
                return

    recording = asyncio.create_task(record(), name="record-settings")
    stack.callback(recording.cancel)


async def _open_audit(
    settings: Settings,
    stack: AsyncExitStack,
    stop: asyncio.Future[None],
    journal: Journal,
    metrics: DecisionMetrics,
    clock: Callable[[], float],
) -> tuple[AuditServicer, Explaining, list[Reading], DriftWatch]:
    """The audit service, explanations beside replies, the processes that read all journals, and who watches drift."""
    path = settings.journal.path.absolute()
    task = ReadingTask(
        journal=path,
        database_url=settings.database_url.get_secret_value(),
        model_store=settings.replay.model_store,
    )
    readings = [
        await stack.enter_async_context(Reading(name, task))
        for name in ("lookups", "watching", "replays", "explanations", "drift")
    ]
    lookups, watching, replays, explanations, comparing = readings
    drift = DriftWatch(comparing, settings.drift)
    await stack.enter_async_context(_background(drift.run(), "drift", stop))
    recording = stack.enter_context(FileLock(path.with_name(f"{path.name}.outcomes.lock")))
    servicer = AuditServicer(lookups, watching, replays, explanations, journal, recording)
    return servicer, Explaining(explanations, settings.explain, metrics.explanations, clock), readings, drift


def _serve_metrics(settings: Settings, stack: AsyncExitStack, collector: ServerCollector) -> int:
    """Serves the metrics on their own port, from a thread; returns the port."""
    registry = CollectorRegistry()
    registry.register(collector)
    server, thread = start_http_server(settings.metrics.port, settings.metrics.host, registry)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return int(server.server_port)


async def _open_decisions(
    settings: Settings,
    stack: AsyncExitStack,
    stop: asyncio.Future[None],
    servicer: DecisionServicer,
    health_servicer: health.aio.HealthServicer,
    admission: Admission,
    security: Security,
    metrics: DecisionMetrics,
    clock: Callable[[], float],
    envoy: EnvoyEdge | None,
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    """Opens the decision port, on grpc.aio or in Envoy; returns it and what makes its callers go elsewhere."""
    if envoy is None:
        server = _grpc_server(settings, _access(security, "decision"), metrics.errors)
        servicer.add_to(server)
        at = f"{settings.grpc.host}:{settings.grpc.port}"
        credentials = security.credentials("decision")
        port = await _listen(stack, server, health_servicer, (DECISION_SERVICE,), at, credentials)
        return port, partial(_end, server)
    limits = settings.grpc.max_message_bytes, settings.grpc.read_seconds
    access = security.access("decision")
    application = GrpcApplication(*limits, servicer.not_sent, metrics, clock, time.time, access)
    # As generated code sees it, the application is a server.
    servicer.add_to(cast("grpc.aio.Server", application))
    _add_standard_services(cast("grpc.aio.Server", application), health_servicer, (DECISION_SERVICE,))
    await stack.enter_async_context(_background(application.run(), "calls", stop))
    await stack.enter_async_context(_background(envoy.watch_gate(admission, metrics), "gate", stop))
    envoy.serve(application)
    return settings.grpc.port, envoy.refuse


def _access(security: Security, plane: Plane) -> tuple[AccessInterceptor, ...]:
    """Guards a port on grpc.aio; nothing where it is open."""
    access = security.access(plane)
    return () if access is None else (AccessInterceptor(access),)


def _grpc_server(
    settings: Settings, interceptors: Sequence[grpc.aio.ServerInterceptor], errors: Counter[str]
) -> grpc.aio.Server:
    """A server with the limits that protect it from its callers."""
    return grpc.aio.server(
        interceptors=(*interceptors, ParsingInterceptor(settings.grpc.read_seconds, errors)),
        options=(
            ("grpc.max_receive_message_length", settings.grpc.max_message_bytes),
            ("grpc.max_concurrent_streams", settings.grpc.max_streams_per_connection),
            # A stream that is not read may fill 64 KiB, not the megabytes that a fast network would be granted.
            ("grpc.http2.bdp_probe", 0),
            # Callers that are slow to introduce themselves, and callers that vanished.
            ("grpc.server_handshake_timeout_ms", int(settings.grpc.handshake_seconds * 1e3)),
            ("grpc.keepalive_time_ms", int(settings.grpc.keepalive_seconds * 1e3)),
            ("grpc.keepalive_timeout_ms", 10_000),
            # What waits here is not seen by admission, and an answer to it would be late: a burst waits, an overload
            # is refused by the transport, which costs less than a refusal of ours.
            ("grpc.server.max_pending_requests", settings.grpc.max_pending_calls),
            ("grpc.server.max_pending_requests_hard_limit", 2 * settings.grpc.max_pending_calls),
            # A second server on the port is a mistake, unless it is one of several processes.
            ("grpc.so_reuseport", int(settings.processes is not None)),
            # Callers may keep idle connections alive, but not by pinging all the time.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ),
    )


async def _listen(
    stack: AsyncExitStack,
    server: grpc.aio.Server,
    health_servicer: health.aio.HealthServicer,
    services: tuple[str, ...],
    at: str,
    credentials: grpc.ServerCredentials | None,
) -> int:
    """Adds health and reflection, binds, with TLS where there are credentials, and starts; returns the port.

    Raises:
        OSError: The address cannot be bound.
    """
    _add_standard_services(server, health_servicer, services)
    try:
        port = server.add_insecure_port(at) if credentials is None else server.add_secure_port(at, credentials)
    except RuntimeError as error:
        raise OSError(f"{' and '.join(services) or 'health'}: cannot listen on {at}: {error}") from error
    await server.start()
    stack.push_async_callback(_end, server, _LAST_CALLS_SECONDS)
    return port


async def _end(server: grpc.aio.Server, grace_seconds: float) -> None:
    """Stops a server. gRPC may never be done with that; what comes after, the journal above all, must not wait."""
    _, stopping = await asyncio.wait((asyncio.create_task(server.stop(grace_seconds)),), timeout=grace_seconds + 1.0)
    if stopping:
        _log.warning("the transport did not end in time", grace_seconds=grace_seconds)


def _add_standard_services(
    server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, services: tuple[str, ...]
) -> None:
    """Adds health and reflection."""
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, None], name: str, stop: asyncio.Future[None]) -> AsyncIterator[None]:
    """Runs a component's loop while the context is open. One that ends by itself stops the server, which then fails."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not stop.done():
            stop.set_exception(ComponentEndedError(f"{name} ended: {task.exception()!r}"))

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _replica_problem(replica: Replica) -> Callable[[], str]:
    def problem() -> str:
        if replica.token is not None and replica.token.problem:
            return replica.token.problem
        return "" if replica.healthy else f"{replica.endpoint} does not answer soundly"

    return problem


def _feature_problem(feature_cache: FeatureCache, instruments: tuple[str, ...]) -> str:
    if not feature_cache.connected:
        return "Redis is not connected"
    missing = [name for name in instruments if feature_cache.get(name) is None]
    return f"no features: {', '.join(missing)}" if missing else ""


def _stop_on_signal(alone: bool) -> asyncio.Future[None]:
    """A future that the first SIGTERM or SIGINT resolves; alone, the second ends the process at once.

    A process under a supervisor gets the signals of its group besides what the supervisor tells it.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(None)
        elif alone:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    if not alone:
        # To the supervisor it means a replacement; it must not end us when the whole group gets it.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
    return stop


def stop_at_end_of_input(stop: asyncio.Future[None]) -> None:
    """Resolves the future when the supervisor closes our standard input, or is gone."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        if not stop.done():
            stop.set_result(None)

    def read() -> None:
        os.read(sys.stdin.fileno(), 1)
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(end)

    threading.Thread(target=read, name="leash", daemon=True).start()
