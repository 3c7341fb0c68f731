"""The page on which a person changes something: the fields, what would change, and the button."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.enum_names import enum_choices
from pretrade.console.acts import ACTS, ALIASES, MODES, STAGES, Act, Known, can_expect, replica_names
from pretrade.console.calls import SECONDS, CallFailedError
from pretrade.console.forms import Form, FormError
from pretrade.console.rendering import named
from pretrade.console.rules import CONDITIONS, CROSSES, SEVERITIES
from pretrade.console.sessions import Session
from pretrade.console.site import HTTP, Site, form_of, redirected

_UNKNOWN: Final = "It is not known whether the change was made. If it was, it is among the latest changes soon. "


class Steering:
    """Every act's page."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/act/{name}", people(self._form), methods=["GET"]),
            Route("/act/{name}", people(self._make), methods=["POST"]),
            Route("/act/{name}/preview", people(self._preview), methods=["POST"]),
        ]

    async def _form(self, request: Request, session: Session) -> Response:
        act = ACTS.get(request.path_params["name"])
        if act is None:
            return self._problem(session, 404, "Nothing of this name can be changed.")
        if not session.may(act.method):
            return self._problem(session, 403, f"Your role, {session.role}, does not allow this.")
        return await self._page(session, act, dict(request.query_params))

    async def _preview(self, request: Request, session: Session) -> Response:
        """What would change, as the server says it."""
        act = ACTS.get(request.path_params["name"])
        if act is None or not session.may(act.method):
            return self._site.show(session, "_problem", status=403, message="Your role does not allow this.")
        form = await form_of(request)
        known = await _known(session)
        try:
            wanted = act.complete({**form, "reason": form.get("reason", "").strip() or "not given yet"}, session.author)
            wanted.dry_run = True
            would = await _call(session, act, wanted)
        except (FormError, CallFailedError) as error:
            return self._site.show(session, "_preview", problem=str(error), change=None, risk="")
        bound = act.is_bound(wanted, known.control.trading_state)
        return self._site.show(
            session, "_preview", problem="", change=would.change, risk=act.risk(form, known), bound=bound
        )

    async def _make(self, request: Request, session: Session) -> Response:
        """Makes the change. Whether the person may, the server says, which also records a refusal."""
        act = ACTS.get(request.path_params["name"])
        if act is None:
            return self._problem(session, 404, "Nothing of this name can be changed.")
        form = await form_of(request)
        try:
            wanted = act.complete(form, session.author)
        except FormError as error:
            return await self._page(session, act, form, str(error), 400)
        if not wanted.reason:
            return await self._page(session, act, form, "Say why: the audit keeps it.", 400)
        if form.get("version", "").isdigit() and can_expect(wanted):
            wanted.expected_control_version = int(form["version"])
        try:
            made = await _call(session, act, wanted)
        except CallFailedError as error:
            if error.code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                raise
            return await self._page(session, act, form, _why(error), HTTP.get(error.code, 502))
        session.notice = _said(made.change)
        return redirected(request, act.leads_to)

    async def _page(self, session: Session, act: Act, form: Form, problem: str = "", status: int = 200) -> Response:
        try:
            known = await _known(session)
            versions = await _versions(session) if act.chooses_version else []
        except CallFailedError as error:
            return self._problem(session, HTTP.get(error.code, 502), f"{problem} {error}".strip())
        return self._site.show(
            session,
            "act",
            status=status,
            act=act,
            form=form,
            problem=problem,
            known=known,
            states=[(name, name.upper()) for name in reversed(enum_choices(pb.TradingState))],
            restrictions=[
                (one.change_id, f"{named(one.state, 'trading_state')} by {one.author}: {one.reason}")
                for one in known.control.restrictions
            ],
            modes=MODES,
            stages=STAGES,
            chain=[form.get(f"stage{index}", stage) for index, stage in enumerate(_padded(known.status.chain_stages))],
            replicas=replica_names(known.status.replicas),
            versions=versions,
            aliases=ALIASES,
            models=[one.name for one in known.status.models],
            conditions=CONDITIONS,
            crosses=CROSSES,
            severities=SEVERITIES,
            features=[one.name for one in known.status.drift.features if one.name != "score"],
        )

    def _problem(self, session: Session, status: int, message: str) -> Response:
        return self._site.show(session, "problem", status=status, message=message)


async def _known(session: Session) -> Known:
    calls = session.calls
    status, control = await asyncio.gather(
        calls.answer(calls.admin.GetStatus(pb.GetStatusRequest(this_process_only=True), timeout=SECONDS)),
        calls.answer(calls.admin.GetControl(pb.GetControlRequest(), timeout=SECONDS)),
    )
    return Known(status, control)


async def _versions(session: Session) -> list[tuple[str, str]]:
    """The versions that a form offers, and what it calls them."""
    calls = session.calls
    found = await calls.answer(calls.admin.ListModels(pb.ListModelsRequest(), timeout=SECONDS))
    return [
        (one.model_version, ", ".join(filter(None, (one.model_version, one.kind, *one.aliases, one.standing))))
        for one in found.models
        if not one.problem
    ]


async def _call(session: Session, act: Act, request: object) -> pb.SetFlagResponse:
    """The response of an act; every one of them has a change."""
    method = getattr(session.calls.admin, act.method)
    found: pb.SetFlagResponse = await session.calls.answer(method(request, timeout=act.seconds))
    return found


def _why(error: CallFailedError) -> str:
    if error.may_have_arrived:
        return f"{_UNKNOWN}{error}"
    if error.code is grpc.StatusCode.ABORTED:
        return f"Somebody else made a change meanwhile, so nothing was changed. Look again. {error}"
    return str(error)


def _said(change: pb.Change) -> list[str]:
    lines = list(change.diff) or [f"{change.subject}: {change.value}, as before"]
    lines.append(f"The control state has version {change.version}.")
    if change.unsaved:
        lines.append("Neither Redis nor the disk took it: in force in one process, and forgotten when that ends.")
    elif change.local:
        lines.append("Redis did not answer: in force on this server, and on all others when it answers again.")
    return lines


def _padded(stages: object) -> list[str]:
    found = list(stages)  # type: ignore[call-overload]  # of the message
    return [*found, *[""] * (len(STAGES) - len(found))]
