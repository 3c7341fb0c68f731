"""The reply of a decision."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import new_case

from fallback.order import Answer
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import record

SCORED = Answer(
    pb.ACTION_TRADE,
    pb.SOURCE_PRIMARY,
    pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD,
    0.75,
    0.5,
    "champion",
    "ab" * 8,
)
ABSTAINED = Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)


def decided(answer: Answer = SCORED, age_seconds: float = math.nan) -> record.Decided:
    case = new_case()
    case.feature_age_seconds = age_seconds
    return record.Decided(
        case, answer, answer.action, [answer.reason], "decision-1", 1_000.01, 1_700_000_000_123_456_789
    )


def read(decided: record.Decided) -> pb.Decision:
    return pb.Decision.FromString(decided.wire)


def test_a_scored_decision_carries_score_threshold_and_model() -> None:
    message = read(decided(age_seconds=0.25))
    assert (message.score, message.threshold) == (0.75, 0.5)
    assert (message.model_name, message.model_version) == ("champion", "ab" * 8)
    assert message.feature_age.ToNanoseconds() == 250_000_000
    assert message.decided_at.ToNanoseconds() == 1_700_000_000_123_456_789
    assert message.budget.allowed_us == pytest.approx(50_000, abs=1)
    assert message.budget.used_us == pytest.approx(10_000, abs=1)


def test_an_abstention_carries_none() -> None:
    message = read(decided(ABSTAINED))
    assert not message.HasField("score")
    assert not message.HasField("threshold")
    assert not message.HasField("feature_age")
    assert (message.model_name, message.model_version) == ("", "")


@given(
    arrived=st.floats(0, 1e7),
    steps=st.lists(st.tuples(st.floats(0, 0.05), st.floats(0, 0.05), st.floats(0, 1)), max_size=8),
    audit=st.floats(0, 0.05),
)
def test_the_stages_together_never_use_more_than_the_whole(
    arrived: float, steps: list[tuple[float, float, float]], audit: float
) -> None:
    """`steps` holds (time between stages, time of the stage, allowance)."""
    case = new_case(arrived=arrived)
    now = arrived
    for between, used, allowed in steps:
        started = now + between
        now = started + used
        case.budget.charge(pb.STAGE_PRIMARY, allowed, now - started)
    made = record.Decided(case, ABSTAINED, ABSTAINED.action, [ABSTAINED.reason], "decision-1", now, 0)
    message = read(made)
    assert sum(stage.used_us for stage in message.budget.stages) <= message.budget.used_us + 1
    made.charge_audit(case.budget, audit, now, now + audit)
    message = read(made)
    assert [stage.stage for stage in message.budget.stages] == [pb.STAGE_PRIMARY] * len(steps) + [pb.STAGE_AUDIT]
    assert sum(stage.used_us for stage in message.budget.stages) <= message.budget.used_us + 1
