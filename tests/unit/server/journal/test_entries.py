"""Entries that are of no format we know, or whose columns do not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.batches import together

from pretrade.audit.v1 import packet_pb2
from server.journal.entries import decision_ids, entry_of, packet_of, packets, singly


def decision(decision_id: str) -> packet_pb2.DecisionPacket:
    packet = packet_pb2.DecisionPacket(model_input=b"1234", feature_set_id="mf1")
    packet.order.order_ref = packet.decision.order_ref = f"ref {decision_id}"
    packet.order.instrument, packet.order.quantity = "BTCUSDT.BINANCE", 0.25
    packet.decision.decision_id = decision_id
    packet.decision.decided_at.FromNanoseconds(1_700_000_000_123_456_789)
    packet.decision.budget.used_us = 5
    packet.attempts.add(replica="primary", outcome="timeout")
    return packet


def of_an_ensemble(decision_id: str, *scores: float) -> packet_pb2.DecisionPacket:
    packet = decision(decision_id)
    packet.decision.model_version = "ee" * 8
    for place, score in enumerate(scores):
        packet.parts.add(model_version=f"{place:016x}", weight=0.5, score=score)
    return packet


def test_a_decision_comes_out_of_an_entry_as_it_went_in() -> None:
    given = [of_an_ensemble("a", 0.25, 0.5), decision("b"), of_an_ensemble("c", 0.75, 1.0)]
    entry = entry_of(together(given).SerializeToString())
    assert list(packets(entry)) == [packet_of(entry, row) for row in range(3)] == given
    assert [one.decision for one in singly(entry)] == given
    assert list(decision_ids(entry)) == ["a", "b", "c"]
    assert packet_of(entry, 3) == packet_of(entry, -1) == packet_pb2.DecisionPacket()


def test_a_decision_by_itself_is_its_entrys_only_row() -> None:
    entry = packet_pb2.JournalEntry(decision=decision("a"))
    assert list(packets(entry)) == [packet_of(entry, 0)] == [decision("a")]
    assert list(singly(entry)) == [entry]
    assert list(decision_ids(entry)) == ["a"]


def test_an_entry_of_another_kind_holds_no_decision() -> None:
    entry = packet_pb2.JournalEntry(reply_heard=packet_pb2.ReplyHeard(decision_id="a"))
    assert (list(packets(entry)), list(decision_ids(entry)), list(singly(entry))) == ([], [], [entry])


BROKEN: dict[str, Callable[[packet_pb2.DecisionBatch], object]] = {
    "a column is too long": lambda batch: batch.quantity.append(1.0),
    "a column is too short": lambda batch: batch.score.pop(),
    "some have a key": lambda batch: batch.idempotency_key.pop(),
    "an order that is not there": lambda batch: batch.order.__setitem__(0, 2),
    "an answer that is not there": lambda batch: batch.answer.__setitem__(0, 9),
    "an attempt that is not there": lambda batch: batch.attempt_count.__setitem__(0, 1),
    "a rest without its row": lambda batch: batch.rest.append(b""),
    "a score of no part": lambda batch: batch.part_score.append(0.5),
    "a part without its score": lambda batch: batch.answers[0].parts.add(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_entry_whose_columns_do_not_fit_holds_nothing(name: str) -> None:
    entry = together([decision("a"), decision("b")])
    BROKEN[name](entry.decisions)
    assert entry_of(entry.SerializeToString()) == packet_pb2.JournalEntry()


def test_bytes_of_no_format_hold_nothing() -> None:
    assert entry_of(b"\xff\xff") == packet_pb2.JournalEntry()


def test_a_row_whose_rest_is_of_no_format_has_no_packet() -> None:
    entry = together([decision("a"), decision("b")])
    entry.decisions.rest[0] = b"\xff\xff"
    assert packet_of(entry, 0) == packet_pb2.DecisionPacket()
    assert packet_of(entry, 1) == decision("b")
