"""Orders that wait for others to be decided with, while nobody could answer them sooner."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from server.decision.promise import Promise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fallback.order import Order
    from server.decision.pending import Joined, Pending
    from server.decision.promise import Promises

_ENOUGH: Final = 32
"""Orders that wait for no more: what a block costs besides its orders is then a small part, and a batch of so many rows
is worth a model server's call (`server/inference/pacing.py`)."""
_PATIENCE_SECONDS: Final = 0.002
"""The longest that an order waits: about as long as a batch is under way."""
_HURRIED_SECONDS: Final = 0.01
"""An order that is allowed less than this waits for nobody."""


class Waiting(Promise["Pending | Joined"]):
    """The promise of an order that is decided with others of its time.

    Args:
        promises: See `Promise`.
        order: What is asked.
        arrived: When it came, in monotonic seconds.
        deadline: Until when its caller waits, likewise.
    """

    __slots__ = ("arrived", "deadline", "order")

    def __init__(self, promises: Promises[Pending | Joined], order: Order, arrived: float, deadline: float) -> None:
        super().__init__(promises)
        self.order = order
        self.arrived = arrived
        self.deadline = deadline


class Gathering:
    """Keeps orders that come in small bursts until they are worth a block.

    What is asked first says whether it is busy: the model server has a batch under way, or the journal a commit, so
    that an order that is taken up now would only wait there. It waits here instead, until that has ended, or 32 are
    here, or two milliseconds have passed. An order that is alone in the server does not come here.

    Args:
        is_busy: Whether so many orders had better wait.
        look: Called when the wait is over for one of them.
    """

    def __init__(self, is_busy: Callable[[int], bool], look: Callable[[], None]) -> None:
        self._is_busy = is_busy
        self._look = look
        self._waiting: list[Waiting] = []
        self._is_over = False
        """Whether one of them waits no longer."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Orders that wait."""
        return len(self._waiting)

    def add(self, waiting: Sequence[Waiting]) -> None:
        """Orders have come, at one instant."""
        self._waiting += waiting
        for one in waiting:
            if one.deadline - one.arrived < _HURRIED_SECONDS:
                self._is_over = True

    def take(self) -> list[Waiting]:
        """The orders to be taken up now: all, or none while they gather."""
        waiting = self._waiting
        if waiting and not self._is_over and len(waiting) < _ENOUGH and self._is_busy(len(waiting)):
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_PATIENCE_SECONDS, self._end)
            return []
        self._waiting, self._is_over = [], False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return waiting

    def freed(self) -> None:
        """What was busy may be so no longer."""
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._look)

    def _end(self) -> None:
        self._timer, self._is_over = None, True
        self._look()
