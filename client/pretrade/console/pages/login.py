"""Logging in, with the same tokens as the command line, and out."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.client.errors import CredentialsError
from pretrade.console.calls import SECONDS, CallFailedError, ServerCalls
from pretrade.console.oidc import PENDING_SECONDS, LoginFailedError, Provider, ProviderAwayError, RenewedToken
from pretrade.console.sessions import Session
from pretrade.console.site import Site, form_of, redirected

BEGIN: Final = "/login/oidc"
CALLBACK: Final = "/login/oidc/callback"
"""Where the provider sends browsers back to; it wants to know this address beforehand."""
_LONGEST_NAME: Final = 64
"""Characters of an author, as the contract has it."""
_WRONG: Final = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
}

_NOTHING: Final = {"token": None, "token_file": None, "certificate": None, "key": None}
"""Of what the console itself would show, people show nothing."""
_USED: Final = "This link was used, or is too old. Paste a token, or have the command make another."


class Login:
    """The page on which a person logs in.

    Args:
        site: What all pages share.
        provider: Where people may log in by OpenID Connect; None without.
    """

    def __init__(self, site: Site, provider: Provider | None = None) -> None:
        self._site = site
        self._provider = provider

    def routes(self) -> list[Route]:
        """What is where."""
        return [
            Route("/login", self._form, methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/logout", self._site.for_people(self._log_out), methods=["POST"]),
            *([] if self._provider is None else self._routes_of(self._provider)),
        ]

    def _routes_of(self, provider: Provider) -> list[Route]:
        async def begin(_: Request) -> Response:
            return await self._begin(provider)

        async def finish(request: Request) -> Response:
            return await self._finish(provider, request)

        return [Route(BEGIN, begin, methods=["GET"]), Route(CALLBACK, finish, methods=["GET"])]

    async def _form(self, request: Request) -> Response:
        shown = request.query_params.get("ticket", "")
        problem = ""
        if shown and not self._fits(shown):
            problem = _USED
        elif request.query_params.get("ended"):
            problem = "Your session has ended, or the server takes your token no more. Log in again."
        return self._page(problem, ticket=shown if self._fits(shown) else "")

    async def _log_in(self, request: Request) -> Response:
        form = await form_of(request)
        token, ticket, name = form.get("token", "").strip(), form.get("ticket", ""), form.get("name", "").strip()
        if not token and not self._fits(ticket):
            return self._page("A token is needed.", 400, name=name)
        try:
            calls = ServerCalls(self._site.address, self._shown(token))
        except CredentialsError as error:
            return self._page(str(error), 400, name=name)
        try:
            caller = await calls.answer(calls.admin.GetCaller(pb.GetCallerRequest(), timeout=SECONDS))
        except CallFailedError as error:
            await calls.close()
            return self._page(str(error), _WRONG.get(error.code, 502), ticket=ticket, name=name)
        if caller.states_author and not 0 < len(name) <= _LONGEST_NAME:
            await calls.close()
            why = (
                f"This token is a machine's. Say who you are, in 1 to {_LONGEST_NAME} characters: the audit names you."
            )
            return self._page(why, 400, ticket=ticket if not token else "", name=name)
        if not token and not self._uses(ticket):  # somebody else was faster
            await calls.close()
            return self._page(_USED, 400, name=name)
        session = await self._welcome(request, calls, caller, name)
        return self._logged_in(redirected(request, "/"), session)

    async def _begin(self, provider: Provider) -> Response:
        """Sends a browser to the provider."""
        try:
            begun = await provider.begin()
        except LoginFailedError as error:
            return self._page(str(error), 502)
        response = RedirectResponse(begun.url, 303)
        # The provider's answer comes from another site, with which a browser sends no cookie that is stricter than Lax.
        response.set_cookie(
            self._pending_cookie,
            begun.kept,
            max_age=int(PENDING_SECONDS),
            path="/",
            secure=self._site.is_secure,
            httponly=True,
            samesite="lax",
        )
        return response

    async def _finish(self, provider: Provider, request: Request) -> Response:
        """Logs in whom the provider has sent back."""
        try:
            kept = request.cookies.get(self._pending_cookie, "")
            token = RenewedToken(provider, await provider.finish(kept, dict(request.query_params)), time.time)
            shown = self._site.credentials.with_changes({**_NOTHING, "current_token": token})
            calls = ServerCalls(self._site.address, shown)
        except ProviderAwayError as error:
            return self._page(str(error), 502)
        except (LoginFailedError, CredentialsError) as error:
            return self._page(str(error), 400)
        try:
            caller = await calls.answer(calls.admin.GetCaller(pb.GetCallerRequest(), timeout=SECONDS))
        except CallFailedError as error:
            await calls.close()
            return self._page(f"You are logged in at the provider. {error}", _WRONG.get(error.code, 502))
        session = await self._welcome(request, calls, caller, caller.name, renew=token.renew)
        # The page leads on by itself: a redirect would still come from the provider's site, without the cookie.
        response = self._logged_in(HTMLResponse(self._site.pages.page("arrived", address=self._site.address)), session)
        response.delete_cookie(self._pending_cookie, path="/", secure=self._site.is_secure, httponly=True)
        return response

    @property
    def _pending_cookie(self) -> str:
        return f"{self._site.cookie}-login"

    async def _welcome(
        self,
        request: Request,
        calls: ServerCalls,
        caller: pb.GetCallerResponse,
        name: str,
        renew: Callable[[], Awaitable[None]] | None = None,
    ) -> Session:
        """Opens a session; one that the browser had is ended."""
        before = await self._site.session_of(request)
        if before is not None:
            await self._site.sessions.end(before)
        session = Session(calls, caller, name, time.monotonic, renew)
        await self._site.sessions.add(session)
        return session

    def _logged_in(self, response: Response, session: Session) -> Response:
        response.set_cookie(
            self._site.cookie, session.id, path="/", secure=self._site.is_secure, httponly=True, samesite="strict"
        )
        return response

    async def _log_out(self, request: Request, session: Session) -> Response:
        await self._site.sessions.end(session)
        response = redirected(request, "/login")
        response.delete_cookie(
            self._site.cookie, path="/", secure=self._site.is_secure, httponly=True, samesite="strict"
        )
        return response

    def _fits(self, ticket: str) -> bool:
        return self._site.tickets is not None and self._site.tickets.fits(ticket)

    def _uses(self, ticket: str) -> bool:
        return self._site.tickets is not None and self._site.tickets.use(ticket)

    def _shown(self, token: str) -> ClientCredentials:
        """What the person's calls show: the token alone, or by the ticket what the command itself would show."""
        if not token:
            return self._site.credentials
        return self._site.credentials.with_changes({**_NOTHING, "token": token})

    def _page(self, problem: str, status: int = 200, *, ticket: str = "", name: str = "") -> Response:
        page = self._site.pages.page(
            "login",
            problem=problem,
            ticket=ticket,
            name=name,
            address=self._site.address,
            longest=_LONGEST_NAME,
            provider="" if self._provider is None else self._provider.settings.name,
            begin=BEGIN,
        )
        return HTMLResponse(page, status)
