"""Arrivals that excite one another: a Hawkes process whose kernel is a sum of exponentials.

The intensity is λ(t) = µ + Σ over arrivals s < t of Σ_k n_k·β_k·exp(−β_k·(t − s)). An arrival brings n_k further
ones on average within about 1/β_k seconds; Σ n_k is below 1. Ogata's thinning draws from it exactly: λ only falls
between two arrivals, so that its value now is a bound until the next one.

Y. Ogata, "On Lewis' simulation method for point processes", IEEE Transactions on Information Theory 27 (1981).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Kernel(NamedTuple):
    """One exponential of the sum."""

    offspring: float
    """n_k, the mean number of arrivals that an arrival brings."""
    decay: float
    """β_k per second."""


class Hawkes:
    """The intensity of arrivals; who uses it draws them.

    Args:
        base: µ, arrivals per second that no other one brings.
        kernels: The sum's parts, the fastest first.
    """

    __slots__ = ("_base", "_decays", "_jumps", "_states")

    def __init__(self, base: float, kernels: Sequence[Kernel]) -> None:
        self._base = base
        self._decays = [kernel.decay for kernel in kernels]
        self._jumps = [kernel.offspring * kernel.decay for kernel in kernels]
        self._states = [0.0] * len(kernels)

    def intensity(self) -> float:
        """λ now, arrivals per second."""
        return self._base + sum(self._states)

    def elapse(self, seconds: float) -> None:
        """Lets time pass without an arrival."""
        exp = math.exp
        self._states = [state * exp(-decay * seconds) for state, decay in zip(self._states, self._decays, strict=True)]

    def arrive(self) -> None:
        """Takes an arrival in."""
        self._states = [state + jump for state, jump in zip(self._states, self._jumps, strict=True)]

    def excite(self, arrivals: float) -> None:
        """Adds what brings this many arrivals at once, by the fastest part; news does."""
        self._states[0] += arrivals * self._decays[0]
