"""Connections of callers in Python, with the same credentials from the environment as the `pretrade` command."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from pretrade.decision.v1 import decision_pb2_grpc

_CONNECT_SECONDS: Final = 10.0
_VARIABLE: Final = "PRETRADE_CLIENT_"


@asynccontextmanager
async def connected(address: str, *, ready: bool = True) -> AsyncIterator[decision_pb2_grpc.DecisionServiceAsyncStub]:
    """A stub of the decision service at `HOST:PORT`, over TLS where the environment names an authority.

    `PRETRADE_CLIENT_CA`, `_CERTIFICATE`, `_KEY` and `_TLS_NAME` are of TLS; `_TOKEN_FILE` or `_TOKEN` goes with every
    call.

    Args:
        address: `HOST:PORT`.
        ready: Whether to wait for the connection; the first call tells otherwise.

    Raises:
        RuntimeError: There is no connection within the time allowed, or the credentials cannot be used.
    """
    # Channels to one address share a connection otherwise, and a round would inherit the last one's.
    options: list[tuple[str, object]] = [("grpc.use_local_subchannel_pool", 1)]
    credentials, token = _credentials()
    if credentials is None:
        opening = grpc.aio.insecure_channel(address, options=options)
    else:
        if name := os.environ.get(f"{_VARIABLE}TLS_NAME"):
            options.append(("grpc.ssl_target_name_override", name))
        opening = grpc.aio.secure_channel(address, credentials, options=options)
    async with opening as channel:
        try:
            if ready:
                await asyncio.wait_for(channel.channel_ready(), _CONNECT_SECONDS)
        except TimeoutError:
            raise RuntimeError(f"no connection to {address} within {_CONNECT_SECONDS:g} s") from None
        shown: Any = _Showing(channel, token) if token else channel
        yield decision_pb2_grpc.DecisionServiceStub(shown)


class _Showing:
    """What a stub needs of a channel; every call shows a token.

    gRPC's own call credentials would do the same, but they are Python code that gRPC ends on a thread of its own. That
    waits for the interpreter, which may wait for this very thread at that moment: whoever closes the last channel or
    server of the process holds it, and waits in C for gRPC's threads. Nothing ends such a process but SIGKILL.
    """

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self._channel = channel
        self._metadata = (("authorization", f"Bearer {token}"),)

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """As the channel's."""
        return partial(self._channel.unary_unary(*arguments, **options), metadata=self._metadata)

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """As the channel's."""
        return partial(self._channel.stream_stream(*arguments, **options), metadata=self._metadata)


def _credentials() -> tuple[grpc.ChannelCredentials | None, str]:
    """Those of the environment: of TLS, None for an open connection, and a token, empty for none."""
    try:
        ca, certificate, key, token_file = (_file(name) for name in ("CA", "CERTIFICATE", "KEY", "TOKEN_FILE"))
    except OSError as error:
        raise RuntimeError(f"credentials: {error}") from error
    token = os.environ.get(f"{_VARIABLE}TOKEN") or (token_file.decode().strip() if token_file else "")
    if ca is None:
        if token:
            raise RuntimeError("a token is not sent without TLS: name the authority (--tls-ca)")
        return None, ""
    return grpc.ssl_channel_credentials(ca, key, certificate), token


def _file(name: str) -> bytes | None:
    path = os.environ.get(f"{_VARIABLE}{name}")
    return Path(path).read_bytes() if path else None
