"""A decision in Protocol Buffers' wire format, written by either of the twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import new_case
from support.twins import compiled_here

from fallback.block import Block, Own, Scores, View
from fallback.budget import Budget, Use
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import decision_wire
from server.decision.decided_block import DecidedBlock
from server.decision.decision_wire import write_plainly, write_results_plainly, write_stages_plainly
from server.inference.rows import Scored
from server.inference.wire import ModelIdentity

texts = st.text(max_size=64)
times = st.floats(-1, 10)
numbers = st.integers(0, 2**32 - 1)
USES = st.lists(
    st.tuples(st.sampled_from(pb.Stage.values()), times, times, st.sampled_from(pb.Degradation.values())),
    max_size=40,
)
DECISIONS = st.tuples(
    texts,
    texts,
    st.sampled_from(pb.Action.values()),
    st.lists(st.sampled_from(pb.ReasonCode.values()), max_size=200),
    st.lists(st.sampled_from(pb.Degradation.values()), max_size=5),
    st.sampled_from(pb.Source.values()),
    texts,
    st.text(max_size=300),
    st.just(math.nan) | st.floats(0, 1),
    st.floats(0, 1),
    st.just(math.nan) | st.floats(-5, 1e6),
    st.integers(0, 2**61),
    st.integers(0, 2**63 - 1),
    numbers,
    numbers,
    USES,
)


@given(DECISIONS)
def test_both_write_the_same_bytes(decision: tuple[object, ...]) -> None:
    write: Callable[..., bytes] = compiled_here("server.decision.decision_wire_c").write
    plainly: Callable[..., bytes] = write_plainly
    assert write(*decision) == plainly(*decision)


@given(USES)
def test_both_write_the_same_stages(uses: list[Use]) -> None:
    assert compiled_here("server.decision.decision_wire_c").write_stages(uses) == write_stages_plainly(uses)


class Answered(Block):
    """Orders of which each has its score, and a caller, an arrival and a deadline of its own if there are `owns`."""

    def __init__(self, scores: list[float], owns: list[Own] | None, objections: list[tuple[Any, ...]]) -> None:
        cases = [new_case(sequence=7, side=pb.SIDE_SELL if place % 2 else pb.SIDE_BUY) for place in range(len(scores))]
        orders = [replace(case.order, order_ref=f"order-{place}") for place, case in enumerate(cases)]
        views = []
        for place, case in enumerate(cases):
            assert case.snapshot is not None
            assert case.features is not None
            views.append(View(case.snapshot, 0.25 * place, case.mid, case.features, case.row()))
        budget = Budget(1.0, 1.5)
        budget.charge(pb.STAGE_ADMISSION, 0.5, 0.001)
        super().__init__(orders, views, budget, own=owns)
        budget.charge(pb.STAGE_PRIMARY, 0.4, 0.002)
        identity = ModelIdentity("champion", "ab" * 8, 0.5, 0, MF1)
        self.put_all(Scores(scores, identity, len(scores), 0, None, lambda place: Scored(scores[place], identity)))
        self.answered(pb.SOURCE_PRIMARY, identity, 0.001)
        self.objections = objections

    def complete(self) -> None:
        """Nothing: they are answered."""

    def is_left(self) -> bool:
        return True

    def is_gone(self, place: int) -> bool:
        return True

    def put_failure(self, place: int, result: Any) -> None:
        raise AssertionError


SIZES = st.sampled_from([0, 1, 100, 120, 121, 122, 123, 124, 125, 126, 127, 128, 16_370, 16_383, 16_384])


@given(st.lists(st.tuples(st.text(max_size=50), SIZES, SIZES), max_size=5))
def test_the_results_of_a_batch_are_written_alike_by_both_and_read_by_the_generated_classes(
    given: list[tuple[str, int, int]],
) -> None:
    refs = [text + "x" * more for text, more, _ in given]
    wires = [pb.Decision(model_name="x" * size).SerializeToString() for _, _, size in given]
    wire = compiled_here("server.decision.decision_wire_c").write_results(refs, wires)
    assert wire == write_results_plainly(refs, wires)
    assert pb.DecideBatchResponse.FromString(wire) == pb.DecideBatchResponse(
        results=[
            pb.OrderResult(order_ref=ref, decision=pb.Decision.FromString(wire))
            for ref, wire in zip(refs, wires, strict=True)
        ]
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.booleans(), st.booleans(), st.booleans())
def test_a_block_is_written_as_each_of_its_decisions(
    scores: list[float], have_own: bool, are_objected_to: bool, is_degraded: bool
) -> None:
    count, owns, objections = len(scores), None, list[tuple[Any, ...]]()
    if have_own:
        owns = [
            Own(0.5 + place / 10, 1.5 + place, (pb.STAGE_ADMISSION, 1.0, place / 100, pb.DEGRADATION_UNSPECIFIED))
            for place in range(count)
        ]
    if are_objected_to:
        objections = [(pb.REASON_CODE_UNCERTAIN, pb.REASON_CODE_PRICE_COLLAR)[: place % 3] for place in range(count)]
    block = Answered(scores, owns, objections)
    if is_degraded:
        block.degradations.append(pb.DEGRADATION_PRIMARY_BREAKER_OPEN)
    decided = DecidedBlock(block, [f"decision-{place}" for place in range(count)], 1.25, 1_700_000_000_123_456_789, 7)
    decided.ended_at = 1.375
    each = [decided.wire(place) for place in range(count)]
    assert decided.wires() == each
    assert compiled_here("server.decision.decision_wire_c").write_block(decided) == each
    assert [pb.Decision.FromString(wire).order_ref for wire in each] == [f"order-{place}" for place in range(count)]


def test_what_is_asked_for_is_what_is_written() -> None:
    uses = [
        (pb.STAGE_PRIMARY, 0.01, 0.002, pb.DEGRADATION_UNSPECIFIED),
        (pb.STAGE_SECONDARY, 0.0, 0.0, pb.DEGRADATION_NO_TIME_FOR_MODEL),
    ]
    wire = decision_wire.write(
        "d-1",
        "o-1",
        pb.ACTION_TRADE,
        [pb.REASON_CODE_RULES_PASSED],
        [pb.DEGRADATION_PRIMARY_TIMEOUT],
        pb.SOURCE_RULES,
        "champion",
        "v1",
        0.75,
        0.5,
        0.25,
        1_700_000_000_123_456_789,
        7,
        50_000,
        10_000,
        uses,
    )
    message = pb.Decision.FromString(wire)
    assert (message.decision_id, message.order_ref, message.action) == ("d-1", "o-1", pb.ACTION_TRADE)
    assert (message.score, message.threshold, message.source) == (0.75, 0.5, pb.SOURCE_RULES)
    assert list(message.reasons) == [pb.REASON_CODE_RULES_PASSED]
    assert list(message.degradations) == [pb.DEGRADATION_PRIMARY_TIMEOUT]
    assert (message.model_name, message.model_version, message.control_version) == ("champion", "v1", 7)
    assert message.feature_age.ToNanoseconds() == 250_000_000
    assert message.decided_at.ToNanoseconds() == 1_700_000_000_123_456_789
    assert (message.budget.allowed_us, message.budget.used_us) == (50_000, 10_000)
    first, second = message.budget.stages
    assert (first.stage, first.allowed_us, first.used_us, first.skipped) == (pb.STAGE_PRIMARY, 10_000, 2_000, 0)
    assert (second.stage, second.skipped) == (pb.STAGE_SECONDARY, pb.DEGRADATION_NO_TIME_FOR_MODEL)


@pytest.mark.parametrize("broken", ["uses", "reasons"])
def test_what_is_no_decision_raises_and_writes_nothing(broken: str) -> None:
    write = compiled_here("server.decision.decision_wire_c").write
    whole = ["d", "", 1, [], [], 1, "", "", 0.5, 0.5, 0.1, 0, 0, 0, 0, []]
    whole[{"reasons": 3, "uses": 15}[broken]] = [None]
    with pytest.raises(TypeError):
        write(*whole)


def test_every_value_of_a_packed_enum_fits_into_a_byte() -> None:
    assert max(*pb.ReasonCode.values(), *pb.Degradation.values()) < 0x80
