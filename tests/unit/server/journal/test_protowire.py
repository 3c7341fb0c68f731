"""What is written in Protocol Buffers' wire format, held against the generated classes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.protowire import prefixed, short_tag, template


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 16_385, 2**21 - 1, 2**21])
def test_content_of_any_length_is_written_as_the_generated_classes_do(size: int) -> None:
    wire = template(packet_pb2.DecisionPacket.DESCRIPTOR, "model_input") % prefixed(bytes(size))
    assert wire == packet_pb2.DecisionPacket(model_input=bytes(size)).SerializeToString()


@given(st.binary(max_size=300), st.text(max_size=300), st.lists(st.text(max_size=30), max_size=3))
def test_every_kind_of_field_is_read_as_it_was_written(content: bytes, text: str, texts: list[str]) -> None:
    packet = template(packet_pb2.DecisionPacket.DESCRIPTOR, "model_input", "order", "trace_id")
    order = template(pb.Order.DESCRIPTOR, "order_ref") % prefixed(text.encode())
    wire = packet % (prefixed(content), prefixed(order), prefixed(text.encode()))
    flag = template(packet_pb2.DecisionPacket.DESCRIPTOR, "flags_on")
    wire += b"".join(flag % prefixed(one.encode()) for one in texts)
    assert packet_pb2.DecisionPacket.FromString(wire) == packet_pb2.DecisionPacket(
        model_input=content, order=pb.Order(order_ref=text), trace_id=text, flags_on=texts
    )


def test_a_field_that_the_contract_does_not_have_cannot_be_written() -> None:
    with pytest.raises(KeyError):
        template(pb.Decision.DESCRIPTOR, "verdict")


def test_a_number_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="score is no message"):
        template(pb.Decision.DESCRIPTOR, "score")


def test_a_field_whose_tag_takes_two_bytes_has_no_short_one() -> None:
    assert short_tag(pb.Decision.DESCRIPTOR, "decision_id", 2) == pb.Decision(decision_id="x").SerializeToString()[0]
    with pytest.raises(ValueError, match=r"decision_id has a number above 15"):
        short_tag(packet_pb2.DecisionBatch.DESCRIPTOR, "decision_id", 2)
