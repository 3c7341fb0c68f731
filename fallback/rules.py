"""Third source: a rules baseline that a trader can read, for when no model can answer.

TRADE if all of these hold, else NO_TRADE (features turned for the order's side, so that positive is favourable):

* ``spread_bps <= max_spread_bps``: crossing costs little.
* ``rv_5s_bps <= max_volatility_bps``: the market is calm.
* ``weighted_mid_bps >= -max_adverse_weighted_mid_bps``: the touch does not lean against us.
* ``imbalance_l5 >= -max_adverse_imbalance``: neither does the book.
* ``ofi_1s >= -max_adverse_ofi``: nor the order flow of the last second.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fallback.order import Answer, Case
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb


class RulesSettings(BaseModel):
    """Limits of the rules baseline, for a trader to decide: an order beyond any of them gets NO_TRADE."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_spread_bps: float = Field(default=2.0, ge=0)
    """Widest spread, in basis points of the mid."""
    max_volatility_bps: float = Field(default=8.0, ge=0)
    """Highest realised volatility of the last 5 s, in basis points."""
    max_adverse_weighted_mid_bps: float = Field(default=0.2, ge=0)
    """How far the weighted mid may lean against the order, in basis points."""
    max_adverse_imbalance: float = Field(default=0.3, ge=0, le=1)
    """How far the imbalance of the first five levels may lean against the order, 0 to 1."""
    max_adverse_ofi: float = Field(default=0.5, ge=0)
    """How far the order-flow imbalance of the last second may lean against the order, in units of mean depth."""


_SPREAD = features.MF1.index["spread_bps"]
_VOLATILITY = features.MF1.index["rv_5s_bps"]
_WEIGHTED_MID = features.MF1.index["weighted_mid_bps"]
_IMBALANCE = features.MF1.index["imbalance_l5"]
_OFI = features.MF1.index["ofi_1s"]


class RulesBaseline:
    """Answers by the rules above. Pure: the same features give the same answer."""

    def __init__(self, settings: RulesSettings, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.configure(settings)

    def configure(self, settings: RulesSettings) -> None:
        """Goes by these limits from the next case on."""
        self._at_most = (
            (_SPREAD, settings.max_spread_bps),
            (_VOLATILITY, settings.max_volatility_bps),
        )
        self._at_least = (
            (_WEIGHTED_MID, -settings.max_adverse_weighted_mid_bps),
            (_IMBALANCE, -settings.max_adverse_imbalance),
            (_OFI, -settings.max_adverse_ofi),
        )

    async def answer(self, case: Case) -> Answer | None:
        """TRADE or NO_TRADE, or None when there are no features or one that a rule needs is undefined."""
        started = self._clock()
        passed = None if case.features is None else self.passes(case.features)
        case.budget.charge(pb.STAGE_RULES, max(0.0, case.budget.remaining(started)), self._clock() - started)
        if passed is None:
            case.degradations.append(pb.DEGRADATION_RULES_UNDECIDED)
            return None
        if passed:
            return Answer(pb.ACTION_TRADE, pb.SOURCE_RULES, pb.REASON_CODE_RULES_PASSED)
        return Answer(pb.ACTION_NO_TRADE, pb.SOURCE_RULES, pb.REASON_CODE_RULES_OBJECTED)

    def passes(self, values: NDArray[np.float32]) -> bool | None:
        """Whether every rule agrees, or None when a feature that a rule needs is undefined.

        Args:
            values: float32[features of `mf1`], turned for the side of the order.
        """
        if any(math.isnan(values[i]) for i, _ in (*self._at_most, *self._at_least)):
            return None
        return all(values[i] <= limit for i, limit in self._at_most) and all(
            values[i] >= limit for i, limit in self._at_least
        )
