"""What is asked: an order, in the words of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from pretrade.decision.v1 import decision_pb2 as pb

Side = Literal["buy", "sell"]
_SIDES: Final = {"buy": pb.SIDE_BUY, "sell": pb.SIDE_SELL}


@dataclass(frozen=True, slots=True)
class Features:
    """The caller's own features instead of the server's; see `FeatureVector` in the contract."""

    feature_set_id: str
    """The set that the values follow, for example `mf1`."""
    values: Sequence[float]
    """One value for each feature of the set, in the set's order."""


@dataclass(slots=True)  # not frozen: that takes as long as all the rest
class Order:
    """An order that you are about to send. Its side is checked when it is sent, and all else by the server."""

    instrument: str
    """`SYMBOL.VENUE`, for example `BTCUSDT.BINANCE`."""
    side: Side
    """`buy` or `sell`."""
    quantity: float
    """In the base asset, > 0."""
    strategy: str
    """The strategy that wants to trade: 1 to 64 characters."""
    limit_price: float | None = None
    """In the quote currency, > 0; None for a market order."""
    order_ref: str = ""
    """Your own reference, which the decision repeats; at most 64 characters. Distinct among the orders that are under
    way on a stream; there the client makes one for an order without it."""
    reduce_only: bool = False
    """Whether the order can only reduce an exposure. You vouch for it."""
    idempotency_key: str = ""
    """Makes it safe to ask again, also after this process has ended; at most 64 characters. Empty: the client makes a
    key for the call, under which it asks again by itself."""
    features: Features | None = None
    """Your own features; None for the server's."""

    def message(self, make: Callable[..., pb.Order] = pb.Order, new_key: Callable[[], str] | None = None) -> pb.Order:
        """The order as the contract has it.

        Args:
            make: Makes the message of some of its fields.
            new_key: Makes a key for an order without one; None to leave it without.

        Raises:
            ValueError: The side is neither `buy` nor `sell`.
        """
        side = _SIDES.get(self.side)
        if side is None:
            raise ValueError(f"side is {self.side!r}: it must be 'buy' or 'sell'")
        message = make(instrument=self.instrument, side=side, quantity=self.quantity, strategy=self.strategy)
        if self.limit_price is not None:
            message.limit_price = self.limit_price
        if self.order_ref:
            message.order_ref = self.order_ref
        if self.reduce_only:
            message.reduce_only = True
        if self.idempotency_key:
            message.idempotency_key = self.idempotency_key
        elif new_key is not None:
            message.idempotency_key = new_key()
        if self.features is not None:
            message.features.feature_set_id = self.features.feature_set_id
            message.features.values.extend(self.features.values)
        return message


def message_of(
    order: Order | pb.Order, make: Callable[..., pb.Order] = pb.Order, new_key: Callable[[], str] | None = None
) -> pb.Order:
    """The order as the contract has it, which the caller of this may change.

    Args:
        order: In either form.
        make: Makes the message: one by itself, or the next one of a batch. Putting one into a batch copies it.
        new_key: As in `Order.message`.
    """
    if isinstance(order, Order):
        return order.message(make, new_key)
    message = make()
    message.CopyFrom(order)
    if new_key is not None and not message.idempotency_key:
        message.idempotency_key = new_key()
    return message
