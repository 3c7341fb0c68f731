"""A trace collector for one test: a real OTLP gRPC endpoint that stores the spans it is sent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class Received:
    """A span and who sent it."""

    span: trace_pb2.Span
    resource: dict[str, Any]

    @property
    def trace_id(self) -> str:
        return self.span.trace_id.hex()

    @property
    def span_id(self) -> str:
        return self.span.span_id.hex()

    @property
    def parent_id(self) -> str:
        return self.span.parent_span_id.hex()

    @property
    def attributes(self) -> dict[str, Any]:
        return values(self.span.attributes)

    @property
    def failed(self) -> bool:
        return self.span.status.code == trace_pb2.Status.STATUS_CODE_ERROR


class OtlpCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans at `address`; a context manager.

    Args:
        credentials: To speak TLS with; None for in the open.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.spans: list[Received] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        at = "127.0.0.1:0"
        port = (
            self._server.add_insecure_port(at) if credentials is None else self._server.add_secure_port(at, credentials)
        )
        self.address = f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            sender = values(resource.resource.attributes)
            self.spans.extend(Received(span, sender) for scope in resource.scope_spans for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace_id: str) -> list[Received]:
        """The spans of one trace, by their begin."""
        found = [received for received in list(self.spans) if received.trace_id == trace_id]
        return sorted(found, key=lambda received: received.span.start_time_unix_nano)


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict."""
    found = {}
    for each in attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found
