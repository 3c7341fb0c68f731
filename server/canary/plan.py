"""What all processes know of a canary: part of the control state, changed by pure functions.

Every change starts from what the control state holds at that moment. A transition that does not fit that state changes
nothing. If one process has just rolled a canary back, another process that has not seen this yet cannot take a step.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.canary.settings import check_steps

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
        )

    @property
    def running(self) -> bool:
        """True until it ends."""
        return self.state == "running"

    @property
    def at_last_step(self) -> bool:
        """True when the only step left is to become the champion."""
        return self.step >= len(self.steps) - 1

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
        to the canary stays with it while its weight grows, and another canary begins with other flows.
        """
        if self.weight >= 1.0:
            return True
        if not self.weight:
            return False
        flow = f"{self.canary_id}\0{instrument}\0{strategy}".encode()
        place = int.from_bytes(hashlib.blake2b(flow, digest_size=8).digest())
        return place < self.weight * 2**64
