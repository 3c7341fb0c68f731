"""Credentials of the `pretrade` command and of other programs here that call a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from pretrade.client import operator_token, retries
from pretrade.client.addresses import is_local
from pretrade.client.credential_variables import CA, CERTIFICATE, KEY, TLS_NAME, TOKEN, TOKEN_FILE
from pretrade.client.errors import CredentialsError


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """What a caller shows, and whom it believes."""

    ca: Path | None = None
    """Authorities of servers, in PEM; with it every connection is TLS."""
    certificate: Path | None = None
    """Its own certificate."""
    key: Path | None = None
    """That certificate's private key."""
    tls_name: str | None = None
    """The name in the server's certificate, where it is not the host's."""
    token_file: Path | None = None
    """Its token; read for every call, so that it may be replaced."""
    token: str | None = None
    """The token itself, where it is in no file."""
    current_token: Callable[[], str] | None = None
    """What tells the token, where it changes and is in no file; asked for every call."""

    def __repr__(self) -> str:
        return f"ClientCredentials(ca={self.ca}, certificate={self.certificate}, token_file={self.token_file})"

    @classmethod
    def from_environment(cls) -> ClientCredentials:
        """Those that the variables name."""

        def path(name: str) -> Path | None:
            return Path(value) if (value := os.environ.get(name)) else None

        return cls(
            path(CA),
            path(CERTIFICATE),
            path(KEY),
            os.environ.get(TLS_NAME) or None,
            path(TOKEN_FILE),
            os.environ.get(TOKEN) or None,
        )

    def with_changes(self, changes: Mapping[str, Any]) -> ClientCredentials:
        """These, but for what is named here."""
        return replace(self, **changes)

    def or_operator_token(self, address: str, token_file: Path | None = None) -> ClientCredentials:
        """These, and for an admin port of this machine its operator token, where nothing else is shown to it.

        Args:
            address: `host:port`.
            token_file: The token's file; None for that of a server in this directory or with this environment.
        """
        if self.ca or self.has_token or not is_local(address):
            return self
        path = token_file or operator_token.path_from()
        return replace(self, token_file=path) if path.is_file() else self

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A channel to `host:port`, whose calls for decisions are made again as `retries` says.

        Raises:
            CredentialsError: A file cannot be read, or a token would travel in the open.
        """
        channel = self.plain_channel(address, [*retries.OPTIONS, *options])
        if self.has_token:
            return grpc.intercept_channel(channel, _Bearer(self._bearer))
        return channel

    def plain_channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel that neither asks again nor shows the token, which goes with `metadata`.

        Raises:
            CredentialsError: As `channel`.
        """
        self._check_open(address)
        if self.ca is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, self._tls(self.ca), [*self._name_option, *options])

    def plain_aio_channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """The same for asyncio.

        Raises:
            CredentialsError: As `channel`.
        """
        self._check_open(address)
        if self.ca is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, self._tls(self.ca), [*self._name_option, *options])

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What shows the token in a call; nothing where there is none. A token's file is read anew every time.

        Raises:
            CredentialsError: The file cannot be read.
        """
        return (("authorization", f"Bearer {self._bearer()}"),) if self.has_token else ()

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """The same for asyncio; its calls have one request each.

        Raises:
            CredentialsError: As `channel`.
        """
        shown: list[grpc.aio.ClientInterceptor] = []
        self._check_open(address)
        if self.has_token:
            shown = [_AioBearer(self._bearer), _AioStreamBearer(self._bearer)]
        if self.ca is None:
            return grpc.aio.insecure_channel(address, interceptors=shown)
        return grpc.aio.secure_channel(address, self._tls(self.ca), self._name_option, interceptors=shown)

    @property
    def has_token(self) -> bool:
        """Whether a token is shown."""
        return bool(self.token or self.token_file or self.current_token)

    @property
    def _name_option(self) -> list[tuple[str, Any]]:
        return [("grpc.ssl_target_name_override", self.tls_name)] if self.tls_name else []

    def _check_open(self, address: str) -> None:
        """Refuses to send a token over a network in the open."""
        if self.has_token and self.ca is None and not is_local(address):
            raise CredentialsError(f"a token is not sent to {address} without TLS: name the authority (--tls-ca)")

    def _tls(self, ca: Path) -> grpc.ChannelCredentials:
        try:
            key = None if self.key is None else self.key.read_bytes()
            certificate = None if self.certificate is None else self.certificate.read_bytes()
            return grpc.ssl_channel_credentials(ca.read_bytes(), key, certificate)
        except OSError as error:
            raise CredentialsError(str(error)) from error

    def _bearer(self) -> str:
        if self.current_token is not None:
            return self.current_token()
        if self.token is not None:
            return self.token
        assert self.token_file is not None
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise CredentialsError(str(error)) from error


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds the token to every call. Call credentials of gRPC's own would not go over loopback without TLS."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = (*(details.metadata or ()), ("authorization", f"Bearer {self._token()}"))
        with_token = _Details(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
        return continuation(with_token, request)

    intercept_unary_unary = _call  # type: ignore[assignment]  # one body for four signatures
    intercept_unary_stream = _call  # type: ignore[assignment]
    intercept_stream_unary = _call  # type: ignore[assignment]
    intercept_stream_stream = _call  # type: ignore[assignment]


class _AioBearer(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds the token to every call with one answer."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_token(client_call_details, self._token()), request)


class _AioStreamBearer(grpc.aio.UnaryStreamClientInterceptor):
    """Adds the token to every call with a stream of answers."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: grpc.aio.ClientCallDetails, request: Any
    ) -> Any:
        return await continuation(_with_token(client_call_details, self._token()), request)


def _with_token(details: Any, token: str) -> Any:
    return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), ("authorization", f"Bearer {token}")))
