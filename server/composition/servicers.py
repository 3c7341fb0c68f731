"""Builds who answers the calls: the same servicers on every port and for every protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_cache.store.books import BookReader
from feature_cache.store.report import ReportReader
from pretrade.admin.v1 import admin_pb2_grpc
from server.decision.convert import OrderReader
from server.rpc.admin import AdminServicer, RecordParts, ServingParts
from server.rpc.alerts import AlertSteering
from server.rpc.call_context import CallContexts
from server.rpc.canary import CanarySteering
from server.rpc.decision import DecisionServicer
from server.rpc.feature_status import MarketParts
from server.rpc.market import MarketReading
from server.rpc.models import ModelSteering, SteeredModel
from server.rpc.signals import Signals
from server.rpc.steering import Steering

if TYPE_CHECKING:
    from server.composition.audit import AuditParts
    from server.composition.process import Process
    from server.composition.request_path import Foundation, RequestPath
    from server.process.health import Health
    from server.rpc.audit import AuditServicer
    from server.rpc.health import HealthServicer


@dataclass(frozen=True, slots=True)
class Servicers:
    """Who answers, by service."""

    decision: DecisionServicer
    admin: AdminServicer
    audit: AuditServicer
    health: HealthServicer
    signals: Signals
    market: MarketReading

    def add_admin_to(self, server: Any) -> None:
        """Serves administration and audit."""
        add_admin: Any = admin_pb2_grpc.add_AdminServiceServicer_to_server  # its servicers get a context of gRPC's
        add_admin(self.admin, server)
        self.audit.add_to(server)


def open_servicers(
    process: Process,
    base: Foundation,
    path: RequestPath,
    audit: AuditParts,
    health_state: Health,
    health: HealthServicer,
) -> Servicers:
    """Builds all of them."""
    settings = process.settings
    decision = DecisionServicer(
        path.dataplane,
        OrderReader(settings.instruments),
        process.metrics,
        settings.stream,
        CallContexts(0 if path.tracing is None else settings.tracing.one_in),
        path.reports,
        audit.explaining,
        process.clock,
        base.security.orders,
    )
    signals = Signals(
        base.feature_cache,
        path.other_sets.caches,
        settings.instruments,
        settings.features.max_age_seconds,
        audit.lookups,
        process.clock,
        process.machine.wall_clock_ns,
    )
    market = MarketReading(settings.instruments, audit.bars, BookReader(base.feature_store))
    admin = AdminServicer(
        control=path.control,
        configuration=path.configuration,
        steering=Steering(path.control, path.replicas),
        models=_steered(process, path),
        alerts=AlertSteering(path.control, path.alerts),
        serving=ServingParts(
            process.instance_id, health_state, process.metrics, path.admission, process.slot, process.clock
        ),
        market=MarketParts(
            base.feature_cache,
            ReportReader(base.feature_store),
            settings.instruments,
            settings.features.max_age_seconds,
            path.other_sets,
        ),
        records=RecordParts(audit.servicer.changes, base.journal, lambda: base.shipper.unshipped, audit.drift),
        signals=signals,
        market_reading=market,
    )
    return Servicers(decision, admin, audit.servicer, health, signals, market)


def _steered(process: Process, path: RequestPath) -> ModelSteering:
    """What steers the models and the map that chooses one."""
    steered = {
        model.name: SteeredModel(
            CanarySteering(
                model.canary.rollout,
                model.canary.deployment,
                path.control,
                model.replicas,
                process.settings.canary.steps,
                process.new_id,
                process.machine.wall_clock,
                path.expiry,
                model.name,
            ),
            model.embedded.model,
        )
        for model in path.models
    }
    return ModelSteering(path.control, path.model_map, steered, process.settings.instruments)
