"""Which replies are unknown after a process died."""

from __future__ import annotations

from support.batches import together

from pretrade.audit.v1 import packet_pb2
from server.journal.journal_file import Row
from server.journal.reply_status import heard, notes_of, unconfirmed, unknown_replies


def packet(decision_id: str) -> packet_pb2.DecisionPacket:
    packet = packet_pb2.DecisionPacket()
    packet.decision.decision_id = decision_id
    return packet


def test_each_decision_of_an_entry_is_unknown_unless_another_entry_tells() -> None:
    entries = [
        together([packet("a"), packet("b"), packet("c")]).SerializeToString(),
        unconfirmed("b", "cancelled"),
        packet_pb2.JournalEntry(decision=packet("d")).SerializeToString(),
        heard("a"),
        b"of no format",
    ]
    rows = [Row(position, entry, b"") for position, entry in enumerate(entries, 1)]
    unknown = unknown_replies(rows)
    assert [packet.decision.decision_id for packet in unknown] == ["c", "d"]
    assert notes_of(unknown, "killed") == [unconfirmed("c", "killed"), unconfirmed("d", "killed")]
