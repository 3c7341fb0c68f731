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
from pretrade.console.curves import HEIGHT, SIDE, WIDTH, dots, growths, heat
from pretrade.console.sessions import Session
from pretrade.console.site import Site

_FIGURES: Final = (
    "precision",
    "coverage",
    "recall",
    "auc",
    "brier",
    "ece",
    "markout_traded_bps",
    "markout_refused_bps",
    "markout_difference_bps",
    "saved_bps",
    "break_even_bps",
)
"""Those that the page has room for, in order."""


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
            Route("/models/{version}", people(self._card), methods=["GET"]),
        ]

    async def _page(self, _: Request, session: Session) -> Response:
        return self._site.show(session, "models", notice=session.take_notice())

    async def _card(self, request: Request, session: Session) -> Response:
        """What was measured of a version before it decided."""
        calls = session.calls
        wanted = pb.GetModelCardRequest(model_version=request.path_params["version"])
        card = await calls.answer(calls.admin.GetModelCard(wanted, timeout=SECONDS))
        shown = [one for one in _FIGURES if any(_has(decider, one) for decider in card.deciders)]
        figures = [(one.name, {each.name: each for each in one.figures}) for one in card.deciders]
        return self._site.show(
            session, "card", card=card, figures=figures, shown=shown, dots=dots(card.reliability), side=SIDE
        )

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
            growths={name: growths(one.history) for name, one in zip(names, found, strict=True)},
            width=WIDTH,
            height=HEIGHT,
            drifts={name: (drift, by_urgency(drift)) for name, drift in drifts.items()},
        )


def by_urgency(drift: pb.DriftStatus) -> list[tuple[pb.FeatureDrift, list[tuple[float, int]]]]:
    """Each feature with its index and shade in every part of the time; the farthest beyond its limit first."""
    rows = []
    for place, one in enumerate(drift.features):
        parts = [(part.psi[place], heat(part.psi[place], one)) for part in drift.windows]
        rows.append((one, parts))
    return sorted(rows, key=lambda row: -_limits(row[0]))


def _limits(one: pb.FeatureDrift) -> float:
    """How many limits it is; less than any where it has none."""
    return one.psi / one.limit if one.HasField("limit") and one.limit > 0 else -1.0


def _has(decider: pb.CardDecider, name: str) -> bool:
    return any(one.name == name and one.HasField("value") for one in decider.figures)


def _asked(name: str) -> str:
    """The model as requests name it."""
    return "" if name == "default" else name
