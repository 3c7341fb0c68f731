"""A clock that tests move, and the case that is being decided."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fallback.budget import Budget
from fallback.order import Case, Order
from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.decision.v1 import decision_pb2 as pb


class Clock:
    """Monotonic seconds that only a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def new_case(
    *,
    side: pb.Side.ValueType = pb.SIDE_BUY,
    quantity: float = 1.0,
    limit_price: float = math.nan,
    strategy: str = "alpha",
    reduce_only: bool = False,
    caller_features: NDArray[np.float32] | None = None,
    values: NDArray[np.float32] | None = None,
    mid: float = 100.0,
    arrived: float = 1_000.0,
    timeout_seconds: float = 0.05,
    reserve_seconds: float = 0.005,
    problem: pb.ReasonCode.ValueType | None = None,
    sequence: int | None = None,
) -> Case:
    """A case: by default a small market order with sound features, all 0, and 50 ms, 5 of them reserved.

    `sequence` is that of the server's vector; without one nobody asked what the server knows.
    """
    message = pb.Order(instrument="BTCUSDT.BINANCE", side=side, quantity=quantity, strategy=strategy)
    order = Order(
        message.SerializeToString(),
        message.instrument,
        side,
        quantity,
        limit_price,
        strategy,
        reduce_only,
        caller_features,
    )
    case = Case(order, Budget(arrived, arrived + timeout_seconds, reserve_seconds))
    case.mid = mid
    case.features_problem = problem
    if sequence is not None:
        nothing = np.zeros(features.N_FEATURES, dtype=np.float32)
        state = BookState.VALID
        case.snapshot = FeatureSnapshot(message.instrument, sequence, 0, 0, 0, 0, 0, mid, mid, state, nothing)
    if problem is None:
        case.features = np.zeros(features.N_FEATURES, dtype=np.float32) if values is None else values
    return case
