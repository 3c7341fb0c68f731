"""Decisions of orders that were decided in columns (`fallback/block.py`), ready to be recorded and sent."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from server.decision import decision_wire
from server.decision.record import Decided, ReplyState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fallback.block import Block
    from fallback.budget import Budget
    from server.decision.record import RecordedRow


class DecidedBlock:
    """The decisions of a block, made at one instant, that become durable, are sent and are heard together.

    What is true of one of them alone is said of its `Decided` (`apart`).

    Args:
        block: The orders, and what the model said.
        ids: A decision id for each.
        now: Monotonic seconds.
        wall_ns: The same instant, nanoseconds since the Unix epoch.
        control_version: Of the control state that they were made under.
    """

    __slots__ = (
        "_apart",
        "allowed_us",
        "arrived",
        "block",
        "budgets",
        "control_version",
        "durable_until",
        "ids",
        "recorded_at",
        "recorded_us",
        "reply",
        "unsettled",
        "used_us",
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
        self.arrived = budget.arrived
        self.allowed_us = max(0, int((budget.deadline - budget.arrived) * 1e6))
        self.recorded_us = self.used_us = max(0, int((now - budget.arrived) * 1e6))
        """Microseconds that they took: until they were recorded, and until they are sent."""
        self.uses = budget.uses.copy()
        """The ledger as it is recorded."""
        self.durable_until = math.nan
        """Until when the caller can wait for the audit, in monotonic seconds."""
        self.reply = ReplyState.NONE
        """Of all of them, until `apart` was asked for."""
        self._apart: list[Decided] | None = None
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
                self.budgets.append(self.block.budget.copy())
                self._apart.append(self._decided(place, self.budgets[place]))
            self.unsettled.update(self._apart)
        return self._apart

    def one(self, place: int) -> Decided:
        """One of the decisions, for somebody to read; what becomes of it is said of those that are `apart`."""
        return self._decided(place, self.block.budget.copy())

    def _decided(self, place: int, budget: Budget) -> Decided:
        block = self.block
        reasons = [block.reasons[place]]
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
        decided.used_us = self.used_us
        decided.reply = self.reply
        decided.block = self
        return decided

    def rows(self) -> Iterator[RecordedRow]:
        """What `PacketBatch.add` writes down of each order."""
        block, now_ns = self.block, int(self.recorded_at * 1e9)
        for place, decision_id in enumerate(self.ids):
            yield (
                block.case(place),
                block.answer(place),
                block.orders[place],
                decision_id,
                block.actions[place],
                bytes((block.reasons[place],)),
                b"",
                self.allowed_us,
                self.recorded_us,
                self.uses,
                (block.attempt(place),),
                self.wall_ns,
                now_ns,
            )

    def wires(self) -> Iterator[bytes]:
        """Each decision, serialised for the reply."""
        block, write = self.block, decision_wire.write
        model, source, uses = block.model, block.source, block.budget.uses
        assert model is not None
        name, version, threshold = model.name, model.version, model.threshold
        for decision_id, order, view, action, reason, scored in zip(
            self.ids, block.orders, block.views, block.actions, block.reasons, block.results, strict=True
        ):
            yield write(
                decision_id,
                order.order_ref,
                action,
                [reason],
                [],
                source,
                name,
                version,
                scored.score,
                threshold,
                view.age_seconds,
                self.wall_ns,
                self.control_version,
                self.allowed_us,
                self.used_us,
                uses,
            )
