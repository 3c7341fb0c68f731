"""The pauses between attempts at something that keeps failing."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Pauses that double from one failed attempt to the next, up to a longest one.

    Each pause is multiplied by a random factor, so that callers which failed together do not all try again together.

    Args:
        shortest_seconds: The first pause.
        longest_seconds: No pause is longer, apart from the random factor.
        spread: The two ends between which the factor lies. `(1.0, 1.0)` leaves every pause as it is.
        uniform: Uniform in [0, 1), for the factor.
    """

    def __init__(
        self,
        shortest_seconds: float,
        longest_seconds: float,
        spread: tuple[float, float] = (0.5, 1.0),
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._shortest = shortest_seconds
        self._longest = longest_seconds
        self._first_factor, self._last_factor = spread
        self._uniform = uniform
        self.reset()

    def reset(self) -> None:
        """Begins again with the first pause, as after a success."""
        self.seconds = min(self._shortest, self._longest)
        """The next pause before the random factor, for the log."""

    def next_pause(self) -> float:
        """The seconds to wait before the next attempt. The pause after that is twice as long."""
        pause = self.seconds
        self.seconds = min(2 * pause, self._longest)
        return pause * (self._first_factor + (self._last_factor - self._first_factor) * self._uniform())
