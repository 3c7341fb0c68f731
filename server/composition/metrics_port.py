"""Serves the metrics, on a port of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from server.telemetry.metrics import ServerCollector

if TYPE_CHECKING:
    from server.composition.audit import AuditParts
    from server.composition.process import Process
    from server.composition.request_path import Foundation, RequestPath


def serve_metrics(process: Process, base: Foundation, path: RequestPath, audit: AuditParts) -> int:
    """Serves the metrics on their own port, from a thread; returns the port.

    Raises:
        OSError: The address cannot be bound.
    """
    settings, stack = process.settings, process.stack
    registry = CollectorRegistry()
    registry.register(
        ServerCollector(
            decisions=process.metrics,
            admission=path.admission,
            idempotency=path.idempotency,
            loop_lag=base.loop_lag,
            control=path.control,
            configuration=path.configuration,
            champion=path.champion,
            chain=path.chain,
            restarts=0 if process.slot is None else process.slot.restarts,
            replicas=path.replicas,
            canary=path.canary,
            journal=base.journal,
            replies=base.replies,
            shipper=base.shipper,
            reports=path.reports,
            exporter=None if path.tracing is None else path.tracing.exporter,
            readings=audit.readings,
            drift=audit.drift,
            feature_cache=base.feature_cache,
            instruments=settings.instruments,
            security=base.security,
            clock=process.clock,
            loop=asyncio.get_running_loop(),
        )
    )
    server, thread = process.machine.http_server(settings.metrics.port, settings.metrics.host, registry)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return int(server.server_port)
