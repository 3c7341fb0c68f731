"""What is written in Protocol Buffers' wire format, held against the generated classes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.protowire import prefixed, template, varint


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_integer_is_read_as_it_was_written(number: int) -> None:
    wire = template(packet_pb2.FeatureProvenance.DESCRIPTOR, "sequence") % varint(number)
    assert packet_pb2.FeatureProvenance.FromString(wire).sequence == number


@pytest.mark.parametrize("number", [0, 1, 127, 128, 16_383, 16_384, 65_535, 65_536, 2**32 - 1])
def test_an_integer_takes_as_little_room_as_the_generated_classes_give_it(number: int) -> None:
    wire = template(pb.Budget.DESCRIPTOR, "used_us") % varint(number)
    assert pb.Budget.FromString(wire).used_us == number
    if number:
        assert wire == pb.Budget(used_us=number).SerializeToString()


def test_every_kind_of_field_is_written_as_the_generated_classes_do() -> None:
    features_wire = template(
        packet_pb2.FeatureProvenance.DESCRIPTOR, "event_time_ns", "from_caller", "book_state", "age_seconds"
    ) % (varint(7), varint(True), varint(packet_pb2.BOOK_STATE_VALID), struct.pack("<d", 0.25))
    age = template(packet_pb2.FeatureProvenance.DESCRIPTOR, "book_age_ms") % struct.pack("<f", 1.5)
    packet = template(packet_pb2.DecisionPacket.DESCRIPTOR, "model_input", "feature_set_id", "features", "flags_on")
    wire = packet % (prefixed(b"\0\1"), prefixed(b"mf1"), prefixed(features_wire + age), prefixed(b"shadow"))
    provenance = packet_pb2.FeatureProvenance(
        event_time_ns=7, from_caller=True, book_state=packet_pb2.BOOK_STATE_VALID, age_seconds=0.25, book_age_ms=1.5
    )
    expected = packet_pb2.DecisionPacket(
        model_input=b"\0\1", feature_set_id="mf1", features=provenance, flags_on=["shadow"]
    )
    assert packet_pb2.DecisionPacket.FromString(wire) == expected
    some = [pb.REASON_CODE_RULES_PASSED, pb.REASON_CODE_PRICE_COLLAR]
    reasons = template(pb.Decision.DESCRIPTOR, "reasons") % prefixed(bytes(some))
    assert reasons == pb.Decision(reasons=some).SerializeToString()


def test_a_field_that_the_contract_does_not_have_cannot_be_written() -> None:
    with pytest.raises(KeyError):
        template(pb.Decision.DESCRIPTOR, "verdict")
