"""The page of alerts, with the rules that users set; the server has those, and what fires, Alertmanager."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.cli.alert_rules import condition
from pretrade.console.calls import SECONDS
from pretrade.console.rules import as_form
from pretrade.console.sessions import Session
from pretrade.console.site import Site


class AlertRules:
    """The page, and the part of it that is about rules. The forms are acts like any other."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/alerts", people(self._page, needs=("ListAlertRules", "AdminService")), methods=["GET"]),
            Route("/alerts/rules", people(self._rules), methods=["GET"]),
        ]

    async def _page(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "alerts", notice=session.take_notice())

    async def _rules(self, _: Request, session: Session) -> Response:
        calls = session.calls
        found = await calls.answer(calls.admin.ListAlertRules(pb.ListAlertRulesRequest(), timeout=SECONDS))
        return self._site.show(
            session, "_alert_rules", rules=[(rule, condition(rule), as_form(rule)) for rule in found.rules]
        )
