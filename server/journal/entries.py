"""The entries of a journal as messages, and the decisions in them.

Decisions that became durable together are one entry, a `DecisionBatch`: tables of what many of them have in common, and
columns with a value for each. Here are the packets made from it. What reads many millions of decisions, as shipping
does, takes the columns as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

from google.protobuf.message import DecodeError

from pretrade.audit.v1 import packet_pb2

NO_AGE: Final = -(2**63)
"""In `DecisionBatch.feature_age_ns`: the decision has none."""

_COLUMNS: Final = (
    *("order_ref", "order", "quantity", "limit_price", "answer", "score", "feature_age_ns", "decided_at_ns"),
    *("allowed_us", "used_us", "ledger", "model_input", "book", "age_seconds", "age_us", "attempt_count"),
    *("arrived_monotonic_ns", "decided_monotonic_ns", "mid_price"),
)
"""They have as many values as there are rows."""
_CHOICES: Final = (
    *(("order", "orders"), ("answer", "answers"), ("model_input", "model_inputs")),
    *(("book", "books"), ("attempt", "attempts")),
)
"""Columns that choose from a table."""


def entry_of(data: bytes) -> packet_pb2.JournalEntry:
    """The entry in some bytes; an empty one when they are of no format we know: `verify` is what judges evidence."""
    try:
        entry = packet_pb2.JournalEntry.FromString(data)
    except DecodeError:
        return packet_pb2.JournalEntry()
    if entry.WhichOneof("entry") == "decisions" and not _is_whole(entry.decisions):
        return packet_pb2.JournalEntry()
    return entry


def decision_ids(entry: packet_pb2.JournalEntry) -> Sequence[str]:
    """The ids of the decisions in an entry, row by row; none when it holds something else."""
    match entry.WhichOneof("entry"):
        case "decisions":
            return entry.decisions.decision_id
        case "decision":
            return (entry.decision.decision.decision_id,)
    return ()


def keyed_ids(entry: packet_pb2.JournalEntry) -> list[str]:
    """The ids of the decisions in an entry whose calls have an idempotency key."""
    match entry.WhichOneof("entry"):
        case "decisions":
            columns = zip(entry.decisions.decision_id, entry.decisions.idempotency_key, strict=False)
            return [decision_id for decision_id, key in columns if key]
        case "decision" if entry.decision.order.idempotency_key:
            return [entry.decision.decision.decision_id]
    return []


def packets(entry: packet_pb2.JournalEntry) -> Iterator[packet_pb2.DecisionPacket]:
    """The packets of the decisions in an entry, row by row; none when it holds something else.

    Args:
        entry: From `entry_of`.
    """
    match entry.WhichOneof("entry"):
        case "decisions":
            batch = entry.decisions
            rest = dict(zip(batch.rest_row, batch.rest, strict=True))
            attempts = accumulate(batch.attempt_count, initial=0)
            parts = accumulate(part_counts(batch), initial=0)
            for row, first_attempt, first_part in zip(range(len(batch.decision_id)), attempts, parts, strict=False):
                yield _packet(batch, row, first_attempt, first_part, rest.get(row, b""))
        case "decision":
            yield entry.decision


def packet_of(entry: packet_pb2.JournalEntry, row: int) -> packet_pb2.DecisionPacket:
    """The packet of one row; an empty one when there is none.

    Args:
        entry: From `entry_of`.
        row: Counted from 0.
    """
    batch = entry.decisions
    if not 0 <= row < len(batch.decision_id):
        return entry.decision if row == 0 else packet_pb2.DecisionPacket()
    rest = next((rest for at, rest in zip(batch.rest_row, batch.rest, strict=True) if at == row), b"")
    return _packet(batch, row, sum(batch.attempt_count[:row]), sum(part_counts(batch)[:row]), rest)


def part_counts(batch: packet_pb2.DecisionBatch) -> list[int]:
    """How many parts the model of each row has: so many of `part_score` are the row's."""
    counts = [0, *(len(answer.parts) for answer in batch.answers)]
    return [counts[chosen] for chosen in batch.answer] if any(counts) else [0] * len(batch.answer)


