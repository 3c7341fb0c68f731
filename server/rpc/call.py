"""One call, as servicers see it: the same on both edges.

A servicer returns an answer or raises a `PretradeError`. The edge that made the call turns that into a status, so no
servicer knows a transport.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from fallback.order import CallContext

if TYPE_CHECKING:
    from server.security.identity import Caller

CallMetadata = Iterable[tuple[str, str | bytes]] | Iterable[tuple[bytes, bytes]] | None
"""As grpc.aio and ASGI give it."""


class Said(NamedTuple):
    """What a call says of itself."""

    context: CallContext
    reduce_only: bool
    """That all of its orders are."""


class Call:
    """What a call carries besides its request.

    Args:
        deadline: Monotonic instant at which the caller stops waiting; None without one.
        metadata: What the caller sent.
        caller: Who makes the call; None on a port without credentials.
    """

    __slots__ = ("caller", "deadline", "metadata", "orders", "said")

    def __init__(self, deadline: float | None, metadata: CallMetadata, caller: Caller | None = None) -> None:
        self.deadline = deadline
        self.metadata = metadata
        self.caller = caller
        self.said: Said | None = None
        """What the metadata says of the call; None until somebody has read it (`call_context.py`)."""
        self.orders = 1
        """Of a unary call: those that are decided at once. The servicer corrects it when it has read them."""

    async def accept(self) -> None:
        """Tells the caller of a stream that it was accepted, before there is an answer."""
