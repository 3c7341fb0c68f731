"""Serves the console on its port until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import uvicorn

from pretrade.client.cli.alertmanager import Alertmanager
from pretrade.client.credentials import ClientCredentials
from pretrade.console.application import Console
from pretrade.console.oidc import OidcSettings, Provider
from pretrade.console.pages.login import CALLBACK
from pretrade.console.reach import Reach

_GRACE_SECONDS: Final = 3
"""What pages that are being made have left once the console is to end."""
_KEEP_ALIVE_SECONDS: Final = 30
"""An open page asks every few seconds; its connection is to last."""
_MOST_AT_ONCE: Final = 500


async def serve(
    address: str,
    credentials: ClientCredentials,
    *,
    host: str,
    port: int,
    reach: Reach,
    tls: tuple[Path, Path] | None,
    link_key: bytes | None,
    alertmanager: Alertmanager | None,
    oidc: OidcSettings | None,
    announce: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM; a second one ends it at once.

    Args:
        address: `host:port` of the server's admin port.
        credentials: How the server is reached, and what whoever started the console shows to it.
        host: The address that is listened on.
        port: 0 for any free one.
        reach: How browsers reach the console.
        tls: Certificate and private key; None without TLS.
        link_key: What links are sealed with that log in, and that others make; None for a key of its own.
        alertmanager: Who knows the alerts; None without one.
        oidc: Where people may log in by OpenID Connect; None without.
        announce: Told of the URL once the console can be reached, with a ticket of its own if nobody else makes one.

    Raises:
        OSError: The port cannot be bound, or a file of TLS cannot be read.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as opened:
        scheme = "http" if tls is None else "https"
        shown = f"[{host}]" if ":" in host else host
        url = f"{reach.origin or f'{scheme}://{shown}:{opened.getsockname()[1]}'}/"
        console = Console(
            address,
            credentials,
            reach,
            link_key=link_key,
            alertmanager=alertmanager,
            provider=None if oidc is None else Provider(oidc, f"{url.rstrip('/')}{CALLBACK}", time.time),
        )
        server = _Server(
            console.begin_end,
            uvicorn.Config(
                console.asgi,
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                proxy_headers=False,  # whether there is a proxy, the public URL says, and not a header
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                limit_concurrency=_MOST_AT_ONCE,
                ssl_certfile=None if tls is None else tls[0],
                ssl_keyfile=None if tls is None else tls[1],
            ),
        )
        ticket = "" if console.tickets is None or link_key is not None else console.tickets.new()
        announce(f"{url}login?ticket={ticket}" if ticket else url)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        try:
            await server.serve([opened])
        finally:
            await console.end()


class _Server(uvicorn.Server):
    """uvicorn, whose signals are the caller's.

    Args:
        begin_end: Called once it is to end, so that no answer goes on.
        config: Of uvicorn.
    """

    def __init__(self, begin_end: Callable[[], None], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._begin_end = begin_end

    def stop(self) -> None:
        """Ends it in order; at once when it was told before."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._begin_end()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield
