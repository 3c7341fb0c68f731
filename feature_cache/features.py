"""The feature set `mf1`: names, order, and how a vector is turned for the side of an order.

The formulas are in `engine/engine.py`; this module is what a model, a store and a server must agree on. Undefined is
NaN.
"""

from __future__ import annotations

import math
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
ROW: Final = np.dtype("<f4")
"""How a value is stored wherever a vector is bytes."""
INDEX: Final[dict[str, int]] = {name: i for i, name in enumerate(NAMES)}

FINGERPRINT: Final = zlib.crc32(f"{FEATURE_SET_ID}:{','.join(NAMES)}".encode())
"""uint32 that changes with the id, a name or the order; carried by every vector and every model answer."""

_UNBOUNDED: Final = (-math.inf, math.inf)
_NOT_NEGATIVE: Final = (0.0, math.inf)
_SHARE: Final = (-1.0, 1.0)

RANGES: Final[dict[str, tuple[float, float]]] = {
    # Pa - Pb is at most twice the mid, and the weighted mid lies between Pb and Pa.
    "spread_bps": (0.0, 20_000.0),
    "weighted_mid_bps": (-10_000.0, 10_000.0),
    "imbalance_l1": _SHARE,
    "imbalance_l5": _SHARE,
    "imbalance_l10": _SHARE,
    "ofi_100ms": _UNBOUNDED,
    "ofi_1s": _UNBOUNDED,
    "ofi_5s": _UNBOUNDED,
    "trade_imbalance_1s": _SHARE,
    "trade_imbalance_5s": _SHARE,
    "trade_rate_1s": _NOT_NEGATIVE,
    "trade_rate_5s": _NOT_NEGATIVE,
    "ret_1s_bps": _UNBOUNDED,
    "ret_5s_bps": _UNBOUNDED,
    "ret_30s_bps": _UNBOUNDED,
    "ret_mean_50": _UNBOUNDED,
    "ret_std_50": _NOT_NEGATIVE,
    "n_50": (0.0, 50.0),
    "rv_1s_bps": _NOT_NEGATIVE,
    "rv_5s_bps": _NOT_NEGATIVE,
    "rv_30s_bps": _NOT_NEGATIVE,
    "depth_l5_notional_bid": _NOT_NEGATIVE,
    "depth_l5_notional_ask": _NOT_NEGATIVE,
    "book_age_ms": _NOT_NEGATIVE,
    "trade_age_ms": _NOT_NEGATIVE,
}
"""What each feature's definition leaves possible, in market orientation: (lowest, highest), both included."""
LOWEST: Final[NDArray[np.float32]] = np.array([RANGES[name][0] for name in NAMES], dtype=np.float32)
HIGHEST: Final[NDArray[np.float32]] = np.array([RANGES[name][1] for name in NAMES], dtype=np.float32)

VERSION: Final = f"{FEATURE_SET_ID}/{FINGERPRINT:08x}"
"""Feature set and fingerprint, for people."""

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
    return values.take(_SELL_ORDER, axis=-1) * _SELL_SIGN
