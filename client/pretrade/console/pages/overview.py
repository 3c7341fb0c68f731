"""The first page: whether the server keeps its promise, what is wrong, what it consists of, and what was changed."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.client.cli.worst import faults
from pretrade.console.calls import AUDIT_SECONDS, SECONDS, CallFailedError
from pretrade.console.hour import SAMPLE, Hour
from pretrade.console.sessions import Session
from pretrade.console.site import Site

_CHANGES: Final = 8
"""Changes that are shown, the newest first."""
_READS_DECISIONS: Final = ("ListDecisions", "AuditService")
"""What a role must allow to see the hour: all people share it, whoever's calls have read it."""


class Overview:
    """The page, and the parts of it that are asked for again and again."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._hour = Hour(time.time)

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/", people(self._page), methods=["GET"]),
            Route("/overview/status", people(self._status), methods=["GET"]),
            Route("/overview/changes", people(self._changes), methods=["GET"]),
            Route("/overview/hour", people(self._last_hour, needs=_READS_DECISIONS), methods=["GET"]),
            Route("/overview/hour.json", people(self._series, needs=_READS_DECISIONS), methods=["GET"]),
        ]

    async def _page(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "overview", notice=session.take_notice())

    async def _status(self, _: Request, session: Session) -> Response:
        calls = session.calls
        status, control = await asyncio.gather(
            calls.answer(calls.admin.GetStatus(pb.GetStatusRequest(), timeout=SECONDS)),
            calls.answer(calls.admin.GetControl(pb.GetControlRequest(), timeout=SECONDS)),
        )
        return self._site.show(
            session,
            "_status",
            status=200,
            found=status,
            control=control,
            faults=faults(status),
            set_by={one.subject: one for one in control.settings},
        )

    async def _changes(self, _: Request, session: Session) -> Response:
        calls = session.calls
        request = pb.ListChangesRequest(page_size=_CHANGES)
        found = await calls.answer(calls.admin.ListChanges(request, timeout=AUDIT_SECONDS))
        return self._site.show(session, "_changes", found=found)

    async def _last_hour(self, _: Request, session: Session) -> Response:
        problem = await self._look(session)
        return self._site.show(session, "_hour", hour=self._hour.summary(), sample=SAMPLE, problem=problem)

    async def _series(self, _: Request, session: Session) -> Response:
        await self._look(session)
        return JSONResponse(self._hour.series())

    async def _look(self, session: Session) -> str:
        """Looks for what is missing of the hour; returns why that could not be, or nothing."""
        calls = session.calls

        async def ask(request: audit_pb2.ListDecisionsRequest) -> audit_pb2.ListDecisionsResponse:
            return await calls.answer(calls.audit.ListDecisions(request, timeout=AUDIT_SECONDS))

        try:
            await self._hour.look(ask)
        except CallFailedError as error:  # what is known of the hour is worth showing without the rest
            return str(error)
        return ""
