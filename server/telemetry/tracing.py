"""Spans of decisions with OpenTelemetry, made when a decision is over; off unless a collector is named.

A decision's spans are written from its ledger. The ledger knows what every stage took, so nothing is measured twice and
the decision path carries no tracer. OpenTelemetry's server interceptor would have to make a span of every call before
it is known whether the span is worth keeping. Here the choice of what is slow, failed or degraded is made at the end
(see `server/decision/reports.py`), and it is the same on both edges::

    pretrade.decision.v1.DecisionService/Decide   (server; child of the caller's span)
    ├── admission
    ├── features
    ├── primary      (client; ERROR: timeout)
    ├── secondary    (client; its call carried this span's context to TorchServe, or links to the batch's that did)
    ├── guards
    └── audit

Calls to model servers carry the contexts of orders whose trace was known before: the caller sent it, or the order is
the one in so many that is traced whatever becomes of it (`server/rpc/call_context.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from fallback import embedded
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.reports import Report, Sink
from server.security.client_tls import ClientTls
from server.telemetry.settings import TracingSettings

if TYPE_CHECKING:
    from fallback.order import Attempt, Case

_NAME: Final = "pretrade.decision.v1.DecisionService/Decide"
_KEPT: Final = TraceFlags(TraceFlags.SAMPLED)
_MODEL_STAGES: Final = {
    pb.STAGE_PRIMARY: "primary",
    pb.STAGE_SECONDARY: "secondary",
    pb.STAGE_CANARY: "challenger",
    pb.STAGE_EMBEDDED: embedded.NAME,
}
"""The role that is asked in a stage."""
_FLUSH_MILLISECONDS: Final = 1_000


class Tracing:
    """A running tracer.

    Attributes:
        sink: Where the reports go.
        exporter: Counts what the collector took.
    """

    def __init__(self, settings: TracingSettings, instance_id: str, wall_clock: Callable[[], float]) -> None:
        assert settings.otlp_endpoint is not None
        self.tls = None if settings.tls is None else ClientTls("the collector", settings.tls, wall_clock)
        self.exporter = CountingExporter(partial(_exporter, settings.otlp_endpoint, self.tls), self.tls)
        self._ids = _ChosenIds()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,  # the choice was made before
            resource=Resource.create({"service.name": "pretrade", "service.instance.id": instance_id}),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self.exporter, schedule_delay_millis=500, export_timeout_millis=_FLUSH_MILLISECONDS)
        )
        self._tracer = self._provider.get_tracer("pretrade")
        self.sink = Sink(
            "traces",
            self.write,
            one_in=0,  # chosen before they are decided
            slow_seconds=settings.slow_seconds,
            follows_traces=True,
            max_per_second=settings.max_per_second,
        )

    def close(self) -> None:
        """Exports what waits, for a second at most."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()

    def write(self, report: Report) -> None:
        """Makes the spans of one report."""
        context, offset_ns = report.context, report.ended_wall_ns - int(report.ended * 1e9)
        trace_id = int(context.trace_id, 16)
        parent = SpanContext(trace_id, int(context.span_id, 16), True, _KEPT) if context.span_id else None
        self._ids.trace_id = trace_id
        root = self._tracer.start_span(
            _NAME,
            trace.set_span_in_context(trace.NonRecordingSpan(parent)) if parent else Context(),
            SpanKind.SERVER,
            attributes=_attributes(report),
            start_time=offset_ns + int(report.arrived * 1e9),
        )
        if report.error:
            root.set_status(Status(StatusCode.ERROR, report.error))
        if report.case is not None:
            within = trace.set_span_in_context(root)
            self._write_stages(within, report.case, trace_id, offset_ns)
        root.end(report.ended_wall_ns)

    def _write_stages(self, within: Context, case: Case, trace_id: int, offset_ns: int) -> None:
        """A span for every stage of the ledger. They do not overlap: each begins where the one before ended."""
        attempts = list(case.attempts)
        began = case.budget.arrived
        for stage, allowed, used, skipped in case.budget.uses:
            role = _MODEL_STAGES.get(stage, "")
            attempt = None if skipped else next((one for one in attempts if _serves(one.replica, role)), None)
            attributes: dict[str, str | int] = {"pretrade.allowed_us": int(1e6 * allowed)}
            if skipped:
                attributes["pretrade.skipped"] = enum_name(pb.Degradation, skipped)
            if attempt is not None:
                attempts.remove(attempt)
                attributes |= _attempt_attributes(attempt)
                self._ids.span_id = int(attempt.span_id, 16) if attempt.span_id else 0
            span = self._tracer.start_span(
                enum_name(pb.Stage, stage).lower(),
                within,
                SpanKind.INTERNAL if attempt is None or role == embedded.NAME else SpanKind.CLIENT,
                attributes=attributes,
                links=() if attempt is None else _links(attempt, trace_id),
                start_time=offset_ns + int(began * 1e9),
            )
            if attempt is not None and attempt.outcome not in {"success", "ignored"}:
                span.set_status(Status(StatusCode.ERROR, attempt.outcome))
            began += used
            span.end(offset_ns + int(began * 1e9))


