"""What is written in Protocol Buffers' wire format, held against the generated classes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import new_case

from fallback.order import Answer
from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.protowire import prefixed, template, varint
from server.decision.record import Decided


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


def test_every_value_of_a_packed_enum_fits_into_a_byte() -> None:
    assert max(*pb.ReasonCode.values(), *pb.Degradation.values()) < 0x80


texts = st.text(max_size=64)


@given(
    order_ref=texts,
    decision_id=texts,
    model=st.tuples(texts, texts),
    scored=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    reasons=st.lists(st.sampled_from(pb.ReasonCode.values()), max_size=5),
    degradations=st.lists(st.sampled_from(pb.Degradation.values()), max_size=5),
    age=st.none() | st.floats(-5, 1e6),
    uses=st.lists(
        st.tuples(
            st.sampled_from(pb.Stage.values()),
            st.floats(0, 10),
            st.floats(0, 10),
            st.sampled_from(pb.Degradation.values()),
        ),
        max_size=8,
    ),
    wall_ns=st.integers(0, 2**61),
)
def test_a_decision_is_the_message_that_the_generated_classes_would_make_of_it(
    order_ref: str,
    decision_id: str,
    model: tuple[str, str],
    scored: tuple[float, float] | None,
    reasons: list[pb.ReasonCode.ValueType],
    degradations: list[pb.Degradation.ValueType],
    age: float | None,
    uses: list[tuple[pb.Stage.ValueType, float, float, pb.Degradation.ValueType]],
    wall_ns: int,
) -> None:
    case = new_case(values=np.zeros(features.N_FEATURES, dtype=np.float32))
    case.order.message.order_ref = order_ref
    case.degradations = degradations
    if age is not None:
        case.feature_age_seconds = age
    case.budget.uses.extend(uses)
    answer = Answer(pb.ACTION_NO_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_NO_SOURCE, model_name=model[0])
    answer.model_version = model[1]
    if scored is not None:
        answer.score, answer.threshold = scored
    decided = Decided(case, answer, pb.ACTION_ABSTAIN, reasons, decision_id, 1_000.01, wall_ns)
    expected = pb.Decision(
        decision_id=decision_id,
        order_ref=order_ref,
        action=pb.ACTION_ABSTAIN,
        source=pb.SOURCE_PRIMARY,
        reasons=reasons,
        degradations=degradations,
        model_name=model[0],
        model_version=model[1],
    )
    if scored is not None:
        expected.score, expected.threshold = scored
    if age is not None:
        expected.feature_age.FromNanoseconds(int(age * 1e9))
    expected.decided_at.FromNanoseconds(wall_ns)
    expected.budget.allowed_us = int(case.budget.allowed * 1e6)
    expected.budget.used_us = int((1_000.01 - case.budget.arrived) * 1e6)
    for stage, allowed, used, skipped in uses:
        expected.budget.stages.add(stage=stage, allowed_us=int(allowed * 1e6), used_us=int(used * 1e6), skipped=skipped)
    assert pb.Decision.FromString(decided.wire) == expected
