"""Holds what a journal says of its ranges against the entries in them."""

from __future__ import annotations

from collections.abc import Iterator

from pretrade.audit.v1 import packet_pb2
from server.journal.entries import entry_of, packets
from server.journal.journal_file import JournalReader
from server.journal.ranges import Range


def wrong_ranges(journal: JournalReader) -> list[str]:
    """What a look-up that relies on the ranges of a journal would miss."""
    return list(_wrong(journal))


def _wrong(journal: JournalReader) -> Iterator[str]:
    later = journal.last_position() + 1
    for known in journal.ranges(0, journal.last_position()):
        if not 0 < known.first <= known.last < later:
            yield f"the range {known.first} to {known.last} does not end before {later}"
        later = known.first
        for row in journal.rows_after(known.first - 1, known.last - known.first + 1):
            if row.position > known.last:  # some of its entries were trimmed
                break
            for packet in packets(entry_of(row.entry)):
                if not _is_in(known, packet):
                    yield f"row {row.position} is not what its range says: {packet.decision.decision_id}"


def _is_in(known: Range, packet: packet_pb2.DecisionPacket) -> bool:
    order, decision = packet.order, packet.decision
    values = (
        (order.instrument, known.instruments),
        (order.strategy, known.strategies),
        (decision.model_name, known.models),
        (decision.model_version, known.models),
        (decision.action, known.actions),
        (decision.source, known.sources),
    )
    return (
        all(not value or held is None or value in held for value, held in values)
        and (not decision.decision_id or known.oldest_id <= decision.decision_id <= known.newest_id)
        and (known.has_keys or not order.idempotency_key)
    )
