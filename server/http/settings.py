"""Settings of JSON over HTTP."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, field_validator

_ORIGIN: Final = re.compile(r"https?://[a-zA-Z0-9.\-\[\]:]+")


class HttpSettings(BaseModel):
    """JSON over HTTP, for all services: docs/http.md. It speaks TLS where `tls.certificate` is set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    """Address to listen on. It must be loopback, unless both `access.decision` and `access.admin` require tokens or
    client certificates."""
    port: int | None = Field(default=None, ge=0, le=65_535)
    """Port to listen on; 0 for any free one. Unset: none, and only the edge `envoy` answers JSON, for the decision
    service, on its own port. `pretrade up` sets it, to 7004 if that is free."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call, for example `https://desk.example.com`; a JSON list. Pages of all others are
    refused, also on the decision port of the edge `envoy`."""

    @field_validator("host")
    @classmethod
    def _is_address(cls, host: str) -> str:
        if host != "localhost":
            ipaddress.ip_address(host)
        return host

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: it is scheme, host and port alone, such as https://a.example"
                )
        return origins
