"""The gRPC ports that the server listens on, and their limits."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from feature_cache.constants import Constant


class GrpcSettings(BaseModel):
    """The decision port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    edge: Literal["auto", "grpcio", "envoy"] = "grpcio"
    """Who speaks HTTP/2 with the callers: `grpcio`, which runs everywhere; `envoy`, with the server in its process:
    faster, and gRPC-Web and JSON as well; or `auto`: `envoy` where it can run. That needs Linux, the extra `envoy` and
    a Python with a shared library, and sets `processes` to 1 where it is unset."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback only, unless `access.decision` asks for credentials or
    `access.decision_open_to_network` says that none are wanted."""
    port: int = Field(default=7001, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """Port of the same address for health checks alone, without TLS and credentials: for probes that know neither, as a
    kubelet's. Unset: none."""
    max_message_bytes: int = Field(default=1_048_576, ge=1_024, le=67_108_864)
    """Largest request, in bytes; a larger one is refused with RESOURCE_EXHAUSTED."""
    max_streams_per_connection: Constant[int] = 1_024
    """Calls under way on one connection. Far more than one caller has under way at once; a bound only so that no
    connection can take all memory."""
    max_pending_calls: int = Field(default=64, ge=1, le=100_000)
    """Calls that wait to be taken up by the event loop; of more than these some, of twice as many all are refused by
    the transport, with CANCELLED. A burst needs room; in an overload all of it is waiting time, so a small machine
    wants no more than it takes up in a quarter of its callers' deadlines. With the edge `envoy`, what waits is
    bounded by `admission`, and refused like any other call beyond it."""
    handshake_seconds: float = Field(default=5.0, ge=0.1, le=120)
    """How long a new connection may take for its first bytes, in seconds; then it is closed."""
    keepalive_seconds: Constant[float] = 30.0
    """A connection on which nothing arrives for so long is pinged, and closed if it does not answer within 10 s.
    Callers' networks drop idle connections after a minute or more, and a ping costs next to nothing."""
    read_seconds: float = Field(default=5.0, gt=0, le=600)
    """How long a unary call may take to send its message, in seconds; then it ends DEADLINE_EXCEEDED."""
    drain_seconds: float = Field(default=0.2, ge=0, le=300)
    """On SIGTERM: time between NOT_SERVING and refusing new calls, in seconds, for load balancers to notice."""
    grace_seconds: float = Field(default=2.0, ge=0, le=300)
    """On SIGTERM: time calls under way get to finish, in seconds."""


class AdminSettings(BaseModel):
    """The admin port."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on; loopback only, unless `access.admin` asks for tokens or client certificates."""
    port: int = Field(default=7002, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        if host != "localhost":
            ipaddress.ip_address(host)
        return host
