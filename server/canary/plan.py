"""What all processes know of a canary: part of the control state, changed by pure functions.

Every change starts from what the control state holds at that moment. A transition that does not fit that state changes
nothing. If one process has just rolled a canary back, another process that has not seen this yet cannot take a step.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.canary.settings import check_steps
from server.inference.model_map import fits

PatternOrAll = Annotated[str, Field(pattern=r"^[!-~]{0,64}$")]
"""A pattern as the model map has them, or nothing for every text."""
_MOST_FLOWS: Final = 10_000
"""Flows of which it is remembered where they belong: callers may make up strategies."""
StateName = Literal["running", "promoted", "rolled_back", "aborted"]


class Canary(BaseModel):
    """One version's trial."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    canary_id: str
    """Unique, time-ordered."""
    model_version: str = Field(pattern="^[0-9a-f]{16}$")
    champion_version: str = Field(pattern="^[0-9a-f]{16}$")
    """What it is compared with."""
    state: StateName = "running"
    steps: tuple[float, ...] = Field(min_length=1)
    """Share of the order flows at each step, in (0, 1]."""
    step: int = Field(default=0, ge=0)
    """Index of the step that it is at; the number of steps once it is promoted."""
    weight: float = Field(ge=0, le=1)
    """Share of the order flows in force; 0 once it ended."""
    held: bool = False
    """True while an operator holds it at its weight."""
    instrument: PatternOrAll = ""
    """Pattern of the instruments whose orders it may get; empty for all."""
    strategy: PatternOrAll = ""
    """Of the strategies, likewise."""
    started_at: float
    """Seconds since the Unix epoch, as all instants here: several hosts share them."""
    step_started_at: float
    ended_at: float | None = None
    author: str
    reason: str
    ending: str = ""
    """Why it ended; empty while it has not."""

    @field_validator("steps")
    @classmethod
    def _increase_to_one(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        check_steps(steps)
        return steps

    @classmethod
    def start(
        cls,
        canary_id: str,
        model_version: str,
        champion_version: str,
        steps: tuple[float, ...],
        author: str,
        reason: str,
        now: float,
        instrument: str = "",
        strategy: str = "",
    ) -> Self:
        """A canary at its first step."""
        return cls(
            canary_id=canary_id,
            model_version=model_version,
            champion_version=champion_version,
            steps=steps,
            weight=steps[0],
            started_at=now,
            step_started_at=now,
            author=author,
            reason=reason,
            instrument=instrument,
            strategy=strategy,
        )

    @property
    def running(self) -> bool:
        """True until it ends."""
        return self.state == "running"

    @property
    def at_last_step(self) -> bool:
        """True when the only step left is to become the champion."""
        return self.step >= len(self.steps) - 1

    @property
    def is_partial(self) -> bool:
        """True when it is held to a part of the orders. What it proves there says nothing of the others."""
        return bool(self.instrument or self.strategy)

    @property
    def awaits_operator(self) -> bool:
        """True when no evidence takes it further: it decides all that it covers until somebody promotes or ends it."""
        return self.is_partial and self.at_last_step

    def covers(self, instrument: str, strategy: str) -> bool:
        """True when it may get orders of this flow: the others are no concern of its at all."""
        return not self.is_partial or _covers(self.instrument, self.strategy, instrument, strategy)

    def advanced(self, now: float) -> Self:
        """At the next step."""
        step = min(self.step + 1, len(self.steps) - 1)
        return self.model_copy(update={"step": step, "weight": self.steps[step], "step_started_at": now})

    def weighted(self, weight: float, held: bool, now: float) -> Self:
        """At a weight that an operator chose; not held, it goes on from the last step that is not above it."""
        below = [index for index, share in enumerate(self.steps) if share <= weight]
        update = {"weight": weight, "held": held, "step": below[-1] if below else 0, "step_started_at": now}
        return self.model_copy(update=update)

    def ended(self, state: StateName, why: str, now: float) -> Self:
        """Without any order from now on, by this name at least."""
        update = {"state": state, "weight": 0.0, "held": False, "ended_at": now, "ending": why}
        if state == "promoted":
            update["step"] = len(self.steps)
        return self.model_copy(update=update)

    def takes(self, instrument: str, strategy: str) -> bool:
        """True when the canary decides the orders of this flow.

        A flow's place depends on it and on the canary alone: every process of every server agrees, a flow that has come
        to the canary stays with it while its weight grows, and another canary begins with other flows. Its weight is a
        share of the flows that it covers.
        """
        if not self.covers(instrument, strategy):
            return False
        if self.weight >= 1.0:
            return True
        if not self.weight:
            return False
        return _place(self.canary_id, instrument, strategy) < self.weight * 2**64

    @property
    def takes_all(self) -> bool:
        """True when the canary decides every order."""
        return self.weight >= 1.0 and not self.is_partial


@lru_cache(_MOST_FLOWS)
def _place(canary_id: str, instrument: str, strategy: str) -> int:
    """Where a flow is among all that there may be, in [0, 2**64)."""
    flow = f"{canary_id}\0{instrument}\0{strategy}".encode()
    return int.from_bytes(hashlib.blake2b(flow, digest_size=8).digest())


@lru_cache(_MOST_FLOWS)
def _covers(instrument_pattern: str, strategy_pattern: str, instrument: str, strategy: str) -> bool:
    return fits(instrument_pattern, instrument) and fits(strategy_pattern, strategy)
