"""What the audit says of itself, asked now and then of a process that reads it, off the way of decisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import structlog
from pydantic import BaseModel, ConfigDict, Field

from pretrade.wire.reading import reading_pb2
from server.audit.reading.reading import Question, Reading
from server.errors import AuditError

_log = structlog.get_logger(__name__)


class AuditWatchSettings(BaseModel):
    """Looks for scores that labels contradict, for labels that are old, and for journals that nobody ships."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    interval_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """Seconds between two looks; 0 makes none."""


class AuditWatch:
    """Keeps the newest answer; says so once when journals are stranded or deserted, or no longer are.

    Args:
        reading: The process that looks.
        settings: How often.
        champions: The version that decides by the name of its model; empty while none does.
    """

    def __init__(
        self, reading: Reading, settings: AuditWatchSettings, champions: Callable[[], Mapping[str, str]]
    ) -> None:
        self._reading = reading
        self._settings = settings
        self._champions = champions
        self.newest: reading_pb2.CheckAuditResponse | None = None
        """The newest answer; None while there is none, and when the last look failed."""
        self.failures = 0
        """Looks that failed."""

    async def run(self) -> None:
        """Looks for ever; ends only by cancellation."""
        if not self._settings.interval_seconds:
            await asyncio.Event().wait()  # a component that ends takes the server with it
        stranded: list[str] = []
        deserted: dict[str, str] = {}
        while True:
            await asyncio.sleep(self._settings.interval_seconds)
            request = reading_pb2.CheckAuditRequest(champions=self._champions())
            try:
                answer = await self._reading.ask(Question.CHECK, request.SerializeToString())
            except AuditError as error:
                if self.newest is not None or not self.failures:
                    _log.warning("audit_not_checked", error=str(error))
                self.failures += 1
                self.newest = None
                continue
            self.newest = reading_pb2.CheckAuditResponse.FromString(answer)
            if (now := sorted(self.newest.stranded)) != stranded:
                _log.warning("journals_stranded", journals=now)
                stranded = now
            if (gone := dict(self.newest.deserted)) != deserted:
                _log.warning("journals_deserted", journals=gone)
                deserted = gone
