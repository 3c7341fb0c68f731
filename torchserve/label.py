"""The label: what the market has to do after an order for it to have been right to send it.

An order that is decided at t reaches the market `delay_seconds` later. What it is done at is `price` at that moment:
the mid, or the touch that it can be executed at, the ask for a buy and the bid for a sell. It is marked at the mid
`horizon_seconds` after that::

    markout = side * 1e4 * (mid(t + delay + horizon) / price(t + delay) - 1)      bps, side +1 for a buy, -1 for a sell

The order is *eligible* when the markout is not worse than `worst_markout_bps`. A model carries the label that it learnt
in its metadata; whoever holds its decisions against the market goes by that (`server/models/markout.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

TICK_NS: Final = 100_000_000
"""Between two looks at the market; delay and horizon are whole numbers of it."""


def _whole_ticks(seconds: float) -> float:
    if abs(seconds * 1e9 / TICK_NS - round(seconds * 1e9 / TICK_NS)) > 1e-6:
        raise ValueError(f"not a whole number of {TICK_NS / 1e6:g} ms")
    return seconds


Seconds = Annotated[float, AfterValidator(_whole_ticks)]


class Label(BaseModel):
    """What is learnt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    horizon_seconds: Seconds = Field(default=5.0, ge=0.1, le=60)
    """From the market's price to the mid that it is held against."""
    delay_seconds: Seconds = Field(default=0.0, ge=0, le=10)
    """From the decision to the market."""
    price: Literal["mid", "touch"] = "mid"
    """What the order is done at."""
    worst_markout_bps: float = Field(default=-1.0, allow_inf_nan=False)
    """The worst markout of an eligible order."""

    @property
    def delay_ticks(self) -> int:
        """The delay, in ticks."""
        return round(self.delay_seconds * 1e9 / TICK_NS)

    @property
    def span_ticks(self) -> int:
        """From the decision to the end of the horizon, in ticks."""
        return self.delay_ticks + round(self.horizon_seconds * 1e9 / TICK_NS)

    @property
    def span_ns(self) -> int:
        """From the decision to the end of the horizon: no price after that is in the label."""
        return self.span_ticks * TICK_NS

    @property
    def described(self) -> dict[str, Any]:
        """For a model's metadata: the parameters, and what they say in words."""
        return {**self.model_dump(), "text": self.text}

    @property
    def text(self) -> str:
        """In words, for people."""
        reached = f", done {self.delay_seconds:g} s after the decision," if self.delay_seconds else ""
        price = "mid markout" if self.price == "mid" else "markout of the executable touch"
        return (
            f"side-signed {price}{reached} over the next {self.horizon_seconds:g} s"
            f" not worse than {self.worst_markout_bps:g} bp"
        )


STUDIED: Final = tuple(
    Label(horizon_seconds=horizon, delay_seconds=delay) for delay in (0.0, 0.2) for horizon in (0.5, 1.0, 2.0, 5.0)
)
"""Labels that a card compares."""
