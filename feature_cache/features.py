"""The feature set `mf1`: names, order, and how a vector is turned for the side of an order.

The formulas are in `engine.py`; this module is what a model, a store and a server must agree on. Undefined is NaN.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

FEATURE_SET_ID: Final = "mf1"

NAMES: Final[tuple[str, ...]] = (
    "spread_bps",
    "weighted_mid_bps",
    "imbalance_l1",
    "imbalance_l5",
    "imbalance_l10",
    "ofi_100ms",
    "ofi_1s",
    "ofi_5s",
    "trade_imbalance_1s",
    "trade_imbalance_5s",
    "trade_rate_1s",
    "trade_rate_5s",
    "ret_1s_bps",
    "ret_5s_bps",
    "ret_30s_bps",
    "ret_mean_50",
    "ret_std_50",
    "n_50",
    "rv_1s_bps",
    "rv_5s_bps",
    "rv_30s_bps",
    "depth_l5_notional_bid",
    "depth_l5_notional_ask",
    "book_age_ms",
    "trade_age_ms",
)
N_FEATURES: Final = len(NAMES)
INDEX: Final[dict[str, int]] = {name: i for i, name in enumerate(NAMES)}

FINGERPRINT: Final = zlib.crc32(f"{FEATURE_SET_ID}:{','.join(NAMES)}".encode())
"""uint32 that changes with the id, a name or the order; carried by every vector and every model answer."""

SIGNED: Final[tuple[str, ...]] = (
    "weighted_mid_bps",
    "imbalance_l1",
    "imbalance_l5",
    "imbalance_l10",
    "ofi_100ms",
    "ofi_1s",
    "ofi_5s",
    "trade_imbalance_1s",
    "trade_imbalance_5s",
    "ret_1s_bps",
    "ret_5s_bps",
    "ret_30s_bps",
    "ret_mean_50",
)
"""Features that carry a direction: negated for a sell."""

_SELL_SIGN: Final[NDArray[np.float32]] = np.array([-1.0 if name in SIGNED else 1.0 for name in NAMES], dtype=np.float32)
_BID, _ASK = INDEX["depth_l5_notional_bid"], INDEX["depth_l5_notional_ask"]
_SELL_ORDER: Final[NDArray[np.intp]] = np.array(
    [{_BID: _ASK, _ASK: _BID}.get(i, i) for i in range(N_FEATURES)], dtype=np.intp
)


def for_sell(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turns market-oriented features into what a model sees for a sell.

    Sign-carrying features are negated and bid and ask swapped, so that one model serves both sides; for a buy the
    vector is used as it is. Turning twice gives the vector back.

    Args:
        values: float32[..., N_FEATURES] in market orientation.

    Returns:
        A new float32[..., N_FEATURES].
    """
    return values[..., _SELL_ORDER] * _SELL_SIGN
