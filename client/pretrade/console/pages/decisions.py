"""Decisions: a live tail, a search, and one of them with its ledger, its features, its explanation and its replay."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import grpc
import grpc.aio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from pretrade.audit.v1 import audit_pb2 as pb
from pretrade.console.calls import AUDIT_SECONDS, failed
from pretrade.console.forms import FormError
from pretrade.console.ledger import WIDTH, named_vector, waterfall
from pretrade.console.searching import DECIDED, HEARD, SOURCES, filter_of, live, next_page
from pretrade.console.sessions import Session
from pretrade.console.site import Site
from pretrade.decision.v1 import decision_pb2

_PAGE: Final = 50
"""Decisions of a page of the search."""
_EVERY_SECONDS: Final = 0.5
"""How often the live tail sends what has come."""
_SHORTEST_SECONDS: Final = 2.0
"""Between two beginnings of a stream whose token expires: one that ends sooner than that is not begun again."""
_MOST_AT_ONCE: Final = 25
"""Decisions that it sends then, the newest; how many it left out it says. Nobody reads more than 50 a second."""


class Decisions:
    """The pages."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._watches: set[asyncio.Task[None]] = set()

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/decisions", people(self._search), methods=["GET"]),
            Route("/decisions/tail", people(self._tail), methods=["GET"]),
            Route("/decisions/{id}", people(self._one), methods=["GET"]),
            Route("/decisions/{id}/explanation", people(self._explanation), methods=["GET"]),
            Route("/decisions/{id}/replay", people(self._replay), methods=["GET"]),
        ]

    def end(self) -> None:
        """Ends the live tails, which would not end by themselves."""
        for watch in self._watches:
            watch.cancel()

    async def _search(self, request: Request, session: Session) -> Response:
        form = dict(request.query_params)
        try:
            used = filter_of(form)
        except FormError as error:
            return self._listed(session, form, pb.ListDecisionsResponse(), "", str(error), 400)
        calls = session.calls
        wanted = pb.ListDecisionsRequest(filter=used, page_size=_PAGE, page_token=form.get("page", ""))
        found = await calls.answer(calls.audit.ListDecisions(wanted, timeout=AUDIT_SECONDS))
        return self._listed(session, form, found, next_page(form, used, found.next_page_token))

    def _listed(
        self,
        session: Session,
        form: Mapping[str, str],
        found: pb.ListDecisionsResponse,
        following: str,
        problem: str = "",
        status: int = 200,
    ) -> Response:
        return self._site.show(
            session,
            "decisions",
            status=status,
            form=form,
            decisions=found.decisions,
            incomplete=found.incomplete,
            following=following,
            tail=f"/decisions/tail?{live(form)}",
            problem=problem,
            choices={"heard": list(HEARD), "decided": list(DECIDED), "source": list(SOURCES)},
        )

    async def _one(self, request: Request, session: Session) -> Response:
        calls = session.calls
        wanted = pb.GetDecisionRequest(decision_id=request.path_params["id"])
        found = await calls.answer(calls.audit.GetDecision(wanted, timeout=AUDIT_SECONDS))
        packet = found.decision.packet
        return self._site.show(
            session,
            "decision",
            audited=found.decision,
            packet=packet,
            outcomes=found.outcomes,
            incomplete=found.incomplete,
            bars=waterfall(packet.decision.budget),
            width=WIDTH,
            features=named_vector(packet.model_input, found.feature_names),
        )

    async def _explanation(self, request: Request, session: Session) -> Response:
        calls = session.calls
        wanted = pb.ExplainDecisionRequest(decision_id=request.path_params["id"])
        found = await calls.answer(calls.audit.ExplainDecision(wanted, timeout=AUDIT_SECONDS))
        explained = found.explanation
        ordered = sorted(explained.contributions, key=lambda one: -abs(one.contribution))
        return self._site.show(
            session,
            "_explanation",
            explained=explained,
            is_ready=explained.status == decision_pb2.EXPLANATION_STATUS_READY,
            contributions=ordered,
            largest=max((abs(one.contribution) for one in ordered), default=0.0) or 1.0,
        )

    async def _replay(self, request: Request, session: Session) -> Response:
        calls = session.calls
        wanted = pb.ReplayDecisionRequest(decision_id=request.path_params["id"])
        found = await calls.answer(calls.audit.ReplayDecision(wanted, timeout=AUDIT_SECONDS))
        return self._site.show(session, "_replay", found=found)

    async def _tail(self, request: Request, session: Session) -> Response:
        try:
            used = filter_of(dict(request.query_params))
        except FormError as error:
            return self._site.show(session, "_problem", status=400, message=str(error))
        return StreamingResponse(self._batches(session, used), media_type="text/event-stream")

    async def _batches(self, session: Session, used: pb.DecisionFilter) -> AsyncIterator[str]:
        """Events for the browser: the newest decisions of each half second, and how many there were."""
        came: deque[pb.AuditedDecision] = deque(maxlen=_MOST_AT_ONCE)
        counted = 0
        problem = ""

        async def watch() -> None:
            nonlocal counted, problem
            wanted = pb.WatchDecisionsRequest(filter=used)
            began = -math.inf
            while not problem:
                # A server ends a stream whose token has expired. One that was renewed meanwhile goes on where it ended.
                began, before = time.monotonic(), began
                stream: Any = session.calls.audit.WatchDecisions(wanted)
                try:
                    async for event in stream:
                        wanted.cursor = event.cursor
                        kind = event.WhichOneof("event")
                        if kind == "decision":
                            came.append(event.decision)
                            counted += 1
                        elif kind == "missed":
                            counted += event.missed.last_position - event.missed.first_position + 1
                    problem = "The server has ended it."
                except grpc.aio.AioRpcError as error:
                    has_expired = error.code() is grpc.StatusCode.UNAUTHENTICATED and session.renew is not None
                    if not has_expired or began - before < _SHORTEST_SECONDS:
                        problem = str(failed(error, session.calls.address))
                finally:
                    stream.cancel()

        watching = asyncio.create_task(watch(), name="console-tail")
        self._watches.add(watching)
        try:
            yield _event("begun", {})
            while not watching.done():
                await asyncio.wait((watching,), timeout=_EVERY_SECONDS)
                session.used = time.monotonic()  # whoever watches is there
                if session.renew is not None:
                    await session.renew()
                if counted:
                    rows = self._site.pages.page("_rows", decisions=list(reversed(came)))
                    yield _event("rows", {"rows": rows, "left_out": counted - len(came)})
                    came.clear()
                    counted = 0
                else:
                    yield ": nothing came\n\n"  # a browser that has gone is noticed by this
            yield _event("ended", {"why": problem or "The console stops."})
        finally:
            watching.cancel()
            self._watches.discard(watching)


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
