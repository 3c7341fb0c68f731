"""Numbers in tables that people read."""

from __future__ import annotations

import math


def figure(value: float, spec: str) -> str:
    """A number in this format; a dash for NaN: a share of nothing, or a value that is not defined."""
    return "–" if math.isnan(value) else format(value, spec)
