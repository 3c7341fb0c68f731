"""What pages draw of numbers: the evidence of a canary over time, how far scores can be believed, and drift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pretrade.admin.v1 import admin_pb2 as pb

WIDTH: Final = 240.0
"""Of a small curve, in its own units."""
HEIGHT: Final = 36.0
SIDE: Final = 300.0
"""Of the square in which scores are held against what became of them."""
_LARGEST: Final = 14.0
"""Radius of the dot that stands for the most samples."""
_SMALLEST: Final = 2.5
"""A dot can be seen, however few samples it stands for."""
_HEAT_EDGES: Final = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Between the shades of a heat map, in limits."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a check of a canary went."""

    canary: tuple[str, ...]
    """Points of its lines; where nothing was known a line ends, and the next one begins."""
    champion: tuple[str, ...]
    low: float
    """Value at the lower edge; NaN where nothing was ever known."""
    high: float
    """Value at the upper edge."""
    seconds: float
    """From the first look to the last."""


@dataclass(frozen=True, slots=True)
class Dot:
    """One bin of the scores."""

    x: float
    y: float
    radius: float
    one: pb.ReliabilityBin


def growths(history: pb.CanaryHistory) -> dict[str, Growth]:
    """A picture for each check, by its name."""
    return {check.name: _growth(history.at_ns, check) for check in history.checks}


def _growth(at_ns: Sequence[int], check: pb.CanaryCheckHistory) -> Growth:
    known = [value for value in (*check.canary, *check.champion) if not math.isnan(value)]
    low, high = min(known, default=math.nan), max(known, default=math.nan)
    span = max(at_ns[-1] - at_ns[0], 1)

    def lines(values: Sequence[float]) -> Iterator[str]:
        points: list[str] = []
        for at, value in zip(at_ns, values, strict=True):
            if math.isnan(value):
                if points:
                    yield " ".join(points)
                points = []
                continue
            share = 0.5 if high == low else (value - low) / (high - low)
            # Two units of the edge are left free, so that a line there is not cut in half.
            points.append(f"{WIDTH * (at - at_ns[0]) / span:.1f},{2 + (HEIGHT - 4) * (1 - share):.1f}")
        if points:
            yield " ".join(points)

    return Growth(tuple(lines(check.canary)), tuple(lines(check.champion)), low, high, (at_ns[-1] - at_ns[0]) / 1e9)


def dots(bins: Sequence[pb.ReliabilityBin]) -> list[Dot]:
    """A dot for each bin, whose area is its samples. On the diagonal scores are what becomes of them."""
    most = max((one.samples for one in bins), default=1)
    return [
        Dot(
            SIDE * one.mean_score,
            SIDE * (1 - one.eligible),
            max(_SMALLEST, _LARGEST * math.sqrt(one.samples / most)),
            one,
        )
        for one in bins
    ]


def heat(psi: float, feature: pb.FeatureDrift) -> int:
    """The shade of a cell, 1 to 6, by how many limits of its feature the index is; 0 for a feature without a limit."""
    if not feature.HasField("limit") or feature.limit <= 0:
        return 0
    return 1 + sum(psi / feature.limit >= edge for edge in _HEAT_EDGES)
