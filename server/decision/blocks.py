"""Life of a request in columns: plain orders that came together go its steps together, as `PendingBlock`s.

An order that meets anything but the usual goes on alone from there, see `fallback/block.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from fallback.block import Own
from fallback.budget import Budget
from fallback.chain import Taken
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.many_calls import ManyCalls
from server.decision.pending_block import OneCall, Parts, PendingBlock
from server.decision.recorder import fail

if TYPE_CHECKING:
    from fallback.block import View
    from fallback.chain import Chain
    from fallback.guards import Guards
    from fallback.order import Order
    from server.control.state import ControlState
    from server.decision.gathering import Waiting
    from server.decision.markets import Markets
    from server.decision.metrics import Alone, DecisionMetrics
    from server.decision.pending import Pending, Waited
    from server.decision.recorder import Recorder
    from server.decision.reserves import Reserves
    from server.inference.model_map import ModelMap

BlockT = TypeVar("BlockT", bound=PendingBlock)
LEAST = 10
"""Orders with callers of their own that are decided in columns: fewer take less time one by one."""
_MOST = 64
"""More would wait for each other where the model gets them in several batches."""
_NEAR_SECONDS = 0.002
_NEAR_SHARE = 0.05
"""By how much their deadlines may differ, in seconds or as a share of the time until the earliest one, by which a block
goes."""


class Blocks:
    """Decides orders in columns.

    Args:
        models: Says whose order it is; None where there is one model.
        pending: Makes an order a case of its own, for a caller who has a promise, or for one who gets it.
        left: Called once with the block of a call whose caller has gone.
        Everything else: the collaborators, one a step.
    """

    def __init__(
        self,
        *,
        markets: Markets,
        chain: Chain,
        guards: Guards,
        recorder: Recorder,
        control: ControlState,
        reserves: Reserves,
        models: ModelMap | None,
        pending: Callable[[Order, Budget, Waited | None], Pending],
        left: Callable[[OneCall], None],
        metrics: DecisionMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._markets = markets
        self._chain = chain
        self._guards = guards
        self._recorder = recorder
        self._control = control
        self._reserves = reserves
        self._models = models
        self._pending = pending
        self._left = left
        self._metrics = metrics
        self._clock = clock

    def is_busy(self, orders: int) -> bool:
        """Whether so many orders that were begun now would only wait: for the first stage, or for the journal."""
        stage = self._chain.for_blocks().stage
        if stage is None:
            return False
        return self._recorder.is_committing if stage.answers_at_once else stage.is_busy(orders)

    def begin_call(
        self, orders: Sequence[Order], arrived: float, deadline: float
    ) -> Iterator[tuple[str, OneCall | None, Sequence[int], Mapping[int, Alone]]]:
        """Begins with plain orders of one call: a block for each model.

        Yields:
            The model's name, the block, the places of its orders, and those of the model's orders that go alone, with
            the causes. A model that has a canary may have two blocks.
        """
        now, groups = self._clock(), self._groups(orders)
        views = self._views(orders, groups, now)
        for model, places in groups.items():
            usual = [place for place in places if views[place] is not None]
            parts = self._parted(model, orders, usual)
            for part in parts:
                block = self._begin(orders, views, part, Budget(arrived, deadline), model, now, self._of_one_call)
                yield model, block, part, {} if block is not None else dict.fromkeys(part, "stage")
            if usual and not parts:
                yield model, None, (), dict.fromkeys(usual, "bug")
            if len(usual) < len(places):
                why = self._why_no_view()
                yield model, None, (), {place: why for place in places if views[place] is None}

    def begin_calls(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Begins with orders of several callers, as far as they can be decided in columns; the others."""
        alone = self._metrics.alone
        if len(waiting) < LEAST:
            alone["few"] += len(waiting)
            return list(waiting)
        now, orders = self._clock(), [one.order for one in waiting]
        groups = self._groups(orders)
        views = self._views(orders, groups, now)
        if unseen := views.count(None):
            alone[self._why_no_view()] += unseen
        for model, places in groups.items():
            usual = [place for place in places if views[place] is not None]
            parts = self._parted(model, orders, usual)
            if not parts:
                alone["bug"] += len(usual)
            for part in parts:
                left = len(part)
                for near in _near(part, waiting, now):
                    left -= len(near)
                    if not self._begin_joint(waiting, orders, views, near, model, now):
                        alone["stage"] += len(near)
                alone["deadlines" if len(part) >= LEAST else "few"] += left
        return [one for one in waiting if one.case is None]

    def _begin_joint(
        self,
        waiting: Sequence[Waiting],
        orders: Sequence[Order],
        views: Sequence[View | None],
        places: Sequence[int],
        model: str,
        now: float,
    ) -> bool:
        """Begins with the orders at these places, the one with the earliest deadline first; whether it could."""
        joined = [waiting[place] for place in places]
        own = [
            Own(
                arrived := one.arrived,
                deadline := one.deadline,
                (pb.STAGE_ADMISSION, deadline - arrived, now - arrived, pb.DEGRADATION_UNSPECIFIED),
            )
            for one in joined
        ]
        block = self._begin(
            orders,
            views,
            places,
            Budget(own[0].arrived, own[0].deadline),
            model,
            now,
            lambda parts: ManyCalls(parts, own, self._pending, joined),
        )
        return block is not None

    def _groups(self, orders: Sequence[Order]) -> Mapping[str, Sequence[int]]:
        """The places of the orders by their models; one without a name where there is one model."""
        return {"": range(len(orders))} if self._models is None else self._models.groups(orders)

    def _parted(self, model: str, orders: Sequence[Order], places: Sequence[int]) -> Sequence[Sequence[int]]:
        """The orders of a model at these places by who is asked to score them; none where that met a bug."""
        asked = self._chain.for_blocks()
        if asked.stage is None or not places:
            return ()
        try:
            return list(asked.stage.parted(model, orders, places))
        except Exception:
            self._chain.broke(asked.asked[0][0])
            return ()

    def _views(self, orders: Sequence[Order], groups: Mapping[str, Sequence[int]], now: float) -> Sequence[View | None]:
        """What is known of the orders' instruments; None of those that cannot be decided in columns."""
        if self._chain.for_blocks().stage is None or self._control.stale:
            return [None] * len(orders)
        try:
            return self._markets.views(orders, groups, now)
        except Exception:  # each meets it by itself, and tells of it
            return [None] * len(orders)

    def _why_no_view(self) -> Alone:
        """Why `_views` has none of an order."""
        if self._chain.for_blocks().stage is None:
            return "chain"
        return "control" if self._control.stale else "market"

    def _of_one_call(self, parts: Parts) -> OneCall:
        future = asyncio.get_running_loop().create_future()
        return OneCall(parts, lambda order, budget: self._pending(order, budget, None), self._left, future)

    def _begin(
        self,
        orders: Sequence[Order],
        views: Sequence[View | None],
        places: Sequence[int],
        budget: Budget,
        model: str,
        now: float,
        made: Callable[[Parts], BlockT],
    ) -> BlockT | None:
        """Life of a request in columns, first part, of the orders at these places.

        None where something about it is not the usual. `made` makes the block.
        """
        asked = self._chain.for_blocks()
        if asked.stage is None or not places:
            return None
        allowed = budget.deadline - budget.arrived
        budget.reserve_seconds = self._reserves.from_models(allowed, self._recorder.times.p95)
        budget.charge(pb.STAGE_ADMISSION, allowed, now - budget.arrived)
        budget.charge(pb.STAGE_FEATURES, budget.deadline - now, self._clock() - now)
        block = made(
            Parts(
                [orders[place] for place in places],
                [view for place in places if (view := views[place]) is not None],
                budget,
                model,
                asked,
                self._answered,
                self._went_alone,
            )
        )
        if not self._ask(block):
            block.give_up()
            return None
        return block

    def _ask(self, block: PendingBlock) -> bool:
        """Has the first stage that can be asked begin with a block; False where its orders go alone."""
        asked = block.asked
        for place, (name, _) in enumerate(asked):
            stage = self._chain.in_blocks(name)
            if stage is None:
                return False
            block.stage, block.asked = stage, asked[place:]
            try:
                taken = stage.begin_block(block)
            except Exception:
                self._chain.broke(name)
                return False
            if taken is not Taken.PASSED_OVER:
                return taken is Taken.BEGUN
        return False

    def _went_alone(self, why: Alone, orders: int) -> None:
        """So many orders have left their block."""
        self._metrics.alone[why] += orders

    def _answered(self, block: PendingBlock) -> None:
        """The model has answered all orders of a block, or will not."""
        asyncio.get_running_loop().call_soon(self._settle, block)

    def _settle(self, block: PendingBlock) -> None:
        """Life of a request in columns, the rest."""
        if block.is_left():
            return
        try:
            block.drop_failures()
            if not block or not block.stage.settle_block(block):
                block.go_on_with((), "mixed")
                return
            started = self._clock()
            if alone := self._guards.settle_block(block):
                block.go_on_with([place for place in range(len(block)) if place not in alone], "guards")
                if not block:
                    return
            block.stage.count_block(block)
            left = block.budget.deadline - started
            block.budget.charge(pb.STAGE_GUARDS, left if left > 0.0 else 0.0, self._clock() - started)
        except Exception:
            self._chain.broke(block.asked[0][0])
            block.go_on_with((), "bug")  # each finds out by itself
            return
        try:
            self._recorder.record_block(block)
        except Exception as error:
            self._fail(block, error)

    def _fail(self, block: PendingBlock, error: Exception) -> None:
        if block.decided is None:
            block.go_on_with((), "audit")
        else:
            for case in block.part():
                fail(case, error)


def _near(places: Sequence[int], waiting: Sequence[Waiting], now: float) -> Iterator[Sequence[int]]:
    """Those of some orders that are decided in one block: their deadlines are near each other."""
    places = sorted(places, key=lambda place: waiting[place].deadline)
    first = 0
    while len(places) - first >= LEAST:
        earliest = waiting[places[first]].deadline
        latest = earliest + max(_NEAR_SECONDS, _NEAR_SHARE * (earliest - now))
        last = first + 1
        while last < len(places) and last - first < _MOST and waiting[places[last]].deadline <= latest:
            last += 1
        if last - first >= LEAST:
            yield places[first:last]
        first = last
