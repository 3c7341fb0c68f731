"""The market of one instrument: its bars, and the decisions of that time."""

from __future__ import annotations

import time
from typing import Any, Final

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.console.calls import AUDIT_SECONDS, SECONDS, CallFailedError
from pretrade.console.charting import INTERVALS, PANES, VOLUME, columns, digits, last_second, marks, newest, pane
from pretrade.console.sessions import Session
from pretrade.console.site import Site

NEEDS: Final = ("ListBars", "AdminService")
"""The method that the page needs, and its service."""
_BARS: Final = 120
"""On the chart: more are no candles any more on a phone."""
_DECISIONS: Final = 200
"""Decisions that are marked, the newest."""
_ROWS: Final = 20
"""Of these, the ones that the table has."""
_WITHOUT_BARS_SECONDS: Final = 900
"""How far back decisions are looked for where no bar says how far the chart goes."""


class Market:
    """The page, and what its chart is drawn from."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/market", people(self._page, needs=NEEDS), methods=["GET"]),
            Route("/market/chart.json", people(self._chart, needs=NEEDS), methods=["GET"]),
            Route("/market/book", people(self._book), methods=["GET"]),
        ]

    async def _page(self, request: Request, session: Session) -> Response:
        calls = session.calls
        wanted = pb.GetStatusRequest(this_process_only=True)
        status = await calls.answer(calls.admin.GetStatus(wanted, timeout=SECONDS))
        instruments = [one.instrument for one in status.features]
        asked = request.query_params
        return self._site.show(
            session,
            "market",
            instruments=instruments,
            instrument=asked.get("instrument") or next(iter(instruments), ""),
            intervals=list(INTERVALS),
            interval=_interval(request),
            panes=PANES,
            pane=_pane(request),
            page=asked.get("page", ""),
            reads_decisions=_reads_decisions(session),
        )

    async def _chart(self, request: Request, session: Session) -> Response:
        """Bars in columns, decisions as marks and rows, and what is missing of either."""
        asked, interval, below = request.query_params, _interval(request), _pane(request)
        wanted = pb.ListBarsRequest(
            instrument=asked.get("instrument", ""),
            interval=interval,
            page_size=_BARS,
            page_token=asked.get("page", ""),
            indicators=[] if below == VOLUME else [below],
        )
        found, problem = await self._bars(session, wanted)
        decided, missing = await self._decisions(session, wanted, found)
        return JSONResponse(
            {
                **columns(found.bars),
                "pane": pane(found.bars, below),
                "pane_problem": found.indicators_problem,
                "seconds": INTERVALS[interval],
                "newest": newest(found.bars),
                "older": found.next_page_token,
                "problem": problem or found.problem,
                "marks": marks(decided, interval),
                "rows": self._site.pages.page("_rows", decisions=decided[:_ROWS]),
                "missing": missing,
            }
        )

    async def _book(self, request: Request, session: Session) -> Response:
        """The ladder of the book."""
        calls = session.calls
        wanted = pb.GetBookRequest(instrument=request.query_params.get("instrument", ""))
        book = await calls.answer(calls.admin.GetBook(wanted, timeout=SECONDS))
        levels = [*book.bids, *book.asks]
        return self._site.show(
            session,
            "_book",
            book=book,
            digits=digits([level.price for level in levels]),
            largest=max((level.size for level in levels), default=0.0) or 1.0,
            spread=book.asks[0].price - book.bids[0].price if book.asks and book.bids else None,
            is_locked=book.book == pb.BOOK_STATE_LOCKED,
            age=max(0.0, time.time() - book.published_at.ToNanoseconds() / 1e9),
        )

    async def _bars(self, session: Session, wanted: pb.ListBarsRequest) -> tuple[pb.ListBarsResponse, str]:
        """A page of bars, and why there is none."""
        calls = session.calls
        try:
            return await calls.answer(calls.admin.ListBars(wanted, timeout=AUDIT_SECONDS)), ""
        except CallFailedError as error:
            return pb.ListBarsResponse(), _said(error)

    async def _decisions(
        self, session: Session, wanted: pb.ListBarsRequest, found: pb.ListBarsResponse
    ) -> tuple[list[audit_pb2.AuditedDecision], str]:
        """The newest decisions of the time that the chart has, the newest first, and what is missing of them."""
        if not _reads_decisions(session):
            return [], ""
        sought: Any = audit_pb2.DecisionFilter(instruments=[wanted.instrument])
        if found.bars:
            sought.since.CopyFrom(found.bars[0].start)
        else:
            sought.since.FromSeconds(int(time.time()) - _WITHOUT_BARS_SECONDS)
        if found.bars and wanted.page_token:
            sought.until.FromDatetime(last_second(found.bars, wanted.interval))
        calls = session.calls
        request = audit_pb2.ListDecisionsRequest(filter=sought, page_size=_DECISIONS)
        try:
            answer = await calls.answer(calls.audit.ListDecisions(request, timeout=AUDIT_SECONDS))
        except CallFailedError as error:
            return [], _said(error)
        return list(answer.decisions), answer.incomplete


def _interval(request: Request) -> str:
    """The interval that was asked for; the usual one where there is no such."""
    asked = request.query_params.get("interval", "")
    return asked if asked in INTERVALS else "10s"


def _pane(request: Request) -> str:
    """What was asked for in the pane; the volume where there is no such."""
    asked = request.query_params.get("pane", "")
    return asked if asked in PANES else VOLUME


def _reads_decisions(session: Session) -> bool:
    return session.may("ListDecisions", "AuditService")


def _said(error: CallFailedError) -> str:
    """Why a part of the page is missing; raises the error again where nobody is logged in any more."""
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        raise error
    return str(error)
