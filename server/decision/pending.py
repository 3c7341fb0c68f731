"""A decision that is being made, together with those of other callers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, TypeAlias

from fallback.joint_case import JointCase

if TYPE_CHECKING:
    from collections.abc import Callable

    from fallback.budget import Budget
    from fallback.order import Answer, Order
    from server.decision.promise import Promise
    from server.decision.record import Decided


class Pending(JointCase):
    """A case, and what becomes of it until its caller has the decision."""

    __slots__ = ("answer", "decided", "durable_until", "has_place", "recorded_at")

    future: Waited

    def __init__(
        self,
        order: Order,
        budget: Budget,
        future: Waited,
        on_result: Callable[[Pending], None],
        has_place: bool,
    ) -> None:
        super().__init__(order, budget, future, on_result)
        self.has_place = has_place
        """Whether it has a place of `Admission`; that of an order with an idempotency key has its call."""
        self.answer: Answer | None = None
        self.decided: Decided | None = None
        """What is to become durable, from the moment it is written down."""
        self.recorded_at = math.nan
        """When that was, in monotonic seconds."""
        self.durable_until = math.nan
        """Until when the caller can wait for it."""


class Joined(Protocol):
    """Orders that are decided together with others; see `many_calls.py`."""

    def leave(self, promise: Waited) -> Decided | None:
        """The caller of an order has gone; its decision, if that is written down by now."""
        ...


Waited: TypeAlias = "Promise[Pending | Joined]"
"""What the caller of an order waits for. Its case is the block that the order is in, as long as it is in one."""
