"""The label that a model has learnt, as far as a server needs to know it: what the market does after an order.

An order reaches the market `delay_seconds` after its decision and is done at `price`, the mid or the touch that it can
be executed at. `horizon_seconds` later its side-signed markout is what it gained against the mid, in basis points.
Training writes the label into a model's metadata (`torchserve/label.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class Markout(NamedTuple):
    """How the market is looked at after an order."""

    horizon_seconds: float = 5.0
    """From the price of the order to the mid that it is held against."""
    delay_seconds: float = 0.0
    """From the decision to the price of the order."""
    price: Literal["mid", "touch"] = "mid"
    """What the order is done at: the mid, or the ask for a buy and the bid for a sell."""
    worst_bps: float = -1.0
    """An order is *eligible* when its markout is not worse than this."""

    @property
    def span_seconds(self) -> float:
        """From the decision to the end of the horizon."""
        return self.delay_seconds + self.horizon_seconds


def markout_of(metadata: Mapping[str, Any]) -> Markout:
    """The label of a model; the default for one that was made before models said theirs.

    Raises:
        ValueError, KeyError, TypeError: It makes no sense.
    """
    label = metadata.get("label")
    if not isinstance(label, Mapping):
        return Markout()
    price = label["price"]
    if price not in ("mid", "touch"):
        raise ValueError(f"label: no price {price!r}")
    horizon, delay, worst = (float(label[name]) for name in ("horizon_seconds", "delay_seconds", "worst_markout_bps"))
    if not (0 < horizon < math.inf and 0 <= delay < math.inf and math.isfinite(worst)):
        raise ValueError(f"label: no market is looked at {delay} and {horizon} s later, or none is worse than {worst}")
    return Markout(horizon, delay, price, worst)
