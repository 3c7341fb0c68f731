"""Opens the gRPC ports: decisions (on grpc.aio or in Envoy), administration with audit, and health alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from server.composition.http_port import decision_application
from server.envoy import lane
from server.envoy.asgi import GrpcApplication
from server.machine import REAL, Machine
from server.rpc.admin import SERVICE as ADMIN_SERVICE
from server.rpc.audit import SERVICE as AUDIT_SERVICE
from server.rpc.decision import SERVICE as DECISION_SERVICE
from server.rpc.edge import Delivery, GrpcEdge
from server.timing.call_deadlines import CallDeadlines

if TYPE_CHECKING:
    from server.composition.process import Process
    from server.composition.request_path import RequestPath
    from server.composition.servicers import Servicers
    from server.envoy.edge import EnvoyEdge
    from server.rpc.decision import DecisionServicer
    from server.rpc.health import HealthServicer
    from server.security.access import AccessControl
    from server.security.security import Security
    from server.settings import Settings

_log = structlog.get_logger(__name__)

_LAST_CALLS_SECONDS = 0.5
"""What calls under way on the admin port get when everything else has ended."""


async def open_admin_port(process: Process, security: Security, servicers: Servicers) -> int:
    """Opens the port of administration and audit; returns it.

    Raises:
        OSError: The address cannot be bound.
    """
    settings, slot = process.settings, process.slot
    server = grpc_server(settings, security.access("admin"), process.metrics.errors, process.machine)
    if slot is not None:
        server.add_insecure_port(slot.admin_address(slot.index))
    servicers.add_admin_to(server)
    return await _listen(
        process.stack,
        server,
        servicers.health,
        (ADMIN_SERVICE, AUDIT_SERVICE),
        f"{settings.admin.host}:{settings.admin.port}",
        security.credentials("admin"),
    )


async def open_health_port(process: Process, health_servicer: HealthServicer) -> None:
    """Opens the port of health checks alone, where there is to be one."""
    settings = process.settings
    if settings.grpc.health_port is not None:
        at = f"{settings.grpc.host}:{settings.grpc.health_port}"
        server = grpc_server(settings, None, process.metrics.errors, process.machine)
        await _listen(process.stack, server, health_servicer, (), at, None)


async def open_decision_port(
    process: Process, security: Security, path: RequestPath, servicers: Servicers, envoy: EnvoyEdge | None
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    """Opens the decision port, on grpc.aio or in Envoy; returns it and what makes its callers go elsewhere.

    Raises:
        OSError: The address cannot be bound.
    """
    settings, clock, metrics = process.settings, process.clock, process.metrics
    servicer = servicers.decision
    if envoy is None:
        server = grpc_server(settings, security.access("decision"), metrics.errors, process.machine, servicer)
        servicer.add_to(server)
        at = f"{settings.grpc.host}:{settings.grpc.port}"
        credentials = security.credentials("decision")
        port = await _listen(process.stack, server, servicers.health, (DECISION_SERVICE,), at, credentials)
        return port, partial(_end, server)
    application = GrpcApplication(
        settings.grpc.max_message_bytes,
        settings.grpc.read_seconds,
        servicer,
        metrics,
        clock,
        process.machine.wall_clock,
        security.access("decision"),
        path.admission.dropped,
        decision_application(process, security, path, servicers),
    )
    # As generated code sees it, the application is a server.
    as_server = cast("grpc.aio.Server", application)
    servicer.add_to_application(as_server)
    _add_standard_services(as_server, servicers.health, (DECISION_SERVICE,))
    await process.background(application.run(), "calls")
    await process.background(envoy.watch_gate(path.admission, metrics), "gate")
    envoy.serve(application)
    await _open_lane(process, application, servicer)
    await process.background(envoy.steer_gate(settings.admission, path.admission), "gate's limit")
    return settings.grpc.port, envoy.refuse


async def _open_lane(process: Process, application: GrpcApplication, servicer: DecisionServicer) -> None:
    """Has plain calls come without ASGI, where Envoy has the filter for it."""
    if not lane.is_loaded():
        _log.info("no lane", problem=lane.missing() or "Envoy has not loaded its filter")
        return
    settings = process.settings
    is_open = settings.access.decision == "open"
    opened = lane.Lane(application, servicer, settings.grpc.max_message_bytes, is_open, process.metrics, process.clock)
    opened.open()
    process.stack.callback(opened.close)
    await process.background(opened.run(), "lane")
    _log.info("lane", plain=is_open)


def grpc_server(
    settings: Settings,
    access: AccessControl | None,
    errors: Counter[str],
    machine: Machine = REAL,
    delivery: Delivery | None = None,
) -> grpc.aio.Server:
    """A server with the limits that protect it from its callers, and the edge that its calls pass.

    Args:
        settings: Its limits.
        access: Asked about every call; None for an open port.
        errors: Counts the calls that end with an error, by reason.
        machine: What it runs on.
        delivery: Told what became of every unary answer; None if nobody wants to know.
    """
    deadlines = CallDeadlines(machine.clock, machine.wall_clock)
    pending = settings.grpc.pending_calls(settings.budget.cap_seconds)
    return machine.grpc_server(
        interceptors=(GrpcEdge(settings.grpc.read_seconds, errors, deadlines, access, delivery),),
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
            ("grpc.server.max_pending_requests", pending),
            ("grpc.server.max_pending_requests_hard_limit", 2 * pending),
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
    health_servicer: HealthServicer,
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


def _add_standard_services(server: grpc.aio.Server, health_servicer: HealthServicer, services: tuple[str, ...]) -> None:
    """Adds health and reflection."""
    add_health: Any = health_pb2_grpc.add_HealthServicer_to_server
    add_health(health_servicer, server)
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
