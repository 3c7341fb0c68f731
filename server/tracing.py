"""Spans of calls with OpenTelemetry, off unless a collector is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import grpc.aio
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from server.settings import TracingSettings


@contextmanager
def server_interceptors(settings: TracingSettings, instance_id: str) -> Iterator[Sequence[grpc.aio.ServerInterceptor]]:
    """Interceptors that make a span of every call and take the caller's W3C context; none when tracing is off.

    Spans are exported by a thread of the SDK with a bounded queue: a collector that is slow or down loses spans and
    delays no call. Leaving the context flushes for a second at most.
    """
    if settings.otlp_endpoint is None:
        yield ()
        return
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
        resource=Resource.create({"service.name": "pretrade", "service.instance.id": instance_id}),
    )
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=True, timeout=1)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield (aio_server_interceptor(tracer_provider=provider),)  # type: ignore[no-untyped-call]  # untyped package
    finally:
        provider.force_flush(1_000)
        provider.shutdown()
