"""Packets as one journal entry, as a server writes decisions that become durable together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.entries import NO_AGE

_OF_ANSWER = ("action", "source", "reasons", "degradations", "model_name", "model_version", "threshold")


def together(packets: Sequence[packet_pb2.DecisionPacket]) -> packet_pb2.JournalEntry:
    """One entry of these decisions, which have server and settings in common. Each part is in its table once."""
    entry = packet_pb2.JournalEntry()
    batch = entry.decisions
    first = packets[0]
    batch.shared.instance_id, batch.shared.config_hash = first.instance_id, first.config_hash
    batch.shared.durability = first.durability
    orders: list[pb.Order] = []
    answers: list[packet_pb2.DecisionPacket] = []
    for row, packet in enumerate(packets):
        rest = packet_pb2.DecisionPacket()
        rest.CopyFrom(packet)
        for name in ("instance_id", "config_hash", "durability"):
            rest.ClearField(name)
        order, decision = rest.order, rest.decision
        kind = pb.Order(instrument=order.instrument, side=order.side, strategy=order.strategy)
        said = packet_pb2.DecisionPacket(decision=decision, parts=packet.parts)
        for field, _ in decision.ListFields():
            if field.name not in _OF_ANSWER:
                said.decision.ClearField(field.name)  # type: ignore[arg-type]
        for part in said.parts:
            part.ClearField("score")
        batch.part_score.extend([part.score for part in packet.parts])
        rest.ClearField("parts")
        if kind not in orders:
            orders.append(kind)
        if said not in answers:
            answers.append(said)
        batch.order.append(orders.index(kind) + 1)
        batch.answer.append(answers.index(said) + 1)
        batch.decision_id.append(decision.decision_id)
        batch.order_ref.append(order.order_ref)
        batch.idempotency_key.append(order.idempotency_key)
        batch.quantity.append(order.quantity)
        batch.limit_price.append(order.limit_price if order.HasField("limit_price") else math.nan)
        batch.score.append(decision.score if decision.HasField("score") else math.nan)
        batch.feature_age_ns.append(
            decision.feature_age.ToNanoseconds() if decision.HasField("feature_age") else NO_AGE
        )
        batch.decided_at_ns.append(decision.decided_at.ToNanoseconds())
        batch.allowed_us.append(decision.budget.allowed_us)
        batch.used_us.append(decision.budget.used_us)
        batch.ledger.append(pb.Budget(stages=decision.budget.stages).SerializeToString())
        for column in (batch.model_input, batch.book, batch.age_us, batch.attempt_count):
            column.append(0)
        batch.age_seconds.append(math.nan)
        batch.arrived_monotonic_ns.append(packet.arrived_monotonic_ns)
        batch.decided_monotonic_ns.append(packet.decided_monotonic_ns)
        batch.mid_price.append(packet.mid_price)
        for name in (*_OF_ANSWER, "feature_age", "decided_at", "budget"):
            decision.ClearField(name)  # type: ignore[arg-type]
        batch.rest_row.append(row)
        batch.rest.append(rest.SerializeToString())
    batch.orders.extend(orders)
    batch.answers.extend(answers)
    return entry
