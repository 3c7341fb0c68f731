"""Alerts: those that fire, and silences of them, as Alertmanager has them.

Alertmanager knows no roles, so the console itself refuses whoever may not. It names the person to Alertmanager, which
keeps who made a silence, why and for how long.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pretrade.client.cli.alertmanager import Alertmanager, AlertmanagerError, UnreachableError, matchers_of
from pretrade.client.cli.options import span_seconds
from pretrade.console.alerts import AlertWatch, OpenAlert, conditions_of
from pretrade.console.forms import Form, FormError
from pretrade.console.sessions import Session
from pretrade.console.site import Site, form_of, redirected

_READS: Final = ("GetStatus", "AdminService")
_SILENCES: Final = ("SetTradingState", "AdminService")
"""Who may stop trading may also say that nobody needs to be told."""
_LONGEST_REASON: Final = 256


class Alerts:
    """What the page of alerts has from Alertmanager, and the forms of silences.

    Args:
        site: What all pages share.
        alertmanager: Whom to ask.
        watch: What it said last.
    """

    def __init__(self, site: Site, alertmanager: Alertmanager, watch: AlertWatch) -> None:
        self._site = site
        self._alertmanager = alertmanager
        self._watch = watch

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/alerts/live", people(self._live, needs=_READS), methods=["GET"]),
            Route("/overview/alerts", people(self._short, needs=_READS), methods=["GET"]),
            Route("/alerts/silence", people(self._form, needs=_SILENCES), methods=["GET"]),
            Route("/alerts/silence", people(self._silence, needs=_SILENCES), methods=["POST"]),
            Route("/alerts/silence/preview", people(self._preview, needs=_SILENCES), methods=["POST"]),
            Route("/alerts/silences/{id}", people(self._one, needs=_SILENCES), methods=["GET"]),
            Route("/alerts/silences/{id}", people(self._end, needs=_SILENCES), methods=["POST"]),
        ]

    async def _live(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "_alerts", seen=await self._watch.look(), may_silence=session.may(*_SILENCES))

    async def _short(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "_open_alerts", seen=await self._watch.look())

    async def _form(self, request: Request, session: Session) -> Response:
        return self._filled(session, dict(request.query_params))

    async def _preview(self, request: Request, session: Session) -> Response:
        """The alerts that fire now and would not be told."""
        form = await form_of(request)
        try:
            found = await asyncio.to_thread(self._alertmanager.matched, conditions_of(form))
            seconds = _seconds(form)
        except (FormError, AlertmanagerError) as error:
            return self._site.show(session, "_silence_preview", problem=str(error), found=[], seconds=0.0)
        alerts = [OpenAlert.of(one) for one in found]
        return self._site.show(session, "_silence_preview", problem="", found=alerts, seconds=seconds)

    async def _silence(self, request: Request, session: Session) -> Response:
        form = await form_of(request)
        reason = form.get("reason", "").strip()
        try:
            matchers, seconds = conditions_of(form), _seconds(form)
            if not 0 < len(reason) <= _LONGEST_REASON:
                raise FormError(f"Say why, in 1 to {_LONGEST_REASON} characters: Alertmanager keeps it.")
            made = await asyncio.to_thread(
                self._alertmanager.silence,
                matchers,
                begin=datetime.now(UTC),
                seconds=seconds,
                author=session.author,
                reason=reason,
            )
        except FormError as error:
            return self._filled(session, form, str(error), 400)
        except AlertmanagerError as error:
            return self._filled(session, form, _refused(error), 502)
        self._watch.forget()
        session.notice = [f"Silence {made}: nobody is told of {' '.join(map(str, matchers))}."]
        return redirected(request, "/alerts")

    def _filled(self, session: Session, form: Form, problem: str = "", status: int = 200) -> Response:
        return self._site.show(session, "silence", status=status, form=form, problem=problem)

    async def _one(self, request: Request, session: Session) -> Response:
        wanted = request.path_params["id"]
        seen = await self._watch.look()
        found = next((one for one in seen.silences if one["id"] == wanted), None)
        if found is None:
            return self._problem(session, 404, seen.problem or "There is no such silence, or it has ended.")
        return self._site.show(session, "unsilence", silence=found, matchers=matchers_of(found))

    async def _end(self, request: Request, session: Session) -> Response:
        wanted = request.path_params["id"]
        try:
            await asyncio.to_thread(self._alertmanager.unsilence, wanted)
        except AlertmanagerError as error:
            return self._problem(session, 502, _refused(error))
        self._watch.forget()
        session.notice = [f"Silence {wanted} is over: people are told again."]
        return redirected(request, "/alerts")

    def _problem(self, session: Session, status: int, message: str) -> Response:
        return self._site.show(session, "problem", status=status, message=message)


def _seconds(form: Form) -> float:
    """For how long. Raises `FormError`."""
    seconds = span_seconds(form.get("span", "").strip())
    if not seconds:
        raise FormError("For how long: a number with its unit, like 90s, 10m, 2h or 1d. A silence ends by itself.")
    return seconds


def _refused(error: AlertmanagerError) -> str:
    return str(error) if isinstance(error, UnreachableError) else f"Alertmanager refuses it: {error}"
