"""A decision that is being made, together with those of other callers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fallback.joint_case import JointCase

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fallback.budget import Budget
    from fallback.order import Answer, Order
    from server.decision.record import Decided


class Pending(JointCase):
    """A case, and what becomes of it until its caller has the decision."""

    __slots__ = ("answer", "decided", "durable_until", "on_end", "recorded_at")

    future: asyncio.Future[Decided]

    def __init__(
        self,
        order: Order,
        budget: Budget,
        future: asyncio.Future[Decided],
        on_result: Callable[[Pending], None],
        on_end: Callable[[Pending], None],
    ) -> None:
        super().__init__(order, budget, future, on_result)
        self.on_end = on_end
        """Called when its caller has the decision, or an error, or has gone."""
        self.answer: Answer | None = None
        self.decided: Decided | None = None
        """What is to become durable, from the moment it is written down."""
        self.recorded_at = math.nan
        """When that was, in monotonic seconds."""
        self.durable_until = math.nan
        """Until when the caller can wait for it."""

    def ended(self, _: asyncio.Future[Decided]) -> None:
        """What the future calls when it is done."""
        self.on_end(self)
