"""The composition root: builds the server from its settings, starts it in dependency order and stops it in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import structlog

from feature_cache.compiled import in_use
from feature_cache.store.l1 import FeatureCache
from server.audit.reading.explaining import Explaining
from server.composition.audit import open_audit
from server.composition.http_port import open_http_port
from server.composition.metrics_port import serve_metrics
from server.composition.models import components_of
from server.composition.ports import open_admin_port, open_decision_port, open_health_port
from server.composition.process import Process, seconds_to_end, this_process
from server.composition.request_path import Foundation, RequestPath, open_foundation, open_request_path
from server.composition.servicers import open_servicers
from server.decision.admission import Admission
from server.envoy.edge import EnvoyEdge
from server.machine import REAL, Machine
from server.process.cores import pin
from server.process.garbage import spare_the_hot_path
from server.process.health import Component, Health
from server.process.slot import READY, Slot
from server.process.stopping import Leash, stop_on_signal
from server.rpc.health import HealthServicer
from server.rpc.ports import GrpcSettings
from server.settings import Settings
from server.telemetry.tracing import Tracing

_log = structlog.get_logger(__name__)


async def serve(settings: Settings, slot: Slot | None = None, leash: Leash | None = None) -> None:
    """Runs the server until SIGTERM or SIGINT, then drains it. A second signal exits at once.

    Args:
        settings: Those of the whole server.
        slot: The place of this process among several. It then writes `ready` to its standard output when it serves, and
            leaves it to its supervisor to end it at once.
        leash: Has it drain with its supervisor, too.

    Raises:
        OSError, AuditError: It could not be started.
        ComponentEndedError: A part of it ended that must not; it was drained all the same.
    """
    stop = stop_on_signal(alone=slot is None)
    async with started(settings, slot, leash, stop) as server:
        await server.run(stop)
    stop.result()


@asynccontextmanager
async def started(
    settings: Settings,
    slot: Slot | None,
    leash: Leash | None,
    stop: asyncio.Future[None],
    envoy: EnvoyEdge | None = None,
) -> AsyncIterator[Server]:
    """The started server, on either edge; its components end when the context is left.

    Args:
        settings: Those of the whole server.
        slot: The place of this process among several; None when it is alone.
        leash: Resolves `stop` when the supervisor ends; None without a supervisor.
        stop: As in `start`.
        envoy: As in `start`.
    """
    if leash is not None:
        leash.drain(stop, seconds_to_end(settings))
    pin(settings.cores)
    async with AsyncExitStack() as stack:
        server = await start(settings, slot, stack, stop, envoy)
        spare_the_hot_path()
        yield server


class Server:
    """The started server, as far as stopping it in order is concerned.

    Args:
        settings: Of the decision port.
        health_state: Told of the end first.
        admission: Refuses orders on streams in the end.
        refuse: Tells callers of the decision port to go elsewhere and gives calls under way so many seconds.
        supervised: True where a supervisor waits to hear that the server is ready.
    """

    def __init__(
        self,
        settings: GrpcSettings,
        health_state: Health,
        admission: Admission,
        refuse: Callable[[float], Awaitable[None]],
        supervised: bool,
    ) -> None:
        self._supervised = supervised
        self._settings = settings
        self._health = health_state
        self._admission = admission
        self._refuse = refuse

    async def run(self, stop: asyncio.Future[None], *ends: asyncio.Future[Any]) -> bool:
        """Serves until `stop` is done, and then drains.

        Returns:
            False, without draining, where one of `ends` is done by then.
        """
        announcement = asyncio.create_task(self._announce()) if self._supervised else None
        await asyncio.wait((stop, *ends), return_when=asyncio.FIRST_COMPLETED)
        if announcement is not None:
            announcement.cancel()
        if any(end.done() for end in ends):
            return False
        await self.drain()
        return True

    async def drain(self) -> None:
        """Health NOT_SERVING → time to notice → no new connections → calls under way finish."""
        _log.info("draining", in_flight=self._admission.in_flight)
        self._health.drain()
        await asyncio.sleep(self._settings.drain_seconds)
        # Callers hear of it (GOAWAY) before anything is refused: what they sent meanwhile is still answered.
        stopped = asyncio.ensure_future(self._refuse(self._settings.grace_seconds))
        await asyncio.wait((stopped,), timeout=self._settings.grace_seconds / 4)
        self._admission.draining = True  # for orders on streams that go on
        await stopped

    async def _announce(self) -> None:
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
    machine: Machine = REAL,
) -> Server:
    """Builds and starts every component.

    Args:
        shared: Settings of all processes of the server.
        slot: The place of this one; None when it is alone.
        stack: Ends the components when it is left, in reverse order.
        stop: Ends the server when it is done; an exception is the reason why it had to end.
        envoy: The Envoy in whose process this runs; None for a grpc.aio server on the decision port.
        machine: What it runs on.

    Raises:
        OSError, AuditError: It could not be started.
    """
    process = this_process(shared, slot, stack, stop, machine)
    base = await open_foundation(process, envoy)
    path = await open_request_path(process, base)

    audit = await open_audit(process, base.journal, path.models, path.model_map)

    health_servicer = HealthServicer()
    health_state = _health(process, base, path, audit.explaining, health_servicer)
    health_state.update()  # nothing is unknown when the ports open

    servicers = open_servicers(process, base, path, audit, health_state, health_servicer)
    metrics_port = serve_metrics(process, base, path, audit, servicers)
    admin_port = await open_admin_port(process, base.security, servicers)
    await open_health_port(process, health_servicer)
    http_port, refuse_http = await open_http_port(process, base.security, path, servicers)
    decision_port, refuse = await open_decision_port(process, base.security, path, servicers, envoy)
    await process.background(health_state.run(), "health")

    settings = process.settings
    _log.info(
        "started",
        instance_id=process.instance_id,
        config_hash=shared.config_hash(),
        edge=settings.grpc.edge,
        decision=f"{settings.grpc.host}:{decision_port}",
        admin=f"{settings.admin.host}:{admin_port}",
        http=f"{settings.http.host}:{http_port}" if http_port else "",
        metrics=f"{settings.metrics.host}:{metrics_port}",
        durability=settings.journal.durability.value,
        compiled=len(in_use()),
    )
    return Server(settings.grpc, health_state, path.admission, _both(refuse, refuse_http), slot is not None)


def _both(*refusing: Callable[[float], Awaitable[None]]) -> Callable[[float], Awaitable[None]]:
    """Has the callers of all these ports go elsewhere, at once."""

    async def refuse(grace_seconds: float) -> None:
        await asyncio.gather(*(one(grace_seconds) for one in refusing))

    return refuse


def _health(
    process: Process, base: Foundation, path: RequestPath, explaining: Explaining, servicer: HealthServicer
) -> Health:
    """The health of the components, reported on all ports."""
    settings, shipper = process.settings, base.shipper
    features, instruments = base.feature_cache, settings.instruments
    return Health(
        {
            "journal": Component(lambda: base.journal.problem, required=True),
            "audit_store": Component(lambda: shipper.problem, required=False),
            "decisions_topic": Component(lambda: shipper.topic.last_error if shipper.topic else "", required=False),
            "control": Component(lambda: path.control.problem, required=False),
            "feature_cache": Component(lambda: _feature_problem(features, instruments), required=False),
            "explanations": Component(
                lambda: explaining.problem, required=False, warming_up=lambda: explaining.warming_up
            ),
            **components_of(path.models),
            **base.security.components(),
            **_tracing_component(path.tracing),
        },
        servicer.set,
        settings.startup_patience_seconds,
        process.clock,
    )


def _tracing_component(tracing: Tracing | None) -> dict[str, Component]:
    """The certificates of the connection to the collector, where there are any."""
    tls = None if tracing is None else tracing.tls
    return {} if tls is None else {"tracing": Component(lambda: tls.problem, required=False)}


def _feature_problem(feature_cache: FeatureCache, instruments: tuple[str, ...]) -> str:
    if not feature_cache.connected:
        return "Redis is not connected"
    missing = [name for name in instruments if feature_cache.get(name) is None]
    return f"no features: {', '.join(missing)}" if missing else ""
