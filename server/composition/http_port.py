"""Wires JSON over HTTP: on the HTTP port with all services, and on Envoy's decision port with the decision service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.http.application import HttpApplication, Limits
from server.http.asgi import Lateness
from server.http.methods import Methods
from server.http.pages import open_pages
from server.http.port import HttpPort
from server.rpc.admin import SERVICE as ADMIN
from server.rpc.audit import SERVICE as AUDIT
from server.rpc.decision import SERVICE as DECISION

if TYPE_CHECKING:
    from server.composition.process import Process
    from server.composition.request_path import RequestPath
    from server.composition.servicers import Servicers
    from server.security.security import Security

_HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


def decision_application(
    process: Process, security: Security, path: RequestPath, servicers: Servicers
) -> HttpApplication:
    """What answers the calls to Envoy's decision port that are not gRPC: decisions, and what is for everybody.

    Administration and audit stay off this port, which may be open to a network that theirs is not.
    """
    return _application(process, security, path, servicers, _decision_methods(servicers))


async def open_http_port(
    process: Process, security: Security, path: RequestPath, servicers: Servicers
) -> tuple[int, Callable[[float], Awaitable[None]]]:
    """Opens the HTTP port, where there is to be one; returns it and what makes its callers go elsewhere.

    Raises:
        OSError: The address cannot be bound.
    """
    settings = process.settings
    if settings.http.port is None:
        return 0, _nobody
    methods = _decision_methods(servicers)
    servicers.add_admin_to(methods)
    methods.add_watch(f"/{ADMIN}/WatchFeatures", servicers.signals.watch_json)
    methods.add_watch(f"/{AUDIT}/WatchDecisions", servicers.audit.watch_json)
    application = _application(process, security, path, servicers, methods)
    port = HttpPort(application, process.clock, security.http_context())
    opened, number = port.bind(settings.http.host, settings.http.port, is_shared=settings.processes is not None)
    await process.background(port.run(opened), "http")
    return number, port.refuse


def _decision_methods(servicers: Servicers) -> Methods:
    methods: Any = Methods()  # as generated code sees it, a server
    servicers.decision.add_to_application(methods)
    add_health: Any = health_pb2_grpc.add_HealthServicer_to_server
    add_health(servicers.health, methods)
    return methods  # type: ignore[no-any-return]


def _application(
    process: Process, security: Security, path: RequestPath, servicers: Servicers, methods: Methods
) -> HttpApplication:
    settings = process.settings
    routes = list(methods.routes())
    return HttpApplication(
        routes,
        open_pages(servicers.health.is_serving, [path.path for path, _ in routes]),
        {
            f"/{DECISION}": security.access("decision"),
            f"/{ADMIN}": security.access("admin"),
            f"/{AUDIT}": security.access("admin"),
            f"/{_HEALTH}": None,
        },
        Limits(settings.grpc.max_message_bytes, settings.grpc.read_seconds, frozenset(settings.http.cors_origins)),
        Lateness(process.metrics, process.clock, process.machine.wall_clock, path.admission.dropped),
        servicers.decision,
        process.metrics,
    )


async def _nobody(_grace_seconds: float) -> None:
    """There are no callers to go elsewhere."""
