"""Decisions of orders that were decided in columns (`fallback/block.py`), ready to be recorded and sent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from feature_cache.compiled import compiled
from server.decision import decision_wire
from server.decision.record import Decided, ReplyState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fallback.block import Block
    from fallback.budget import Budget
    from pretrade.decision.v1 import decision_pb2 as pb
    from server.decision.record import RecordedRow

_compiled = compiled("server.decision.decision_wire_c")


class DecidedBlock:
    """The decisions of a block, made at one instant, that become durable together.

    Those of one call are sent and heard together, too; those of several callers are each sent as a `DecidedRow`. What
    else is true of one of them alone is said of its `Decided` (`apart`).

    Args:
        block: The orders, and what the model said.
        ids: A decision id for each.
        now: Monotonic seconds.
        wall_ns: The same instant, nanoseconds since the Unix epoch.
        control_version: Of the control state that they were made under.
    """

    __slots__ = (
        "_apart",
        "_wires",
        "arrived",
        "block",
        "budgets",
        "control_version",
        "durable_until",
        "ended_at",
        "heard",
        "ids",
        "recorded_at",
        "reply",
        "unsettled",
        "uses",
        "wall_ns",
    )

    def __init__(self, block: Block, ids: Sequence[str], now: float, wall_ns: int, control_version: int) -> None:
        budget = block.budget
        self.block = block
        self.ids = ids
        self.recorded_at = now
        self.wall_ns = wall_ns
        self.control_version = control_version
        self.arrived = budget.arrived if block.own is None else min(own.arrived for own in block.own)
        """When the first of them came, in monotonic seconds."""
        self.ended_at = now
        """Until when their time is counted: when they were recorded, and then when they are sent."""
        self.uses = budget.uses.copy()
        """The ledger as it is recorded."""
        self.durable_until = math.nan
        """Until when all callers can wait for the audit, in monotonic seconds."""
        self.heard: set[int] = set()
        """The places of those that their callers have heard, until `apart` was asked for."""
        self.reply = ReplyState.NONE
        """Of all of them but those that are heard, until `apart` was asked for."""
        self._apart: list[Decided] | None = None
        self._wires: list[bytes] | None = None
        self.budgets: list[Budget] = []
        """Of each decision that is apart."""
        self.unsettled: set[Decided] = set()
        """Those that are apart of which it is not yet durable what their callers heard."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Decisions."""
        return len(self.ids)

    @property
    def is_apart(self) -> bool:
        """Whether each decision has a state of its own by now."""
        return self._apart is not None

    def apart(self) -> list[Decided]:
        """Each decision by itself, in the state in which all of them were; from now on each has one of its own."""
        if self._apart is None:
            self._apart = []
            for place in range(len(self)):
                self.budgets.append(self.block.budget_of(place))
                self._apart.append(self._decided(place, self.budgets[place]))
            self.unsettled.update(one for place, one in enumerate(self._apart) if place not in self.heard)
        return self._apart

    def one(self, place: int) -> Decided:
        """One of the decisions, for somebody to read; what becomes of it is said of those that are `apart`."""
        return self._decided(place, self.block.budget_of(place))

    def _decided(self, place: int, budget: Budget) -> Decided:
        block = self.block
        reasons = block.reasons_of(place)
        decided = Decided(
            block.case(place, budget),
            block.answer(place),
            block.actions[place],
            reasons,
            self.ids[place],
            self.recorded_at,
            self.wall_ns,
            self.control_version,
        )
        decided.used_us = microseconds(budget.arrived, self.ended_at)
        decided.reply = ReplyState.HEARD if place in self.heard else self.reply
        decided.block = self
        return decided

    def rows(self) -> Iterator[RecordedRow]:
        """What `PacketBatch.add` writes down of each order."""
        block, now_ns = self.block, int(self.recorded_at * 1e9)
        times = block.times()
        for place, (decision_id, (arrived, deadline)) in enumerate(zip(self.ids, times, strict=True)):
            yield (
                block.case(place),
                block.answer(place),
                block.orders[place],
                decision_id,
                block.actions[place],
                bytes(block.reasons_of(place)),
                bytes(block.degradations),
                microseconds(arrived, deadline),
                microseconds(arrived, self.recorded_at),
                block.uses_of(place, self.uses),
                (block.attempt(place),),
                self.wall_ns,
                now_ns,
            )

    def wires(self) -> list[bytes]:
        """Each decision, serialised for the reply. To be asked for when they are sent, and not before."""
        if self._wires is None:
            places = range(len(self))
            self._wires = [self.wire(place) for place in places] if _compiled is None else _compiled.write_block(self)
        return self._wires

    def results(self) -> bytes:
        """The reply to a batch of all these orders; see `wires`."""
        return decision_wire.write_results([order.order_ref for order in self.block.orders], self.wires())

    def wire(self, place: int) -> bytes:
        """One of them, written by itself."""
        block, budget = self.block, self.block.budget
        model, order, own = block.model, block.orders[place], block.own
        arrived, deadline = (budget.arrived, budget.deadline) if own is None else own[place][:2]
        assert model is not None
        return decision_wire.write(
            self.ids[place],
            order.order_ref,
            block.actions[place],
            block.reasons_of(place),
            block.degradations,
            block.source,
            model.name,
            model.version,
            block.scores[place],
            model.threshold,
            block.views[place].age_seconds,
            self.wall_ns,
            self.control_version,
            microseconds(arrived, deadline),
            microseconds(arrived, self.ended_at),
            block.uses_of(place, budget.uses),
        )


class DecidedRow:
    """A decision of a block whose caller waits for it alone.

    Args:
        block: What was decided together.
        place: Of this one.
    """

    __slots__ = ("block", "place")

    count: Final = 1
    """Decisions; see `DecidedBlock`."""

    def __init__(self, block: DecidedBlock, place: int) -> None:
        self.block = block
        self.place = place

    @property
    def wire(self) -> bytes:
        """The serialised `Decision`."""
        return self.block.wires()[self.place]

    @property
    def order_ref(self) -> str:
        """The caller's own."""
        return self.block.block.orders[self.place].order_ref

    @property
    def decision_id(self) -> str:
        """Unique."""
        return self.block.ids[self.place]

    @property
    def source(self) -> pb.Source.ValueType:
        """Who answered."""
        return self.block.block.source

    def apart(self) -> Decided:
        """The decision by itself, with a state of its own from now on."""
        return self.block.apart()[self.place]


OneDecided = Decided | DecidedRow
"""One decision, however it was made."""


def microseconds(since: float, until: float) -> int:
    """From one instant to another, both in seconds; none if that is before it."""
    return max(0, int((until - since) * 1e6))
