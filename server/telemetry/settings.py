"""Settings of metrics and traces, separate from the code that needs the SDKs of both."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.inference.endpoints import Endpoint
from server.security.settings import ClientTlsSettings


class MetricsSettings(BaseModel):
    """The Prometheus port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=7003, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""


class TracingSettings(BaseModel):
    """Spans of decisions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    otlp_endpoint: Endpoint | None = None
    """`host:port` of an OTLP gRPC collector. Unset: no tracing and no cost."""
    tls: ClientTlsSettings | None = None
    """TLS to the collector: a JSON object of `ca`, `certificate`, `key` (paths) and `server_name`. `{}` trusts the
    authorities that gRPC comes with. Unset: no TLS."""
    one_in: int = Field(default=100, ge=0)
    """One in this many decisions is traced whatever becomes of it, besides all that are slow, failed or degraded and
    those whose callers sampled their trace; 0: only these."""
    slow_seconds: float = Field(default=0.01, gt=0, le=10)
    """A decision that takes longer than this is traced, in seconds. Raise it if too many are."""
    max_per_second: float = Field(default=20.0, ge=1, le=100_000)
    """Most traces a second; the rest are counted as lost. A trace costs 0.5 ms of a core, and in an incident most
    decisions would be traced. Raise it if you have cores to spare."""
