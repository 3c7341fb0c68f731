"""Orders that came together and are being decided in columns, and those of them that go on alone.

Either one call waits for all of them (`OneCall`), or each has a caller of its own (`many_calls.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from fallback.block import Block

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from fallback.block import Own, View
    from fallback.budget import Budget
    from fallback.chain import ForBlocks
    from fallback.order import Order
    from server.decision.decided_block import DecidedBlock, OneDecided
    from server.decision.metrics import Alone
    from server.decision.pending import Pending, Waited


class Parts(NamedTuple):
    """What every block is made of."""

    orders: Sequence[Order]
    views: Sequence[View]
    budget: Budget
    chosen: str
    """See `Block`, as for those before."""
    asked: ForBlocks
    """The stages that are."""
    on_results: Callable[[PendingBlock], None]
    """Called once with the block when the attempts of its orders have ended."""
    on_alone: Callable[[Alone, int], None]
    """Called when so many of its orders go on alone, with the cause."""


class PendingBlock(Block):
    """A block, and what becomes of each of its orders until their callers have the decisions.

    Args:
        parts: What it is made of.
        own: See `Block`.
    """

    __slots__ = ("_failed", "_on_alone", "_on_results", "asked", "decided", "stage")

    def __init__(
        self,
        parts: Parts,
        own: Sequence[Own] | None = None,
    ) -> None:
        super().__init__(parts.orders, parts.views, parts.budget, parts.chosen, parts.asked.said, own)
        self._on_results, self._on_alone = parts.on_results, parts.on_alone
        assert parts.asked.stage is not None
        self.stage, self.asked = parts.asked.stage, parts.asked.asked
        self.decided: DecidedBlock | None = None
        """Of the orders in the block, from the moment they are written down."""
        self._failed: list[int] = []
        """Places in the block of those that got no score and go on alone, until the block goes on without them."""

    @abstractmethod
    def lost(self) -> set[int]:
        """The places of orders that somebody should wait for and nobody does."""

    @abstractmethod
    def go_alone(self, place: int, budget: Budget) -> Pending | None:
        """Makes an order a case of its own, for those who wait for it; None if they have gone."""

    @abstractmethod
    def parted(self) -> None:
        """Every order goes on alone: none is in the block any more."""

    @abstractmethod
    def ended(self) -> None:
        """The orders in the block have their decisions, and their callers hear of it."""

    @abstractmethod
    def give_up(self) -> None:
        """It was not begun: its orders are none of its business."""

    def complete(self) -> None:
        """The attempt of each order has ended."""
        self._on_results(self)

    def put_failure(self, place: int, result: Any) -> None:
        """Takes the result of an order that got no score: it goes on alone at once."""
        assert isinstance(self.results, list)
        self._failed.append(place)
        self.results[place] = result
        self._send_alone((place,), "no_score")
        self.put(place, result)

    def drop_failures(self) -> None:
        """Goes on without those that got no score, or that nobody waits for any more."""
        lost = self.lost()
        if self._failed or lost:
            lost.update(self._failed)
            self._failed = []
            self.keep([place for place in range(len(self)) if place not in lost])

    def go_on_with(self, places: Sequence[int], why: Alone) -> None:
        """Goes on with these orders; the others go on alone, from their results, for this cause."""
        if len(places) < len(self):
            kept = set(places)
            self._send_alone([place for place in range(len(self)) if place not in kept], why)
            self.keep(places)

    def _send_alone(self, places: Sequence[int], why: Alone) -> None:
        """Has orders go on alone, from the results of their first attempts."""
        cases = []
        for place in places:
            own = self.budget_of(place)
            del own.uses[self.before_model :]
            case = self._alone(place, own)
            if case is not None:
                case.asked, case.asked_at = self.asked, self.asked_at
                case.asked_of, case.allowed = self.asked_of, self.allowed
                cases.append((case, self.results[place]))
        self._on_alone(why, len(cases))
        for case, result in cases:
            case.set_result(result)

    def part(self) -> list[Pending]:
        """Has every order that is still in the block go on alone, with its decision."""
        decided = self.decided
        assert decided is not None
        cases = []
        for place, one in enumerate(decided.apart()):
            own = decided.budgets[place]
            case = self._alone(place, own)
            if case is not None:
                case.attempts.append(self.attempt(place))
                case.answer, case.decided = self.answer(place), one
                case.recorded_at = decided.recorded_at
                case.durable_until = decided.durable_until + own.deadline - self.budget.deadline
                cases.append(case)
        self._on_alone("audit", len(cases))
        self.parted()
        return cases

    def _alone(self, place: int, budget: Budget) -> Pending | None:
        case = self.go_alone(place, budget)
        if case is not None:
            self.fill(case, place)
        return case


class OneCall(PendingBlock):
    """Orders of one call, which waits for all of them and has one deadline.

    Args:
        parts: What it is made of.
        alone: Makes an order a case of its own.
        left: Called once with the block when its caller has gone.
        future: Done when all have ended. The caller cancels it when nobody waits for the decisions any more.
    """

    __slots__ = ("_apart", "_case_of", "_in_block", "_left", "_open", "_size", "future", "has_ended")

    def __init__(
        self,
        parts: Parts,
        alone: Callable[[Order, Budget], Pending],
        left: Callable[[OneCall], None],
        future: asyncio.Future[None],
    ) -> None:
        super().__init__(parts)
        self.future = future
        self._case_of = alone
        self._left = left
        self._in_block: list[int] = list(range(len(parts.orders)))
        """The place in the call of each order that is in the block."""
        self._apart: dict[int, Waited] = {}
        """Those that go on alone, by their place in the call."""
        self._size = len(parts.orders)
        self.has_ended = False
        """Whether the orders in the block have their decisions."""
        self._open = 1
        """How many have to end: the block, and those that go on alone."""
        future.add_done_callback(self._caller_has_gone)

    @property
    def in_block(self) -> int:
        """How many orders are still in the block, and have not failed."""
        return len(self._in_block) - len(self._failed)

    @property
    def apart(self) -> dict[int, Waited]:
        """The orders that went on alone, by their place in the call."""
        return self._apart

    def outcomes(self) -> Iterator[bytes | Waited]:
        """What became of each order, in the call's sequence: its decision, serialised, or the promise that says it."""
        wires = iter(() if self.decided is None or not self._in_block else self.decided.wires())
        for number in range(self._size):
            apart = self._apart.get(number)
            yield next(wires) if apart is None else apart

    def is_left(self) -> bool:
        """See `Block`."""
        return self.future.done()

    def is_gone(self, place: int) -> bool:
        """See `Block`."""
        return self.future.done()

    def has_left(self) -> bool:
        """See `Block`."""
        return self.future.done()

    def lost(self) -> set[int]:
        """See `PendingBlock`."""
        return set()

    def keep(self, places: Sequence[int]) -> None:
        """See `Block`."""
        self._in_block = [self._in_block[place] for place in places]
        super().keep(places)
        if not places:
            self._one_fewer()

    def go_alone(self, place: int, budget: Budget) -> Pending:
        """See `PendingBlock`."""
        case = self._case_of(self.orders[place], budget)
        self._apart[self._in_block[place]] = case.future
        self._open += 1
        case.future.add_done_callback(self._one_has_ended)
        return case

    def parted(self) -> None:
        """See `PendingBlock`."""
        self._in_block = []
        self._one_fewer()

    def _one_has_ended(self, _: Waited) -> None:
        self._one_fewer()

    def ended(self) -> None:
        """See `PendingBlock`."""
        self.has_ended = True
        self._one_fewer()

    def decisions(self) -> Iterator[DecidedBlock | OneDecided]:
        """Those that there are: of the block, and of each order that went on alone."""
        if self.decided is not None and self._in_block:
            yield self.decided
        for promise in self._apart.values():
            if promise.done() and not promise.cancelled() and promise.exception() is None:
                yield promise.result()

    def _one_fewer(self) -> None:
        self._open -= 1
        if not self._open and not self.future.done():
            self.future.set_result(None)

    def give_up(self) -> None:
        """See `PendingBlock`."""
        self._in_block, self._failed = [], []
        self.future.cancel()

    def _caller_has_gone(self, future: asyncio.Future[None]) -> None:
        if future.cancelled():
            self._left(self)
