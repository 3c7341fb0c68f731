"""TLS to the servers that this one calls: model servers, and the collector of traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio

from server.security.settings import ClientTlsSettings
from server.security.tls import certificates_in, check_pair
from server.security.watched import Watched

_NAME_OPTION: Final = "grpc.ssl_target_name_override"
_WARN_DAYS: Final = 14.0
_DAY_SECONDS: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class ClientMaterial:
    """Whom a client believes and what it shows of itself, checked."""

    ca: bytes | None
    chain: bytes | None
    key: bytes | None
    expires_at: float
    """Unix seconds; that of the first of our own chain to expire, infinite without one."""

    def __repr__(self) -> str:
        return f"ClientMaterial(expires_at={self.expires_at})"  # never the key


class ClientTls:
    """Opens connections to one server, with certificates from files that may be replaced at any time.

    A gRPC channel in Python uses the credentials that it was opened with. The owner of a channel therefore opens
    another one when `look` says that the files have changed.

    Args:
        name: Of the server, for the log and the metrics.
        settings: Name the files.
        wall_clock: Seconds since the Unix epoch.
        host: The name that all of the server's addresses were found by; empty where addresses have it.

    Raises:
        OSError: A file cannot be read, or is invalid.
    """

    def __init__(self, name: str, settings: ClientTlsSettings, wall_clock: Callable[[], float], host: str = "") -> None:
        self._name = name
        self._host = host
        self._settings = settings
        self._wall_clock = wall_clock
        named = {"ca": settings.ca, "certificate": settings.certificate, "key": settings.key}
        given = {what: path for what, path in named.items() if path is not None}

        def made(*contents: bytes) -> ClientMaterial:
            return _material(**dict(zip(given, contents, strict=True)))

        try:
            self.files = Watched(f"tls of {name}", tuple(given.values()), made)
        except ValueError as error:
            raise OSError(f"TLS to {name}: {error}") from error

    @property
    def problem(self) -> str:
        """What is wrong with the files, or soon will be; empty when nothing is."""
        if self.files.problem:
            return f"TLS to {self._name}: {self.files.problem}"
        days = (self.files.value.expires_at - self._wall_clock()) / _DAY_SECONDS
        if days > _WARN_DAYS:
            return ""
        return f"TLS to {self._name}: our certificate " + (f"expires in {days:.1f} days" if days > 0 else "has expired")

    def look(self) -> bool:
        """Reads the files; True when they have changed and are valid. Keeps using the last valid ones. Blocks."""
        return self.files.look()

    def credentials(self) -> grpc.ChannelCredentials:
        """What a new connection is made with."""
        now = self.files.value
        return grpc.ssl_channel_credentials(now.ca, now.key, now.chain)

    def options(self, host: str = "") -> list[tuple[str, Any]]:
        """Options of a channel: the name that the server's certificate must have, where it is not the address's host.

        Args:
            host: The name that the address was found by; empty where the address has it.
        """
        name = self._settings.server_name or self._host or host
        return [(_NAME_OPTION, name)] if name else []

    def channel(
        self,
        address: str,
        *,
        options: Sequence[tuple[str, Any]] = (),
        interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
        host: str = "",
    ) -> grpc.aio.Channel:
        """A channel to `host:port`, with the files as they are now; `host` as for `options`."""
        return grpc.aio.secure_channel(address, self.credentials(), [*options, *self.options(host)], None, interceptors)


def _material(ca: bytes | None = None, certificate: bytes | None = None, key: bytes | None = None) -> ClientMaterial:
    """Checks that the files are what they should be and belong together.

    Raises:
        ValueError: They are not, or do not.
    """
    if ca is not None:
        certificates_in(ca, "ca")
    expires_at = float("inf")
    if certificate is not None and key is not None:
        expires_at = min(one.not_valid_after_utc.timestamp() for one in check_pair(certificate, key))
    return ClientMaterial(ca, certificate, key, expires_at)
