"""The decisions of journal entries, as the columns of SQL.

They come as columns and stay columns: nothing is made of a decision by itself. `decision_rows.py` takes plain entries a
shorter way into PostgreSQL, with the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pretrade.audit.v1 import packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.columns import NO_INTEGER, Columns, Group
from server.journal.entries import NO_AGE

ORDER_NAMES: Final = ("instrument", "side", "strategy")
"""Columns whose values decisions have from a part of `DecisionBatch.orders`."""
ANSWER_NAMES: Final = (
    *("action", "source", "reasons", "degradations", "model_name", "model_version", "threshold"),
    *("heard_action", "heard_reasons"),  # as decided, until an entry says otherwise
)
"""The same of `DecisionBatch.answers`."""
SERVER_NAMES: Final = ("instance_id", "config_hash", "durability")
"""The same of `DecisionBatch.shared`."""


def short_names(enum: Any) -> dict[int, str]:
    """The names of an enum's values, as SQL has them."""
    return {number: enum_name(enum, number) for number in enum.values()}


_SIDES: Final = short_names(pb.Side)
ACTIONS: Final = short_names(pb.Action)
_SOURCES: Final = short_names(pb.Source)
REASONS: Final = short_names(pb.ReasonCode)
_DEGRADATIONS: Final = short_names(pb.Degradation)


class DecisionColumns:
    """The decisions of a shipment, by column."""

    def __init__(self) -> None:
        self._orders = Group(ORDER_NAMES)
        self._answers = Group(ANSWER_NAMES)
        self._servers = Group(SERVER_NAMES)
        self._texts: dict[str, list[str]] = {"decision_id": [], "order_ref": [], "idempotency_key": []}
        self._numbers: dict[str, list[float]] = {
            "quantity": [],
            "limit_price": [],
            "score": [],
            "used_us": [],
            "allowed_us": [],
            "journal_position": [],
            "journal_row": [],
        }
        self._decided_at_ns: list[int] = []
        self._feature_age_ns: list[int] = []

    def add(self, batch: packet_pb2.DecisionBatch, position: int) -> None:
        """Adds the decisions of an entry.

        Raises:
            KeyError: One of them has a value without a name; none was added.
        """
        rows = len(batch.decision_id)
        orders = [order_part(order) for order in (pb.Order(), *batch.orders)]
        answers = [answer_part(answer.decision) for answer in (packet_pb2.DecisionPacket(), *batch.answers)]
        self._choose(self._orders, orders, batch.order)
        self._choose(self._answers, answers, batch.answer)
        self._servers.choice += [self._servers.number(server_part(batch.shared))] * rows
        self._texts["decision_id"] += batch.decision_id
        self._texts["order_ref"] += batch.order_ref
        self._texts["idempotency_key"] += batch.idempotency_key or [""] * rows
        numbers = self._numbers
        numbers["quantity"] += batch.quantity
        numbers["limit_price"] += batch.limit_price
        numbers["score"] += batch.score
        numbers["used_us"] += batch.used_us
        numbers["allowed_us"] += batch.allowed_us
        numbers["journal_position"] += [position] * rows
        numbers["journal_row"] += range(rows)
        self._decided_at_ns += batch.decided_at_ns
        self._feature_age_ns += batch.feature_age_ns

    def _choose(self, group: Group, parts: Sequence[tuple[Any, ...]], choice: Iterable[int]) -> None:
        """Adds rows that chose from some parts."""
        chosen = set(choice)
        numbers = [group.number(part) if number in chosen else 0 for number, part in enumerate(parts)]
        group.choice += map(numbers.__getitem__, choice)

    def columns(self, same: dict[str, Any]) -> Columns:
        """All of them."""
        import numpy as np  # noqa: PLC0415 - readers do not need it

        texts: dict[str, Sequence[Any]] = {name: all_storable(values) for name, values in self._texts.items()}
        texts["idempotency_key"] = [key or None for key in texts["idempotency_key"]]
        ages = np.array(self._feature_age_ns, np.int64)
        numbers: dict[str, Any] = {
            "decided_at": np.array(self._decided_at_ns, np.int64) // 1_000,
            "feature_age_us": np.where(ages == NO_AGE, NO_INTEGER, np.sign(ages) * (np.abs(ages) // 1_000)),
        }
        groups = [self._orders, self._answers, self._servers]
        return Columns(len(self._decided_at_ns), {**self._numbers, **numbers, **texts}, dict(same), groups)


def batch_of_one(packet: packet_pb2.DecisionPacket) -> packet_pb2.DecisionBatch:
    """A decision that is an entry by itself, with the columns that SQL gets.

    Raises:
        ValueError: It has an instant that no column can hold.
    """
    order, decision = packet.order, packet.decision
    age = decision.feature_age.ToNanoseconds() if decision.HasField("feature_age") else NO_AGE
    return packet_pb2.DecisionBatch(
        shared=packet,
        orders=[order],
        answers=[packet_pb2.DecisionPacket(decision=decision, parts=packet.parts)],
        decision_id=[decision.decision_id],
        order_ref=[order.order_ref],
        idempotency_key=[order.idempotency_key],
        order=[1],
        quantity=[order.quantity],
        limit_price=[order.limit_price if order.HasField("limit_price") else math.nan],
        answer=[1],
        score=[decision.score if decision.HasField("score") else math.nan],
        feature_age_ns=[age],
        decided_at_ns=[decision.decided_at.seconds * 1_000_000_000 + decision.decided_at.nanos],
        allowed_us=[decision.budget.allowed_us],
        used_us=[decision.budget.used_us],
        part_score=[part.score for part in packet.parts],
    )


def order_part(order: pb.Order) -> tuple[Any, ...]:
    """The values of `ORDER_NAMES`.

    Raises:
        KeyError: One of them has no name.
    """
    return storable(order.instrument), _SIDES[order.side], storable(order.strategy)


def answer_part(decision: pb.Decision) -> tuple[Any, ...]:
    """The values of `ANSWER_NAMES`.

    Raises:
        KeyError: One of them has no name.
    """
    action, reasons = ACTIONS[decision.action], names_of(decision.reasons, REASONS)
    return (
        action,
        _SOURCES[decision.source],
        reasons,
        names_of(decision.degradations, _DEGRADATIONS),
        storable(decision.model_name),
        storable(decision.model_version),
        # One object stands for all NaN: others are unequal, and would be a part each.
        decision.threshold if decision.HasField("threshold") and decision.threshold == decision.threshold else math.nan,
        action,
        reasons,
    )


def server_part(shared: packet_pb2.DecisionPacket) -> tuple[Any, ...]:
    """The values of `SERVER_NAMES`."""
    return storable(shared.instance_id), storable(shared.config_hash), storable(shared.durability)


def names_of(values: Sequence[int], short_names: Mapping[int, str]) -> tuple[str, ...]:
    """The names of some values of an enum; KeyError when one has none."""
    return tuple([short_names[value] for value in values]) if values else ()


def storable(value: str) -> str:
    """As PostgreSQL can store it: without NUL characters. The evidence keeps them."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}")


def all_storable(values: Sequence[str]) -> Sequence[str]:
    """The same for a whole column, which hardly ever has any."""
    return [storable(value) for value in values] if "\0" in "".join(values) else values
