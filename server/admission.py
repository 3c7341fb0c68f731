"""Admission control: how many decisions may be under way at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from server.errors import DrainingError, OverloadedError


class AdmissionSettings(BaseModel):
    """Bounds of admission."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_in_flight: int = Field(default=512, ge=1, le=1_000_000)
    """Decisions under way at once; a call beyond it is shed with RESOURCE_EXHAUSTED."""


class Admission:
    """Counts decisions under way and sheds those beyond the limit. `with admission:` spans one decision."""

    def __init__(self, settings: AdmissionSettings) -> None:
        self._limit = settings.max_in_flight
        self.in_flight = 0
        """Decisions under way."""
        self.shed = 0
        """Decisions refused because too many were under way."""
        self.draining = False
        """True: no new decision is admitted."""

    def __enter__(self) -> None:
        """Admits one decision.

        Raises:
            DrainingError: The server is about to stop.
            OverloadedError: Too many decisions are under way.
        """
        if self.draining:
            raise DrainingError("DRAINING", "the server is draining; try another one")
        if self.in_flight >= self._limit:
            self.shed += 1
            raise OverloadedError("TOO_MANY_IN_FLIGHT", f"{self._limit} decisions are under way; try again shortly")
        self.in_flight += 1

    def __exit__(self, *_: object) -> None:
        self.in_flight -= 1
