"""Orders of several callers that came in one turn of the event loop and are being decided in columns.

They share the way, and what is theirs stays theirs: the promise that their caller waits for, arrival and deadline, the
first entry of the ledger, and what is known of the reply. A block goes by the earliest of its deadlines, which are near
each other; an order that leaves it has its own again. None waits for another: those whose scores come before those of
the others leave the block.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from server.decision.decided_block import DecidedRow
from server.decision.pending_block import PendingBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from fallback.block import Own
    from fallback.budget import Budget
    from fallback.order import Order
    from server.decision.pending import Pending, Waited
    from server.decision.pending_block import Parts
    from server.decision.record import Decided

_GONE: Final = object()
"""The result of an order whose caller has gone before it had one."""


class ManyCalls(PendingBlock):
    """Orders that each have a caller of their own, with a deadline of its own.

    Args:
        parts: What it is made of.
        own: See `Block`.
        alone: Makes an order a case of its own.
        promises: What the callers wait for.
    """

    __slots__ = ("_at_first", "_case_of", "_is_looked_at", "_promises")

    def __init__(
        self,
        parts: Parts,
        own: Sequence[Own],
        alone: Callable[[Order, Budget, Waited], Pending],
        promises: Sequence[Waited],
    ) -> None:
        super().__init__(parts, own)
        self._case_of = alone
        self._is_looked_at = False
        """Whether it will be looked at, in the next turn of the event loop, who has a result."""
        self._promises = self._at_first = promises
        for promise in promises:
            promise.case = self

    def is_left(self) -> bool:
        """See `Block`."""
        return all(promise.done() for promise in self._promises)

    def is_gone(self, place: int) -> bool:
        """See `Block`."""
        return not self._at_first or self._at_first[place].done()

    def has_left(self) -> bool:
        """See `Block`."""
        return any(promise.done() for promise in self._at_first)

    def lost(self) -> set[int]:
        """See `PendingBlock`."""
        return {place for place, promise in enumerate(self._promises) if promise.done()}

    def put(self, place: int, result: Any) -> None:
        """See `Block`."""
        if not self._is_looked_at:
            self._is_looked_at = True
            asyncio.get_running_loop().call_soon(self._look)
        super().put(place, result)

    def _look(self) -> None:
        """Lets those go on alone that have their results, where others wait for a later batch of the model's."""
        self._is_looked_at = False
        if self.missing:
            alone = set(self._failed)
            places = [n for n, result in enumerate(self.results) if result is not None and n not in alone]
            self._failed += places
            self._send_alone(places, "flight")

    def leave(self, promise: Waited) -> Decided | None:
        """See `pending.Joined`."""
        if promise not in self._promises:
            return None  # its order had left the block
        place = self._promises.index(promise)
        if self.decided is not None:
            return self.decided.apart()[place]
        if self.results[place] is None:
            self.put(place, _GONE)
        return None

    def keep(self, places: Sequence[int]) -> None:
        """See `Block`."""
        self._promises = [self._promises[place] for place in places]
        super().keep(places)

    def go_alone(self, place: int, budget: Budget) -> Pending | None:
        """See `PendingBlock`."""
        promise = self._promises[place]
        return None if promise.done() else self._case_of(self.orders[place], budget, promise)

    def parted(self) -> None:
        """See `PendingBlock`."""

    def ended(self) -> None:
        """See `PendingBlock`."""
        decided, promises = self.decided, self._promises
        assert decided is not None
        # Neither the decisions nor the promises are for the collector of garbage to find.
        self.decided, self._promises, self._at_first = None, (), ()
        promises[0].promises.decided(promises, [DecidedRow(decided, place) for place in range(len(promises))])

    def give_up(self) -> None:
        """See `PendingBlock`."""
        for promise in self._promises:
            promise.case = None
        self._promises = self._at_first = ()
