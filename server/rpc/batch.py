"""`DecideBatch`: a batch is decided slice by slice, each slice as far as possible in columns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Final, NamedTuple, TypeGuard

from fallback.order import Order
from server.decision.decided_block import DecidedBlock, OneDecided
from server.decision.decision_wire import ORDER_DECIDED, RESULTS
from server.decision.pending_slice import PendingSlice
from server.decision.plane import DataPlane
from server.journal.protowire import prefixed
from server.rpc.call import Call
from server.rpc.orders import Asked, Begun, Orders, Reply, end_of

BATCH_SLICE: Final = 256
"""Orders of a batch that are decided at once: as many as a replica takes in one call. More would hold up everybody
else."""


class Results(Reply):
    """Results of several orders, as they stand in the reply to a batch."""

    __slots__ = ()


class BegunSlice(NamedTuple):
    """Some orders of a batch."""

    size: int
    """How many."""
    alone: Mapping[int, Begun]
    """Those that go by themselves, by their places in the slice."""
    orders: Sequence[Order]
    """The others, which were begun together."""
    arrived: float
    """When they were taken up, in monotonic seconds."""
    decided: PendingSlice | None
    """Of those that were begun together; None where there are none."""


class UnderWay:
    """What a batch has come to.

    Args:
        orders: All of its orders.
        call: Its call.
    """

    __slots__ = ("begun", "call", "early", "is_patient", "orders", "reducing", "results")

    def __init__(self, orders: Sequence[Asked], call: Call) -> None:
        self.orders: Final = orders
        self.call: Final = call
        self.begun: Final[deque[BegunSlice]] = deque()
        """Slices that have not ended, the oldest first."""
        self.results: Final[list[Reply]] = []
        """Of the slices that have."""
        self.reducing: Final = [place for place, order in enumerate(orders) if order.reduce_only]
        """The places of orders that are reduce-only."""
        self.early: Final[dict[int, Begun]] = {}
        """Those that have begun before their slices, by their places."""
        self.is_patient = len(self.reducing) < len(orders)  # those have places of their own, and need not wait
        """Whether it waits in line for places."""


class Batches:
    """Decides the orders of batches.

    Args:
        dataplane: Decides.
        orders: Begins with orders, and says what became of them.
        clock: Monotonic seconds.
    """

    def __init__(self, dataplane: DataPlane, orders: Orders, clock: Callable[[], float]) -> None:
        self._dataplane = dataplane
        self._orders = orders
        self._clock = clock

    async def decide_all(self, orders: Sequence[Asked], call: Call) -> list[Reply]:
        """The results of a batch, in the order of its orders. It is taken up slice by slice.

        A slice begins while those before it wait for the model and for the disk, where there are places for its orders;
        otherwise it begins when there are, or when those before it have ended. A call of which nothing is under way
        waits in line for places, and its next slice has as many orders as it finds places. Other calls have a turn in
        between. Orders that are reduce-only have places of their own, and do not wait with the others.

        Raises:
            OverloadedError: There was no place for any of its orders.
        """
        batch = UnderWay(orders, call)
        try:
            first = 0
            while first < len(orders):
                if first:
                    await asyncio.sleep(0)
                last = min(len(orders), first + BATCH_SLICE)
                while batch.begun and not self._dataplane.has_places(last - first):
                    await self._end_oldest(batch)
                if batch.is_patient and not batch.begun:
                    last = await self._wait_in_line(batch, first, last)
                its = {place - first: batch.early.pop(place) for place in list(batch.early) if place < last}
                batch.begun.append(self._begin_slice(orders[first:last], call, its))
                first = last
            while batch.begun:
                await self._end_oldest(batch)
            return batch.results
        except BaseException:
            self._give_up(batch)
            raise

    async def _wait_in_line(self, batch: UnderWay, first: int, last: int) -> int:
        """Waits for places of a slice, while its reduce-only orders do not; returns where the slice then ends.

        Raises:
            OverloadedError: The first slice found none, and has no order that reduces.
        """
        orders, call = batch.orders, batch.call
        arrived = self._clock()
        if not self._dataplane.has_places_at_once(last - first):
            for place in batch.reducing:
                if first <= place < last and place not in batch.early:
                    batch.early[place] = self._orders.begin(
                        orders[place], arrived, call.deadline, call, self._orders.context_of(call), in_company=True
                    )
        number = last - first - sum(first <= place < last for place in batch.early)
        if not number:
            return last
        places = await self._dataplane.places(number, call.deadline, has_begun=first > 0)
        if not (first or places or batch.reducing):
            raise self._orders.failed(self._dataplane.refused(len(orders)), orders[0], arrived, call)
        batch.is_patient = places > 0  # else it has waited long enough: what finds no place is refused
        return _end_of(places or number, first, last, batch.early)

    async def _end_oldest(self, batch: UnderWay) -> None:
        """Waits until the slice that began first has its decisions, and takes its results."""
        await _end_of_slice(batch.begun[0])
        batch.results.extend(self._results_of(batch.begun[0], batch.call))
        batch.begun.popleft()

    def _give_up(self, batch: UnderWay) -> None:
        """Nobody wants its results any more."""
        for result in batch.results:
            self._orders.not_sent(result)
        for one in batch.begun:
            self._give_up_slice(one)
        for order in batch.early.values():
            self._orders.give_up(order)

    def _begin_slice(self, some: Sequence[Asked], call: Call, alone: dict[int, Begun]) -> BegunSlice:
        """Begins with some orders of a batch: those that are plain together, the others by themselves.

        `alone` are those that were begun before, by their places.
        """
        arrived = self._clock()
        context, chosen = self._orders.contexts_of(call, len(some))
        together: list[Order] = []
        for place, asked in enumerate(some):
            if place in alone:
                continue
            if context.trace_id or place in chosen or not _is_plain(asked):
                order_context = chosen.get(place, context)
                alone[place] = self._orders.begin(asked, arrived, call.deadline, call, order_context, in_company=True)
            elif call.caller is None:
                asked.context = context
                together.append(asked)
            else:
                try:
                    together.append(self._orders.read(asked, call, context))
                except Exception as error:
                    alone[place] = Begun(asked, arrived, self._orders.failed(error, asked, arrived, call), None)
        begun = self._dataplane.begin_together(together, arrived, call.deadline) if together else None
        if together and begun is None:
            others = (place for place in range(len(some)) if place not in alone)
            alone |= {
                place: self._orders.begun(order, order, arrived, call.deadline, call)
                for place, order in zip(list(others), together, strict=True)
            }
            together = []
        return BegunSlice(len(some), alone, together, arrived, begun)

    def _results_of(self, begun: BegunSlice, call: Call) -> list[Reply]:
        """What became of some orders, in their sequence; those next to each other that were begun together are one."""
        if begun.decided is not None and not begun.alone and (whole := begun.decided.whole()) is not None:
            # They are let go of afterwards: what cannot be written was not heard.
            all_of_them = Results(whole.results(), whole)
            begun.decided.take_decided()
            return [all_of_them]
        results: list[Reply] = []
        outcomes = iter(() if begun.decided is None else zip(begun.orders, begun.decided.outcomes(), strict=True))
        decisions: list[OneDecided | DecidedBlock] = []
        wires: list[bytes] = []
        for place in range(begun.size):
            one = begun.alone.get(place)
            if one is None:
                order, outcome = next(outcomes)
                if isinstance(outcome, bytes):
                    wires.append(ORDER_DECIDED % (prefixed(order.order_ref.encode()), prefixed(outcome)))
                else:
                    result = self._orders.result(Begun(order, begun.arrived, outcome, None), call)
                    decisions += result.decisions
                    wires.append(result.wire)
                continue
            if wires:
                results.append(_results(wires, decisions))
                wires, decisions = [], []
            result = self._orders.result(one, call)
            if result.decisions and one.own_seconds is not None:
                # The server's cap is for deciding, the call's deadline for all.
                result.deadline = one.arrived + one.own_seconds
            results.append(result)
        if begun.decided is not None:
            decisions += begun.decided.take_decided()
        if wires or decisions:
            results.append(_results(wires, decisions))
        return results

    def _give_up_slice(self, begun: BegunSlice) -> None:
        for one in begun.alone.values():
            self._orders.give_up(one)
        if begun.decided is not None:
            self._dataplane.give_up_together(begun.decided)


def _results(wires: Sequence[bytes], decisions: Sequence[OneDecided | DecidedBlock]) -> Results:
    return Results(b"".join([RESULTS % prefixed(wire) for wire in wires]), *decisions)


async def _end_of_slice(begun: BegunSlice) -> None:
    """Waits until all of these orders have their decisions, or get none."""
    if begun.decided is not None:
        await begun.decided.ended()
    for one in begun.alone.values():
        await end_of(one)


def _end_of(orders: int, first: int, last: int, early: Container[int]) -> int:
    """Where a slice ends that has so many orders besides those that were begun early, or before `last`."""
    for place in range(first, last):
        if place not in early:
            if not orders:
                return place
            orders -= 1
    return last


def _is_plain(asked: Asked) -> TypeGuard[Order]:
    """Whether an order of a batch can be decided together with others of its call."""
    return isinstance(asked, Order) and not asked.idempotency_key and asked.timeout_seconds is None
