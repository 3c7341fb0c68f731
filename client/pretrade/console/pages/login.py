"""Logging in, with the same tokens as the command line, and out."""

from __future__ import annotations

import time
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.client.errors import CredentialsError
from pretrade.console.calls import SECONDS, CallFailedError, ServerCalls
from pretrade.console.sessions import Session
from pretrade.console.site import Site, form_of, redirected

_LONGEST_NAME: Final = 64
"""Characters of an author, as the contract has it."""
_WRONG: Final = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
}

_USED: Final = "This link was used, or is too old. Paste a token, or have the command make another."


class Login:
    """The page on which a person logs in."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        return [
            Route("/login", self._form, methods=["GET"]),
            Route("/login", self._log_in, methods=["POST"]),
            Route("/logout", self._site.for_people(self._log_out), methods=["POST"]),
        ]

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
        return await self._welcome(request, calls, caller, name)

    async def _welcome(self, request: Request, calls: ServerCalls, caller: pb.GetCallerResponse, name: str) -> Response:
        """Opens a session; one that the browser had is ended."""
        before = await self._site.session_of(request)
        if before is not None:
            await self._site.sessions.end(before)
        session = Session(calls, caller, name, time.monotonic)
        await self._site.sessions.add(session)
        response = redirected(request, "/")
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
        return self._site.credentials.with_changes(
            {"token": token, "token_file": None, "certificate": None, "key": None}
        )

    def _page(self, problem: str, status: int = 200, *, ticket: str = "", name: str = "") -> Response:
        page = self._site.pages.page(
            "login", problem=problem, ticket=ticket, name=name, address=self._site.address, longest=_LONGEST_NAME
        )
        return HTMLResponse(page, status)
