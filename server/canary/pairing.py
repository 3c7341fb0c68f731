"""Pairs what is seen of a canary with what is seen of the champion at about the same time.

What is slow or broken for both, such as a machine that stands still, then counts against neither.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_UNPAIRED: Final = 8
"""That wait for one of the other model, however long: where orders are few, the next one may come in seconds."""
_AT_ONCE_SECONDS: Final = 0.1
"""Within this time more of them wait: orders in columns are told of together, those of one model after the other's."""
_MOST: Final = 1_024
"""That wait in any case: four large blocks."""
_LATELY_SECONDS: Final = 1.0
"""A model of which nothing was seen for so long has nothing to compare with."""


class Side(enum.Enum):
    """Whose it was."""

    CANARY = 0
    CHAMPION = 1


class Pairing(Generic[T]):
    """What waits for something of the other model.

    Args:
        clock: Monotonic seconds.
        paired: Called with one of the canary and one of the champion.
        alone: Called with one of the canary where the champion had none for some time. One that found no partner
            because the champion had fewer is not told of at all.
    """

    def __init__(
        self, clock: Callable[[], float], paired: Callable[[T, T], None], alone: Callable[[T], None] | None = None
    ) -> None:
        self._clock = clock
        self._paired = paired
        self._alone = alone
        self._waiting: dict[Side, deque[tuple[float, T]]] = {side: deque() for side in Side}
        self._newest = dict.fromkeys(Side, -math.inf)

    def see(self, side: Side, value: T) -> None:
        """Something of one model, now."""
        now = self._newest[side] = self._clock()
        self.drop_old()
        other = self._waiting[Side(1 - side.value)]
        if not other:
            self._waiting[side].append((now, value))
            return
        # One of this moment, where there is one: the oldest may be from before a standstill. Of a busy champion, and a
        # canary of few flows, the canary alone would then look slow.
        while len(other) > 1 and other[0][0] < now - _AT_ONCE_SECONDS:
            other.popleft()
        _, waited = other.popleft()
        if side is Side.CANARY:
            self._paired(value, waited)
        else:
            self._paired(waited, value)

    def drop_old(self) -> None:
        """Waits no more for partners of what has waited too long."""
        since = self._clock() - _AT_ONCE_SECONDS
        for side, waiting in self._waiting.items():
            while len(waiting) >= _UNPAIRED and (waiting[0][0] < since or len(waiting) >= _MOST):
                came, value = waiting.popleft()
                rests = self._newest[Side.CHAMPION] < came - _LATELY_SECONDS
                if side is Side.CANARY and rests and self._alone is not None:
                    self._alone(value)


class Lately:
    """The mean of what was seen, over the last moments in which there was anything; 0 before.

    Args:
        clock: Monotonic seconds.
        seconds: A moment.
        moments: How many.
    """

    def __init__(self, clock: Callable[[], float], seconds: float, moments: int) -> None:
        self._clock = clock
        self._seconds = seconds
        self._means: deque[float] = deque(maxlen=moments)
        self._number = -1
        self._sum, self._count = 0.0, 0

    def see(self, value: float) -> None:
        """One more, now."""
        number = int(self._clock() // self._seconds)
        if number != self._number and self._count:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        self._number = number
        self._sum += value
        self._count += 1

    @property
    def mean(self) -> float:
        """Of the means of all moments, the one that goes on included."""
        means = [*self._means, self._sum / self._count] if self._count else self._means
        return sum(means) / len(means) if means else 0.0
