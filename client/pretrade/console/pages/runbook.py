"""The page of the runbook."""

from __future__ import annotations

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pretrade.console.runbook import PATH, body
from pretrade.console.sessions import Session
from pretrade.console.site import Site


class Runbook:
    """The page."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        return [Route(PATH, self._site.for_people(self._page), methods=["GET"])]

    async def _page(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "runbook", body=Markup(body()))  # noqa: S704 - of our own docs, without their HTML