def _serves(replica: str, role: str) -> bool:
    """Whether a replica is the one that serves a role, or one of several."""
    return replica == role or replica.startswith(f"{role}-")


class CountingExporter(SpanExporter):
    """An exporter that counts what its collector took, and reconnects when its certificates change.

    Args:
        connect: Makes the exporter that does the work.
        tls: The certificates; None without.
    """

    def __init__(self, connect: Callable[[], SpanExporter], tls: ClientTls | None = None) -> None:
        self._connect = connect
        self._tls = tls
        self._exporter = connect()
        self.exported = 0
        """Spans that the collector took."""
        self.failed = 0
        """Spans that it did not."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Exports, on the SDK's own thread."""
        if self._tls is not None and self._tls.look():
            self._exporter.shutdown()
            self._exporter = self._connect()
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self.exported += len(spans)
        else:
            self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        """Ends the connection."""
        self._exporter.shutdown()


class _ChosenIds(IdGenerator):
    """Ids that were given away before there was a span: to TorchServe, the journal and the log. Used by one thread."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self.trace_id = 0
        """Of the next root."""
        self.span_id = 0
        """Of the next span; 0 for any."""

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        chosen, self.span_id = self.span_id, 0
        return chosen or self._random.generate_span_id()


@contextmanager
def open_tracing(
    settings: TracingSettings, instance_id: str, wall_clock: Callable[[], float] = time.time
) -> Iterator[Tracing | None]:
    """The tracer while the context is open; None where no collector is named.

    Raises:
        OSError: Certificates cannot be read, or are no good.
    """
    if settings.otlp_endpoint is None:
        yield None
        return
    tracing = Tracing(settings, instance_id, wall_clock)
    try:
        with tracing.sink:
            yield tracing
    finally:
        tracing.close()


def _exporter(endpoint: str, tls: ClientTls | None) -> OTLPSpanExporter:
    if tls is None:
        return OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=1)
    options: Any = tuple(tls.options())  # its types say that there is exactly one
    return OTLPSpanExporter(
        endpoint=endpoint, insecure=False, credentials=tls.credentials(), timeout=1, channel_options=options
    )


def _attributes(report: Report) -> dict[str, str | int | list[str]]:
    """The attributes to search traces by; neither quantity nor price."""
    attributes: dict[str, str | int | list[str]] = {
        "rpc.system": "grpc",
        "pretrade.cause": report.cause,
        "pretrade.order_ref": report.order.order_ref[:64],
        "pretrade.instrument": report.order.instrument[:64],
        "pretrade.strategy": report.order.strategy[:64],
    }
    if report.context.correlation_id:
        attributes["pretrade.correlation_id"] = report.context.correlation_id
    if report.case is not None:
        attributes["pretrade.degradations"] = [enum_name(pb.Degradation, each) for each in report.case.degradations]
    if report.decision is not None:
        attributes["pretrade.decision_id"] = report.decision.decision_id
        attributes["pretrade.action"] = enum_name(pb.Action, report.decision.action)
        attributes["pretrade.source"] = enum_name(pb.Source, report.decision.source)
    return attributes


def _attempt_attributes(attempt: Attempt) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {"pretrade.outcome": attempt.outcome}
    if attempt.model_version:
        attributes["pretrade.model_version"] = attempt.model_version
        attributes["pretrade.batch_rows"] = attempt.batch_rows
    if not math.isnan(attempt.queued_seconds):
        attributes["pretrade.queued_us"] = int(1e6 * attempt.queued_seconds)
    return attributes


def _links(attempt: Attempt, trace_id: int) -> tuple[Link, ...]:
    """To the attempt whose context the batch's call carried, where that is another one."""
    if not attempt.call_parent:
        return ()
    _, carrier_trace, carrier_span, _ = attempt.call_parent.split("-")
    if (int(carrier_trace, 16), carrier_span) == (trace_id, attempt.span_id):
        return ()
    return (Link(SpanContext(int(carrier_trace, 16), int(carrier_span, 16), True, _KEPT)),)
