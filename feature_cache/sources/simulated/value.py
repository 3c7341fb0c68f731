"""What an instrument is worth: a jump diffusion that only informed traders see."""

from __future__ import annotations

import math
import random
from typing import Final, NamedTuple

STEP_SECONDS: Final = 0.01
"""The diffusion's step; between two steps the value stays where it is."""


class Volatility(NamedTuple):
    """How the value moves; basis points, seconds."""

    diffusion: float = 0.57
    """Median standard deviation of the diffusion over one second."""
    spell: float = 20.0
    """How long a calm or a lively spell lasts."""
    sigma: float = 0.57
    """Standard deviation of the logarithm of the diffusion's standard deviation."""
    jumps: float = 0.14
    """Mean number of jumps per second."""
    smallest: float = 0.7
    """The smallest jump. P(jump > x) = (smallest / x)^tail."""
    tail: float = 2.3
    largest: float = 22.0
    """No jump is larger."""

    def scaled(self, factor: float) -> Volatility:
        """The same with moves of the value that are this many times larger."""
        return self._replace(
            diffusion=self.diffusion * factor, smallest=self.smallest * factor, largest=self.largest * factor
        )


class Value:
    """The path of one symbol's value. It is the same for whoever asks, in whatever steps: only the seed counts.

    Args:
        seed: What the path follows from.
        price: Where it begins.
        volatility: How it moves.
    """

    def __init__(self, seed: str, price: float, volatility: Volatility) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation must repeat itself
        self._volatility = volatility
        self._lively = volatility.sigma * self._random.gauss(0, 1)
        self._price = price
        self._steps = 0
        self.news = 0.0
        """The sum of all jumps' sizes so far, in basis points: it grows when there is news."""

    def shift(self, bps: float) -> None:
        """Moves the value by news of this size."""
        self._price *= math.exp(bps / 1e4)
        self.news += abs(bps)

    def at(self, seconds: float) -> float:
        """The value at a time, which never runs back."""
        steps = int(seconds / STEP_SECONDS)
        while self._steps < steps:
            self._steps += 1
            self._step()
        return self._price

    def _step(self) -> None:
        draw, volatility = self._random, self._volatility
        decay = math.exp(-STEP_SECONDS / volatility.spell)
        self._lively = self._lively * decay + volatility.sigma * math.sqrt(1 - decay * decay) * draw.gauss(0, 1)
        bps = volatility.diffusion * math.exp(self._lively) * math.sqrt(STEP_SECONDS) * draw.gauss(0, 1)
        if draw.random() < volatility.jumps * STEP_SECONDS:
            size = min(volatility.largest, volatility.smallest * (1 - draw.random()) ** (-1 / volatility.tail))
            self.news += size
            bps += size if draw.random() < 0.5 else -size
        self._price *= math.exp(bps / 1e4)
