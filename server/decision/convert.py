"""Converts the contract's messages to domain objects, and checks every rule that an order must meet."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from fallback.order import Brought, Order
from feature_cache import feature_sets
from feature_cache.compiled import compiled
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import InvalidOrderError

_MAX_NAME = 64
_LONGEST_DURATION_SECONDS = 315_576_000_000
"""That a `Duration` can say. A longer one has no JSON, so that nobody could read the audit of its order."""
_compiled = compiled("server.decision.order_wire_c")


class OrderReader:
    """Checks orders against the contract's rules and the configured instruments."""

    def __init__(self, instruments: Collection[str]) -> None:
        self._instruments = frozenset(instruments)
        self._by_wire = {name.encode(): name for name in instruments}
        listed = sorted(instruments)
        self._some_instruments = ", ".join(listed[:10]) + (", …" if len(listed) > 10 else "")

    def request(self, serialized: bytes) -> Order | pb.DecideRequest:
        """A call's only order at once, if it is plain; else the message, for `read` to say what is wrong or different.

        Raises:
            DecodeError: It is no `DecideRequest`.
        """
        order = self.plain(serialized)
        return pb.DecideRequest.FromString(serialized) if order is None else order

    def batch(self, serialized: bytes) -> Sequence[Order | pb.Order]:
        """The orders of a batch: those that are plain at once, of the others the messages.

        Raises:
            DecodeError: It is no `DecideBatchRequest`.
        """
        found = None if _compiled is None else _compiled.read_batch(serialized, self._by_wire)
        if found is None:
            return pb.DecideBatchRequest.FromString(serialized).orders
        return [pb.Order.FromString(order) if isinstance(order, bytes) else order for order in found]

    def streamed(self, serialized: bytes) -> Order | pb.Order:
        """The order in a request of a stream: at once if it is plain, else the message.

        Raises:
            DecodeError: It is no `DecideStreamRequest`.
        """
        order = self.plain(serialized)
        return pb.DecideStreamRequest.FromString(serialized).order if order is None else order

    def plain(self, serialized: bytes) -> Order | None:
        """A call's only order, if it is plain and can be read at once."""
        return None if _compiled is None else _compiled.read_request(serialized, self._by_wire)

    def read(self, message: pb.Order) -> Order:
        """The order in a message.

        Raises:
            InvalidOrderError: It breaks a rule; names the field and the rule.
        """
        if message.instrument not in self._instruments:
            raise _invalid(
                "UNKNOWN_INSTRUMENT",
                "instrument",
                f"{_shown(message.instrument)} is not configured here; {self._some_instruments} are",
            )
        side = message.side
        if side not in (pb.SIDE_BUY, pb.SIDE_SELL):
            raise _invalid("UNKNOWN_SIDE", "side", f"must be SIDE_BUY or SIDE_SELL, not {side}")
        quantity = message.quantity
        if not 0 < quantity < math.inf:
            raise _invalid("INVALID_QUANTITY", "quantity", f"must be finite and > 0, not {quantity}")
        limit_price = math.nan
        if message.HasField("limit_price"):
            limit_price = message.limit_price
            if not 0 < limit_price < math.inf:
                raise _invalid("INVALID_LIMIT_PRICE", "limit_price", f"must be finite and > 0, not {limit_price}")
        strategy = message.strategy
        if not 0 < len(strategy) <= _MAX_NAME:
            raise _invalid("INVALID_STRATEGY", "strategy", f"must be 1 to {_MAX_NAME} characters, not {len(strategy)}")
        if len(message.order_ref) > _MAX_NAME:
            raise _invalid("INVALID_ORDER_REF", "order_ref", f"must be at most {_MAX_NAME} characters")
        if len(message.idempotency_key) > _MAX_NAME:
            raise _invalid("INVALID_IDEMPOTENCY_KEY", "idempotency_key", f"must be at most {_MAX_NAME} characters")
        brought = _brought(message.features) if message.HasField("features") else None
        own = None if brought is None or brought.feature_set is not MF1 else brought.values
        return Order(
            message.SerializeToString(),
            message.instrument,
            side,
            quantity,
            limit_price,
            strategy,
            message.reduce_only,
            own,
            message.order_ref,
            message.idempotency_key,
            order_timeout_seconds(message),
            brought=brought if own is None else None,
        )


def order_timeout_seconds(message: pb.Order) -> float | None:
    """What the order itself allows; None when it does not say.

    Raises:
        InvalidOrderError: It is not positive, or no valid `Duration`.
    """
    if not message.HasField("timeout"):
        return None
    seconds, nanos = message.timeout.seconds, message.timeout.nanos
    if seconds + nanos / 1e9 <= 0:
        raise _invalid("INVALID_TIMEOUT", "timeout", f"must be > 0, not {seconds + nanos / 1e9} s")
    if not (0 <= nanos < 1_000_000_000 and seconds <= _LONGEST_DURATION_SECONDS):
        rule = f"nanos from 0 to 999,999,999, and at most {_LONGEST_DURATION_SECONDS:,} s"
        raise _invalid("INVALID_TIMEOUT", "timeout", f"must be a valid Duration: {rule}")
    return seconds + nanos / 1e9


def _brought(message: pb.FeatureVector) -> Brought:
    """The caller's vector, of `mf1` or of another set."""
    feature_set = feature_sets.by_id(message.feature_set_id)
    if feature_set is None:
        known = [repr(one.feature_set.id) for one in feature_sets.known()]
        raise _invalid(
            "UNKNOWN_FEATURE_SET",
            "features.feature_set_id",
            f"must be {' or '.join(known)}, not {_shown(message.feature_set_id)}",
        )
    if len(message.values) != len(feature_set):
        raise _invalid(
            "WRONG_FEATURE_COUNT", "features.values", f"must be {len(feature_set)} values, not {len(message.values)}"
        )
    values = np.array(message.values, dtype=np.float32)
    # Rules and guards use a vector of `mf1`, so it must be whole.
    left_out = np.isnan(values) & (feature_set is not MF1) & feature_set.may_be_undefined
    finite = np.isfinite(values) | left_out
    if not finite.all():
        _refuse_feature("NON_FINITE_FEATURE", feature_set, values, int(np.argmin(finite)), "finite")
    possible = ((values >= feature_set.lowest) & (values <= feature_set.highest)) | left_out
    if not possible.all():
        index = int(np.argmin(possible))
        lowest, highest = feature_set.features[index].lowest, feature_set.features[index].highest
        rule = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
        _refuse_feature("IMPOSSIBLE_FEATURE", feature_set, values, index, rule)
    return Brought(feature_set, values)


def _refuse_feature(
    reason: str, feature_set: FeatureSet, values: NDArray[np.float32], index: int, rule: str
) -> NoReturn:
    name = feature_set.names[index]
    raise _invalid(reason, f"features.values[{index}]", f"{name} must be {rule}, not {values[index]:g}")


def _invalid(reason: str, field: str, rule: str) -> InvalidOrderError:
    return InvalidOrderError(reason, f"{field}: {rule}", field)


def _shown(text: str) -> str:
    """A caller's text, short enough for a message."""
    return repr(text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "…")
