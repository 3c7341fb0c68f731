"""The gRPC ports that the server listens on, and their limits."""

from __future__ import annotations

import ipaddress
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from feature_cache.constants import Constant

_TAKEN_UP_PER_SECOND: Final = 5_120
"""Calls that grpc.aio takes up in a second, on a core that has little else to do."""
_WAITING_SHARE: Final = 0.25
"""Of its allowed time that a call may wait until it is taken up."""


class GrpcSettings(BaseModel):
    """The decision port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edge: Literal["auto", "grpcio", "envoy"] = "auto"
    """What speaks HTTP/2 with the callers. `grpcio` runs everywhere. `envoy` runs the server inside Envoy: it is
    faster, and serves gRPC-Web and JSON on the same port as well (`http.port` serves JSON on both edges). It needs
    Linux, the extra `envoy` and a Python with a shared library, and sets `processes` to 1 if that is unset. `auto`
    is `envoy` where it can run, otherwise `grpcio`, and the start log says why."""
    host: str = "127.0.0.1"
    """Address to listen on. It must be loopback, unless `access.decision` requires credentials or
    `access.decision_open_to_network` allows callers without."""
    port: int = Field(default=7001, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """Port on the same address for health checks alone, without TLS and credentials. Set it for probes that have
    neither, such as a kubelet's. Unset: none."""
    max_message_bytes: int = Field(default=1_048_576, ge=1_024, le=67_108_864)
    """Largest request, in bytes; a larger one is refused with RESOURCE_EXHAUSTED. Raise it for large batches."""
    max_streams_per_connection: Constant[int] = 1_024
    """Calls under way on one connection. Far more than one caller has under way at once; a bound only so that no
    connection can take all memory."""
    max_pending_calls: int | None = Field(default=None, ge=1, le=100_000)
    """Calls that may wait for the event loop. Beyond this number the transport refuses some calls with CANCELLED,
    beyond twice this number all. Bursts need room, but in an overload all of it becomes waiting time. Set it to no more
    than the server takes up in a quarter of its callers' deadlines. Unset: what a core takes up in a quarter of
    `budget.cap_seconds`, which is 64 for the default of 50 ms. The edge `envoy` ignores it: `admission` bounds its
    waiting calls."""
    handshake_seconds: Constant[float] = 5.0
    """How long a new connection may take to send its first bytes, in seconds; then it is closed. Real callers need
    milliseconds, or a second after lost packets; connections that send nothing should not stay."""
    keepalive_seconds: Constant[float] = 30.0
    """A connection on which nothing arrives for so long is pinged, and closed if it does not answer within 10 s.
    Callers' networks drop idle connections after a minute or more, and a ping costs next to nothing."""
    read_seconds: float = Field(default=5.0, gt=0, le=600)
    """How long a unary call may take to send its message, in seconds; after that it ends with DEADLINE_EXCEEDED. Raise
    it for callers on very slow networks."""
    drain_seconds: float = Field(default=0.2, ge=0, le=300)
    """On SIGTERM: time between NOT_SERVING and refusing new calls, in seconds. Set it to the time that your load
    balancer takes to notice."""
    grace_seconds: float = Field(default=2.0, ge=0, le=300)
    """On SIGTERM: time that calls under way get to finish, in seconds. Raise it if callers use deadlines or streams
    that are longer."""

    def pending_calls(self, cap_seconds: float) -> int:
        """`max_pending_calls`, or what fits a server that allows an order so many seconds."""
        return self.max_pending_calls or max(1, round(_WAITING_SHARE * cap_seconds * _TAKEN_UP_PER_SECOND))


class AdminSettings(BaseModel):
    """The admin port."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. It must be loopback, unless `access.admin` requires tokens or client certificates."""
    port: int = Field(default=7002, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        if host != "localhost":
            ipaddress.ip_address(host)
        return host
