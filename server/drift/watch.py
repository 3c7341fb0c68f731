"""Drift as the server sees it: asked now and then of a process that reads the audit, off the way of decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from pretrade.admin.v1 import admin_pb2
from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Question, Reading
from server.errors import AuditError

_log = structlog.get_logger(__name__)


class DriftSettings(BaseModel):
    """Comparison of recent decisions with what their model learnt from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """Seconds from one comparison to the next one; 0 makes none. It costs about a second of a core for each model, in
    small steps over 10 to 20 seconds, at low priority."""
    window_seconds: float = Field(default=900.0, gt=0, le=86_400)
    """How far back a comparison looks, in seconds."""
    max_decisions: Constant[int] = 2_000
    """So many decisions are looked at, spread evenly over that time: at a thousand decisions a second, the newest 2,000
    know two seconds of the market. Enough for the statistics, and about a second of one core."""


class DriftWatch:
    """Keeps the newest comparison of each model; says so once when something drifts or has stopped to.

    Args:
        reading: The process that makes them.
        settings: How often, and of what.
        champions: The version that decides by the name of its model, the default one first; empty while none does.
    """

    def __init__(self, reading: Reading, settings: DriftSettings, champions: Callable[[], Mapping[str, str]]) -> None:
        self._reading = reading
        self._settings = settings
        self._champions = champions
        self.states: Final = {model: admin_pb2.DriftStatus(problem="not compared yet") for model in champions()}
        """The newest comparison by model."""

    async def run(self) -> None:
        """Compares for ever; ends only by cancellation."""
        if not self._settings.interval_seconds:
            await asyncio.Event().wait()  # a component that ends takes the server with it
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            for model, version in self._champions().items():
                state = await self._compared(model, version)
                before, now = _drifted(self.states[model]), _drifted(state)
                if before != now and not state.problem:
                    _log.warning("drift", model=model, model_version=state.model_version, drifted=now, rows=state.rows)
                self.states[model] = state

    async def _compared(self, model: str, version: str) -> admin_pb2.DriftStatus:
        alone = len(self.states) == 1  # then it is the champion of the newest decision, whoever it was meanwhile
        if not (version or alone):
            return admin_pb2.DriftStatus(problem="it has no champion yet")
        request = reading_pb2.CompareDriftRequest(
            window_seconds=self._settings.window_seconds,
            max_decisions=self._settings.max_decisions,
            model_version="" if alone else version,
            model_name=model,
        )
        try:
            answer = await self._reading.ask(Question.DRIFT, request.SerializeToString())
        except AuditError as error:
            return admin_pb2.DriftStatus(problem=str(error))
        return admin_pb2.DriftStatus.FromString(answer)


def _drifted(state: admin_pb2.DriftStatus) -> list[str]:
    return sorted(one.name for one in state.features if one.drifted)
