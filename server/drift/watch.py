"""Drift as the server sees it: asked now and then of a process that reads the audit, off the way of decisions."""

from __future__ import annotations

import asyncio

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

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    interval_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """Seconds between two comparisons; 0 makes none. One costs about a second of a core, at low priority."""
    window_seconds: float = Field(default=900.0, gt=0, le=86_400)
    """How far back a comparison looks, in seconds."""
    max_decisions: Constant[int] = 2_000
    """So many decisions are looked at, spread evenly over that time: at a thousand decisions a second, the newest 2,000
    know two seconds of the market. Enough for the statistics, and about a second of one core."""


class DriftWatch:
    """Keeps the newest comparison; says so once when something drifts or has stopped to.

    Args:
        reading: The process that makes it.
        settings: How often, and of what.
    """

    def __init__(self, reading: Reading, settings: DriftSettings) -> None:
        self._reading = reading
        self._settings = settings
        self.state = admin_pb2.DriftStatus(problem="not compared yet")
        """The newest comparison."""

    async def run(self) -> None:
        """Compares for ever; ends only by cancellation."""
        request = reading_pb2.CompareDriftRequest(
            window_seconds=self._settings.window_seconds, max_decisions=self._settings.max_decisions
        ).SerializeToString()
        if not self._settings.interval_seconds:
            await asyncio.Event().wait()  # a component that ends takes the server with it
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            try:
                state = admin_pb2.DriftStatus.FromString(await self._reading.ask(Question.DRIFT, request))
            except AuditError as error:
                self.state = admin_pb2.DriftStatus(problem=str(error))
                continue
            before, now = _drifted(self.state), _drifted(state)
            if before != now:
                _log.warning("drift", model_version=state.model_version, drifted=now, rows=state.rows)
            self.state = state


def _drifted(state: admin_pb2.DriftStatus) -> list[str]:
    return sorted(one.name for one in state.features if one.drifted)
