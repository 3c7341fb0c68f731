"""The console as an application: its pages, its static files, and the guard in front of them."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from pretrade.client.cli.alertmanager import Alertmanager
from pretrade.client.credentials import ClientCredentials
from pretrade.console.alerts import AlertWatch
from pretrade.console.guard import HEALTH, Guard
from pretrade.console.oidc import Provider
from pretrade.console.pages.alert_rules import AlertRules
from pretrade.console.pages.alerts import Alerts
from pretrade.console.pages.decisions import Decisions
from pretrade.console.pages.login import Login
from pretrade.console.pages.market import Market
from pretrade.console.pages.models import Models
from pretrade.console.pages.overview import Overview
from pretrade.console.pages.runbook import Runbook
from pretrade.console.pages.steering import Steering
from pretrade.console.reach import Reach
from pretrade.console.rendering import Pages
from pretrade.console.sealing import KEY_BYTES
from pretrade.console.sessions import Sessions
from pretrade.console.site import Site
from pretrade.console.tickets import Tickets

_STATIC: Final = Path(__file__).parent / "static"


class _Static(StaticFiles):
    """Our own files, which a browser keeps and asks after."""

    def file_response(self, *arguments: object, **named: object) -> Response:
        """One file."""
        response = super().file_response(*arguments, **named)  # type: ignore[arg-type]  # as it is given to us
        response.headers["cache-control"] = "no-cache"
        return response


async def _health(_: Request) -> Response:
    return PlainTextResponse("the console serves\n")


class Console:
    """The console of one server.

    Args:
        address: `host:port` of the server's admin port.
        credentials: How the server is reached, and what whoever started the console shows to it.
        reach: How browsers reach it.
        link_key: What links are sealed with that log in; None for a key of its own.
        alertmanager: Who knows the alerts; None without one.
        provider: Where people may log in by OpenID Connect; None without.
    """

    def __init__(
        self,
        address: str,
        credentials: ClientCredentials,
        reach: Reach,
        *,
        link_key: bytes | None = None,
        alertmanager: Alertmanager | None = None,
        provider: Provider | None = None,
    ) -> None:
        has_own = credentials.token or credentials.token_file or credentials.certificate
        key = link_key or secrets.token_bytes(KEY_BYTES)
        self.tickets: Final = Tickets(key, time.time) if has_own else None
        self._sessions = Sessions(time.monotonic)
        site = Site(
            address, credentials, self._sessions, Pages(), self.tickets, reach.is_secure, alertmanager is not None
        )
        self._decisions = Decisions(site)
        routes: list[Route | Mount] = [
            Route(HEALTH, _health, methods=["GET"]),
            Mount("/static", _Static(directory=_STATIC)),
            *Login(site, provider).routes(),
            *Overview(site).routes(),
            *Steering(site).routes(),
            *self._decisions.routes(),
            *Market(site).routes(),
            *Models(site).routes(),
            *AlertRules(site).routes(),
            *Runbook(site).routes(),
        ]
        if alertmanager is not None:
            routes += Alerts(site, alertmanager, AlertWatch(alertmanager, time.monotonic)).routes()
        self.asgi: Final[ASGIApp] = Guard(Starlette(routes=routes), reach)

    def begin_end(self) -> None:
        """Ends the answers that would go on for ever."""
        self._decisions.end()

    async def end(self) -> None:
        """Ends every session and its connection."""
        await self._sessions.end_all()
