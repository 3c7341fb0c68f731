"""Models: the versions, the canary with its evidence as it grows, and how far inputs have drifted."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.calls import SECONDS, CallFailedError
from pretrade.console.sessions import Session
from pretrade.console.site import Site

_FULL: Final = 2.0
"""Of a drift's limit, at which its bar is full."""


class Models:
    """The page."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        """What is where."""
        people = self._site.for_people
        return [
            Route("/models", people(self._page), methods=["GET"]),
            Route("/models/live", people(self._live), methods=["GET"]),
        ]

    async def _page(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "models")

    async def _live(self, _: Request, session: Session) -> Response:
        calls = session.calls
        status = await calls.answer(calls.admin.GetStatus(pb.GetStatusRequest(this_process_only=True), timeout=SECONDS))
        names = [one.name for one in status.models] or ["default"]
        missing = ""
        listed, found = pb.ListModelsResponse(), [pb.GetCanaryResponse() for _ in names]
        try:
            listed = await calls.answer(calls.admin.ListModels(pb.ListModelsRequest(), timeout=SECONDS))
            asked = (calls.admin.GetCanary(pb.GetCanaryRequest(model=_asked(name)), timeout=SECONDS) for name in names)
            found = await asyncio.gather(*map(calls.answer, asked))
        except CallFailedError as error:
            if error.code is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            missing = str(error)  # a server without a model store has drift all the same
        drifts = {one.name: one.drift for one in status.models} | {"default": status.drift}
        return self._site.show(
            session,
            "_models",
            versions=listed.models,
            missing=missing,
            canaries={name: one.canary for name, one in zip(names, found, strict=True) if one.HasField("canary")},
            drifts={name: (drift, [drift_bar(one) for one in drift.features]) for name, drift in drifts.items()},
        )


def drift_bar(feature: pb.FeatureDrift) -> tuple[pb.FeatureDrift, float]:
    """A feature, and how much of its bar is full, in percent: half of it at the limit; 0 where there is no limit."""
    if not feature.HasField("limit") or feature.limit <= 0:
        return feature, 0.0
    return feature, min(100.0, 100.0 * feature.psi / (_FULL * feature.limit))


def _asked(name: str) -> str:
    """The model as requests name it."""
    return "" if name == "default" else name
