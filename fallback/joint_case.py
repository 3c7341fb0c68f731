"""A case that the first stage of the chain takes up together with others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from fallback.order import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from fallback.budget import Budget
    from fallback.chain import Asked
    from fallback.order import Order


class Ending(Protocol):
    """What the caller of a case waits for."""

    def done(self) -> bool:
        """True when there is a decision, or will be none."""
        ...


class JointCase(Case):
    """A case, its first attempt, and who waits for its end.

    While the attempt is under way, the case takes the place of a future: the batcher and its deadlines ask `done` and
    call `set_result`.
    """

    __slots__ = ("allowed", "asked", "asked_at", "asked_of", "future", "on_result", "result")

    def __init__(self, order: Order, budget: Budget, future: Ending, on_result: Callable[[Any], None]) -> None:
        super().__init__(order, budget)
        self.future = future
        """Of its caller, who cancels it when nobody waits for the decision any more."""
        self.on_result = on_result
        """Called once with the case when the result of its first attempt is there."""
        self.asked: tuple[Asked, ...] = ()
        """The stages of the chain when the first of them was begun; empty until then."""
        self.asked_at = math.nan
        """When the first attempt began, in monotonic seconds."""
        self.asked_of = ""
        """The replica that it is made at, where there may be several; empty for none."""
        self.allowed = 0.0
        """Seconds that it may take."""
        self.result: Any = None
        """Of the kind that the stage gives; None until there is one."""

    def done(self) -> bool:
        """True when nobody waits for the first attempt: its result is there, or its caller has gone."""
        return self.result is not None or self.future.done()

    def set_result(self, result: Any) -> None:
        """The result of the first attempt."""
        self.result = result
        self.on_result(self)
