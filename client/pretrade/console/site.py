"""What all pages need: who is logged in, what an answer looks like, and what becomes of a call that fails."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

import grpc
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from pretrade.client.credentials import ClientCredentials
from pretrade.console.calls import CallFailedError
from pretrade.console.rendering import Pages
from pretrade.console.sessions import Session, Sessions
from pretrade.console.tickets import Tickets

_ENDED: Final = "/login?ended=1"
HTTP: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.UNAVAILABLE: 503,
}

Handler = Callable[[Request], Awaitable[Response]]
Page = Callable[[Request, Session], Awaitable[Response]]


class Place(NamedTuple):
    """A page that the navigation leads to."""

    path: str
    title: str
    needs: tuple[str, str] | None
    """The method that its content needs, and the method's service."""


_PLACES: Final = (
    Place("/", "Overview", None),
    Place("/decisions", "Decisions", ("ListDecisions", "AuditService")),
    Place("/market", "Market", ("ListBars", "AdminService")),
    Place("/models", "Models", ("GetStatus", "AdminService")),
    Place("/alerts", "Alerts", ("GetStatus", "AdminService")),
    Place("/runbook", "Runbook", None),
)


@dataclass(frozen=True, slots=True)
class Site:
    """The parts that all pages share."""

    address: str
    """`host:port` of the server's admin port."""
    credentials: ClientCredentials
    """How servers are reached: the authority for their certificates, and what the command itself would show."""
    sessions: Sessions
    pages: Pages
    tickets: Tickets | None
    """None where the command has no credentials of its own."""
    is_secure: bool
    """Whether browsers reach the console by TLS."""
    has_alerts: bool = False
    """Whether there is an Alertmanager to ask."""

    @property
    def cookie(self) -> str:
        """The cookie's name. A browser takes one with this prefix from no other host of the domain."""
        return "__Host-pretrade" if self.is_secure else "pretrade"

    async def session_of(self, request: Request) -> Session | None:
        """Who is logged in; None when nobody is."""
        return await self.sessions.find(request.cookies.get(self.cookie, ""))

    def show(self, session: Session, name: str, /, *, status: int = 200, **values: Any) -> Response:
        """A page, or a part of one, for this person."""
        page = self.pages.page(
            name,
            session=session,
            address=self.address,
            navigation=list(self._navigation(session)),
            has_alerts=self.has_alerts,
            **values,
        )
        return HTMLResponse(page, status)

    def _navigation(self, session: Session) -> Iterator[Place]:
        """The pages that are offered to a person."""
        for place in _PLACES:
            if place.needs is None or session.may(*place.needs):
                yield place

    def for_people(self, page: Page, *, needs: tuple[str, str] | None = None) -> Handler:
        """A page that only those see who are logged in.

        The token of a form is checked before anything is done.

        Args:
            page: What answers.
            needs: A method and its service. Somebody whose role does not allow it does not get the page. A page needs
                this for which the server is not asked: one that shows what another person's calls have read, or what
                another program says.
        """

        @functools.wraps(page)
        async def handle(request: Request) -> Response:
            session = await self.session_of(request)
            if session is None:
                return _to_login(request)
            if request.method == "POST" and not session.is_own((await form_of(request)).get("csrf", "")):
                return self._problem(request, session, 403, "This form is of another session. Load the page again.")
            try:
                await session.look_again(at_once=needs is not None and request.method == "POST")
                if needs is not None and not session.may(*needs):
                    return self._problem(request, session, 403, f"Your role, {session.role}, does not allow this.")
                return await page(request, session)
            except CallFailedError as error:
                if error.code is grpc.StatusCode.UNAUTHENTICATED:
                    await self.sessions.end(session)
                    return _to_login(request)
                return self._problem(request, session, HTTP.get(error.code, 502), str(error))

        return handle

    def _problem(self, request: Request, session: Session, status: int, message: str) -> Response:
        """Says what is wrong: in the place of a part of a page, or as a page."""
        template = "_problem" if is_part(request) else "problem"
        return self.show(session, template, status=status, message=message)


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form; the last one counts of several with one name."""
    return dict(await fields_of(request))


async def fields_of(request: Request) -> list[tuple[str, str]]:
    """The fields of a form, in their order; what cannot be read is no form, and has none."""
    try:
        return parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return []


def is_part(request: Request) -> bool:
    """Whether a page that is open asks for a part of itself."""
    return request.headers.get("hx-request") == "true"


def redirected(request: Request, path: str) -> Response:
    """Leads a browser on to another page."""
    if is_part(request):
        return Response(status_code=200, headers={"hx-redirect": path})
    return RedirectResponse(path, 303)


def _to_login(request: Request) -> Response:
    had_session = is_part(request) or request.method == "POST" or bool(request.cookies)
    return redirected(request, _ENDED if had_session else "/login")
