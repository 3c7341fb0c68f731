"""The time ledger of a decision as a waterfall: each stage begins where the one before it ended."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pretrade.decision.v1 import decision_pb2 as pb

WIDTH: Final = 1_000.0
"""Of the picture, in its own units."""
_THINNEST: Final = 2.0
"""A stage that ran can be seen, however short it was."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One stage."""

    use: pb.StageUse
    left: float
    """Where it begins, in units of `WIDTH`."""
    width: float
    """0 for a stage that was passed over."""


def waterfall(budget: pb.Budget) -> list[Bar]:
    """The stages of a decision, in order."""
    return list(_bars(budget))


def _bars(budget: pb.Budget) -> Iterator[Bar]:
    total = max(budget.used_us, sum(stage.used_us for stage in budget.stages), 1)
    began = 0
    for stage in budget.stages:
        left = WIDTH * began / total
        width = 0.0 if stage.skipped else max(WIDTH * stage.used_us / total, _THINNEST)
        yield Bar(stage, min(left, WIDTH - width), width)
        began += stage.used_us


def named_vector(packed: bytes, names: Sequence[str]) -> list[tuple[str, float]]:
    """The features that the rules, the guards and as a rule the model saw, by name.

    Args:
        packed: Little-endian float32.
        names: In their order; features without one are called by their number.
    """
    whole = packed[: len(packed) // 4 * 4]
    values = [value for (value,) in struct.iter_unpack("<f", whole)]
    called = [*names, *(f"number {number}" for number in range(len(names), len(values)))]
    return list(zip(called, values, strict=False))
