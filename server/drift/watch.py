"""Drift as the server sees it: asked now and then of a process that reads the audit, off the way of decisions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import structlog
from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from server.audit.reading.reading import Question, Reading
from server.drift.summary import Drift, Summary
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
    """The newest decisions of that time are looked at, at most so many. Enough for the statistics, and about a second
    of one core."""


class DriftRequest(BaseModel):
    """What a reading process is asked."""

    window_seconds: float
    max_decisions: int


@dataclass(frozen=True, slots=True)
class DriftState:
    """The newest comparison."""

    model_version: str = ""
    problem: str = "not compared yet"
    rows: int = 0
    drifts: tuple[Drift, ...] = ()


def packed(summary: Summary) -> bytes:
    """What a reading process answers."""
    state = DriftState(summary.model_version, summary.problem, summary.rows, summary.drifts)
    return json.dumps(asdict(state)).encode()


def unpacked(answer: bytes) -> DriftState:
    """Such an answer."""
    content = json.loads(answer)
    drifts = tuple(Drift(**one) for one in content.pop("drifts"))
    return DriftState(**content, drifts=drifts)


class DriftWatch:
    """Keeps the newest comparison; says so once when something drifts or has stopped to.

    Args:
        reading: The process that makes it.
        settings: How often, and of what.
    """

    def __init__(self, reading: Reading, settings: DriftSettings) -> None:
        self._reading = reading
        self._settings = settings
        self.state = DriftState()
        """The newest comparison."""

    async def run(self) -> None:
        """Compares for ever; ends only by cancellation."""
        request = DriftRequest(
            window_seconds=self._settings.window_seconds, max_decisions=self._settings.max_decisions
        ).model_dump_json()
        if not self._settings.interval_seconds:
            await asyncio.Event().wait()  # a component that ends takes the server with it
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            try:
                state = unpacked(await self._reading.ask(Question.DRIFT, request.encode()))
            except AuditError as error:
                self.state = DriftState(problem=str(error))
                continue
            before, now = _drifted(self.state.drifts), _drifted(state.drifts)
            if before != now:
                _log.warning("drift", model_version=state.model_version, drifted=now, rows=state.rows)
            self.state = state


def _drifted(drifts: Sequence[Drift]) -> list[str]:
    return sorted(one.name for one in drifts if one.drifted)