def singly(entry: packet_pb2.JournalEntry) -> Iterator[packet_pb2.JournalEntry]:
    """The entry, with each decision in an entry by itself.

    Args:
        entry: From `entry_of`.
    """
    if entry.WhichOneof("entry") != "decisions":
        yield entry
        return
    for packet in packets(entry):
        yield packet_pb2.JournalEntry(decision=packet)


def _is_whole(batch: packet_pb2.DecisionBatch) -> bool:
    """True when every row has its value in each column, and what columns choose is there."""
    rows = len(batch.decision_id)
    attempts = sum(batch.attempt_count)
    return (
        all(len(getattr(batch, name)) == rows for name in _COLUMNS)
        and len(batch.idempotency_key) in {0, rows}
        and len(batch.attempt) == len(batch.attempt_used_us) == len(batch.attempt_batch_index) == attempts
        and len(batch.rest_row) == len(batch.rest)
        and all(max(getattr(batch, column), default=0) <= len(getattr(batch, table)) for column, table in _CHOICES)
        and len(batch.part_score) == sum(part_counts(batch))
    )


def _packet(
    batch: packet_pb2.DecisionBatch, row: int, first_attempt: int, first_part: int, rest: bytes
) -> packet_pb2.DecisionPacket:
    packet = packet_pb2.DecisionPacket()
    packet.CopyFrom(batch.shared)
    if answer := batch.answer[row]:
        packet.MergeFrom(batch.answers[answer - 1])
    for at, part in enumerate(packet.parts, first_part):
        part.score = batch.part_score[at]
    _add_order(packet, batch, row)
    _add_decision(packet, batch, row)
    if vector := batch.model_input[row]:
        packet.model_input, packet.feature_set_id = batch.model_inputs[vector - 1], batch.feature_set_id
    if book := batch.book[row]:
        packet.features.CopyFrom(batch.books[book - 1])
    if (age := batch.age_seconds[row]) == age:
        packet.features.age_seconds, packet.features.age_us = age, batch.age_us[row]
    for at in range(first_attempt, first_attempt + batch.attempt_count[row]):
        attempt = packet.attempts.add()
        if chosen := batch.attempt[at]:
            attempt.CopyFrom(batch.attempts[chosen - 1])
        attempt.used_us, attempt.batch_index = batch.attempt_used_us[at], batch.attempt_batch_index[at]
    packet.arrived_monotonic_ns = batch.arrived_monotonic_ns[row]
    packet.decided_monotonic_ns = batch.decided_monotonic_ns[row]
    packet.mid_price = batch.mid_price[row]
    try:
        packet.decision.budget.MergeFromString(batch.ledger[row])
        packet.MergeFromString(rest)
    except DecodeError:
        return packet_pb2.DecisionPacket()
    return packet


def _add_order(packet: packet_pb2.DecisionPacket, batch: packet_pb2.DecisionBatch, row: int) -> None:
    order = packet.order
    if kind := batch.order[row]:
        order.MergeFrom(batch.orders[kind - 1])
    order.order_ref = batch.order_ref[row]
    order.quantity = batch.quantity[row]
    if (limit_price := batch.limit_price[row]) == limit_price:
        order.limit_price = limit_price
    if batch.idempotency_key:
        order.idempotency_key = batch.idempotency_key[row]


def _add_decision(packet: packet_pb2.DecisionPacket, batch: packet_pb2.DecisionBatch, row: int) -> None:
    decision = packet.decision
    decision.decision_id = batch.decision_id[row]
    decision.order_ref = batch.order_ref[row]
    if (score := batch.score[row]) == score:
        decision.score = score
    if (age := batch.feature_age_ns[row]) != NO_AGE:
        decision.feature_age.FromNanoseconds(age)
    decision.decided_at.FromNanoseconds(batch.decided_at_ns[row])
    decision.budget.allowed_us, decision.budget.used_us = batch.allowed_us[row], batch.used_us[row]
