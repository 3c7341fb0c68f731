"""Serves the metrics, on a port of their own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry

from feature_cache.store import metrics as features
from server import configuration
from server.audit import metrics as audits
from server.canary import metrics as canaries
from server.control import metrics as controls
from server.decision import metrics as decisions
from server.drift import metrics as drifts
from server.inference import metrics as models
from server.journal import metrics as journals
from server.models import metrics as embedded
from server.process import metrics as processes
from server.rpc import metrics as calls
from server.security import metrics as securities
from server.telemetry import metrics as exports
from server.timing import metrics as timings

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.composition.audit import AuditParts
    from server.composition.process import Process
    from server.composition.request_path import Foundation, RequestPath
    from server.composition.servicers import Servicers

METRICS: Final = tuple(
    itertools.chain(
        decisions.METRICS,
        models.METRICS,
        embedded.METRICS,
        canaries.METRICS,
        controls.METRICS,
        configuration.METRICS,
        journals.METRICS,
        audits.METRICS,
        features.METRICS,
        securities.METRICS,
        exports.METRICS,
        drifts.METRICS,
        timings.METRICS,
        processes.METRICS,
        calls.METRICS,
    )
)
"""Every metric of the decision server; `docs/metrics.md` is made from this."""


def serve_metrics(
    process: Process, base: Foundation, path: RequestPath, audit: AuditParts, servicers: Servicers
) -> int:
    """Serves the metrics on their own port, from a thread; returns the port.

    Raises:
        OSError: The address cannot be bound.
    """
    settings, stack = process.settings, process.stack
    registry = CollectorRegistry()
    registry.register(exports.Metrics(_components(process, base, path, audit, servicers)))
    server, thread = process.machine.http_server(settings.metrics.port, settings.metrics.host, registry)
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return int(server.server_port)


def _components(
    process: Process, base: Foundation, path: RequestPath, audit: AuditParts, servicers: Servicers
) -> tuple[Callable[[], Iterator[Metric]], ...]:
    """What yields the metrics of each component."""
    named, restarts = path.models, 0 if process.slot is None else process.slot.restarts
    canaries_of = [(one.name, one.canary.routing, one.canary.rollout, one.canary.objective) for one in named]
    embedded_of = [(one.name, one.embedded.model, one.embedded.stage, one.embedded.check) for one in named]
    return (
        partial(decisions.of_decisions, process.metrics),
        partial(decisions.of_chain, path.chain),
        partial(decisions.of_admission, path.admission),
        partial(decisions.of_idempotency, path.idempotency),
        partial(decisions.of_replies, base.replies, base.journal),
        partial(decisions.of_sets, path.other_sets, process.settings.instruments, process.clock),
        partial(decisions.of_reports, path.reports),
        partial(models.of_replicas, path.replicas.values()),
        partial(models.of_attempts, [one.champion for one in named]),
        partial(models.of_shadow, [one.canary.shadow for one in named]),
        partial(embedded.of_embedded, embedded_of),
        partial(embedded.of_expiry, path.replicas.values(), path.expiry),
        partial(embedded.of_map, [one.name for one in named], path.model_map),
        partial(canaries.of_pairs, {one.name: one.canary.recorder for one in named}),
        partial(canaries.of_canary, canaries_of),
        partial(controls.of_control, path.control),
        partial(controls.of_alerts, path.alerts, base.feature_cache, process.settings.instruments),
        path.configuration.metrics,
        partial(journals.of_journal, base.journal),
        partial(audits.of_shipping, base.shipper),
        partial(audits.of_reading, audit.reading, audit.questions),
        partial(audits.of_watch, audit.watch),
        partial(features.of_features, base.feature_cache, process.settings.instruments, process.clock),
        base.security.metrics,
        partial(exports.of_spans, None if path.tracing is None else path.tracing.exporter),
        lambda: drifts.of_drift(audit.drift.states),
        partial(calls.of_watchers, servicers.audit, servicers.signals, servicers.market),
        partial(timings.of_loop_lag, base.loop_lag),
        partial(processes.of_process, restarts, process.settings.grpc.edge, asyncio.get_running_loop()),
    )
