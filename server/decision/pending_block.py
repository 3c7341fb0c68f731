"""Orders of one call that are being decided in columns, and those of them that go on alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fallback.block import Block

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from fallback.block import View
    from fallback.budget import Budget
    from fallback.chain import Asked, BlockStage
    from fallback.order import Order
    from server.decision.decided_block import DecidedBlock
    from server.decision.pending import Pending
    from server.decision.promise import Promise
    from server.decision.record import Decided


class PendingBlock(Block):
    """A block, and what becomes of each of its orders until their caller has the decisions.

    Args:
        orders, views, budget, chosen: See `Block`.
        stage, asked: The stage that is asked, and all those that are.
        on_results: Called once with the block when the attempts of its orders have ended.
        alone: Makes an order a case of its own.
        left: Called once with the block when its caller has gone.
        future: Done when all have ended. The caller cancels it when nobody waits for the decisions any more.
    """

    __slots__ = (
        "_alone",
        "_apart",
        "_failed",
        "_in_block",
        "_left",
        "_on_results",
        "_open",
        "_size",
        "asked",
        "decided",
        "future",
        "has_ended",
        "stage",
    )

    def __init__(
        self,
        orders: Sequence[Order],
        views: Sequence[View],
        budget: Budget,
        chosen: str,
        stage: BlockStage,
        asked: tuple[Asked, ...],
        on_results: Callable[[PendingBlock], None],
        alone: Callable[[Order, Budget], Pending],
        left: Callable[[PendingBlock], None],
        future: asyncio.Future[None],
    ) -> None:
        super().__init__(orders, views, budget, chosen)
        self._on_results = on_results
        self.stage = stage
        self.asked = asked
        self.future = future
        self.decided: DecidedBlock | None = None
        """Of the orders in the block, from the moment they are written down."""
        self._alone = alone
        self._left = left
        self._in_block: list[int] = list(range(len(orders)))
        """The place in the call of each order that is in the block."""
        self._apart: dict[int, Promise[Pending]] = {}
        """Those that go on alone, by their place in the call."""
        self._failed: list[int] = []
        """Places in the block of those of them that got no score, until the block goes on without them."""
        self._size = len(orders)
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
    def apart(self) -> dict[int, Promise[Pending]]:
        """The orders that went on alone, by their place in the call."""
        return self._apart

    def outcomes(self) -> Iterator[bytes | Promise[Pending]]:
        """What became of each order, in the call's sequence: its decision, serialised, or the promise that says it."""
        wires = iter(()) if self.decided is None or not self._in_block else self.decided.wires()
        for number in range(self._size):
            apart = self._apart.get(number)
            yield next(wires) if apart is None else apart

    def complete(self) -> None:
        """The attempt of each order has ended."""
        self._on_results(self)

    def is_left(self) -> bool:
        """Whether the caller has gone, or has all decisions."""
        return self.future.done()

    def put_failure(self, place: int, result: Any) -> None:
        """Takes the result of an order that got no score: it goes on alone at once."""
        self._failed.append(place)
        self.results[place] = result
        self._send_alone((place,))
        self.put(place, result)

    def drop_failures(self) -> None:
        """Goes on without those that got no score."""
        if self._failed:
            failed = set(self._failed)
            self._failed = []
            self._keep([place for place in range(len(self)) if place not in failed])

    def go_on_with(self, places: Sequence[int]) -> None:
        """Goes on with these orders; the others go on alone, from their results."""
        if len(places) < len(self):
            kept = set(places)
            self._send_alone([place for place in range(len(self)) if place not in kept])
            self._keep(places)

    def _keep(self, places: Sequence[int]) -> None:
        self._in_block = [self._in_block[place] for place in places]
        self.keep(places)
        if not places:
            self._one_fewer()

    def _send_alone(self, places: Sequence[int]) -> None:
        """Has orders go on alone, from the results of their first attempts."""
        budget, cases = self.budget, []
        for place in places:
            own = budget.copy()
            del own.uses[self.before_model :]
            case = self._go_alone(place, own)
            case.asked, case.asked_at = self.asked, self.asked_at
            case.asked_of, case.allowed = self.asked_of, self.allowed
            cases.append((case, self.results[place]))
        for case, result in cases:
            case.set_result(result)

    def part(self) -> list[Pending]:
        """Has every order that is still in the block go on alone, with its decision."""
        decided = self.decided
        assert decided is not None
        cases = []
        for place, one in enumerate(decided.apart()):
            own = decided.budgets[place]
            case = self._go_alone(place, own)
            case.attempts.append(self.attempt(place))
            case.answer, case.decided = self.answer(place), one
            case.recorded_at, case.durable_until = decided.recorded_at, decided.durable_until
            cases.append(case)
        self._in_block = []
        self._one_fewer()
        return cases

    def _go_alone(self, place: int, budget: Budget) -> Pending:
        case = self._alone(self.orders[place], budget)
        self.fill(case, place)
        self._apart[self._in_block[place]] = case.future
        self._open += 1
        case.future.add_done_callback(self._one_has_ended)
        return case

    def _one_has_ended(self, _: Promise[Pending]) -> None:
        self._one_fewer()

    def ended(self) -> None:
        """The orders in the block have their decisions, and their caller hears of it."""
        self.has_ended = True
        self._one_fewer()

    def decisions(self) -> Iterator[DecidedBlock | Decided]:
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
        """It was not begun: its orders are none of its business."""
        self._in_block, self._failed = [], []
        self.future.cancel()

    def _caller_has_gone(self, future: asyncio.Future[None]) -> None:
        if future.cancelled():
            self._left(self)
