"""The time an answer may take, as a ledger of what each stage used."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from pretrade.decision.v1 import decision_pb2 as pb

Use = tuple[pb.Stage.ValueType, float, float, pb.Degradation.ValueType]
"""(stage, seconds allowed, seconds used, why it was skipped or UNSPECIFIED)."""


class BudgetSettings(BaseModel):
    """How a decision's time is divided."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cap_seconds: float = Field(default=0.05, gt=0, le=10)
    """Longest time for a decision, in seconds; the caller's deadline applies when it is shorter. Raise it only if your
    callers can wait longer."""
    fallback_reserve_seconds: Constant[float] = 0.0005
    """Kept for cached score, rules and guards, in seconds; never lent to a model attempt. Cached score and rules take a
    small part of it."""
    audit_reserve_seconds: float = Field(default=0.004, gt=0, le=1)
    """Time reserved for making the packet durable and sending the reply, in seconds; no model attempt may use it. It
    grows with what the audit recently took, up to half of the allowed time. Raise it for a slow disk."""
    reply_reserve_seconds: float = Field(default=0.002, gt=0, le=1)
    """Part of the audit's reserve that is for sending the reply, in seconds. It grows with the event loop's delay, up
    to a quarter of the allowed time. Raise it when replies are sent just after their deadline."""
    first_attempt_share: Constant[float] = 0.5
    """Part of the time left to models that the first attempt gets while a second replica could still take a retry. Both
    attempts at a replica then have the same chance."""


class Budget:
    """Deadline and expenses of one decision. Instants are seconds on the server's monotonic clock.

    The sum of the stages' use never exceeds `used`: stages do not overlap.
    """

    __slots__ = ("arrived", "deadline", "reserve_seconds", "uses")

    def __init__(self, arrived: float, deadline: float, reserve_seconds: float = 0.0) -> None:
        self.arrived = arrived
        self.deadline = deadline
        self.reserve_seconds = reserve_seconds
        """What model attempts may not touch."""
        self.uses: list[Use] = []
        """In the order of the stages."""

    def copy(self) -> Budget:
        """One that is charged by itself from now on."""
        made = Budget(self.arrived, self.deadline, self.reserve_seconds)
        made.uses = self.uses.copy()
        return made

    @property
    def allowed(self) -> float:
        """Seconds from arrival to the deadline."""
        return self.deadline - self.arrived

    def remaining(self, now: float) -> float:
        """Seconds to the deadline; negative when it has passed."""
        return self.deadline - now

    def for_models(self, now: float) -> float:
        """Seconds a model attempt may take from now; negative when there are none."""
        return self.deadline - now - self.reserve_seconds

    def charge(self, stage: pb.Stage.ValueType, allowed_seconds: float, used_seconds: float) -> None:
        """Writes down what a stage was allowed and used."""
        self.uses.append((stage, allowed_seconds, used_seconds, pb.DEGRADATION_UNSPECIFIED))

    def skip(self, stage: pb.Stage.ValueType, allowed_seconds: float, reason: pb.Degradation.ValueType) -> None:
        """Writes down that a stage was passed over, and what it would have been allowed."""
        self.uses.append((stage, allowed_seconds, 0.0, reason))
