"""No model, no features, forced breakers: the rest of the chain."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from support.harness import Load, Product, eventually

from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack


@pytest.mark.fault(
    "A11", "Both champions are killed, then the features stop", "CACHED_SCORE, then RULES, then ABSTAIN."
)
def test_without_replicas_the_last_score_answers_then_the_rules_then_nobody(product: Product) -> None:
    product.decide_until(pb.SOURCE_PRIMARY)
    with Load(product, count=1) as load:  # asks all the time, since a score is young for a second only
        product.stack["primary"].kill()
        product.stack["secondary"].kill()
        eventually(load.sources, lambda sources: pb.SOURCE_RULES in sources)
    cached = next(decision for decision in load.decisions if decision.source == pb.SOURCE_CACHED_SCORE)
    assert cached.model_name == "champion"
    assert cached.HasField("score")
    rules = product.decide_until(pb.SOURCE_RULES)
    assert (rules.action, list(rules.reasons)) == (pb.ACTION_TRADE, [pb.REASON_CODE_RULES_PASSED])
    assert not rules.HasField("score")
    assert pb.DEGRADATION_NO_CACHED_SCORE in rules.degradations
    product.market.pause()
    nobody = product.decide_until(pb.SOURCE_NONE)
    assert nobody.action == pb.ACTION_ABSTAIN
    assert {pb.REASON_CODE_NO_SOURCE, pb.REASON_CODE_FEATURES_STALE} <= set(nobody.reasons)
    assert pb.DEGRADATION_FEATURES_STALE in nobody.degradations


@pytest.mark.fault("C7", "An instrument's features stop", "ABSTAIN with FEATURES_STALE, then with FEATURES_MISSING.")
def test_features_that_expired_are_missing_and_decide_nothing(product: Product) -> None:
    product.market.pause()
    decision = eventually(product.decide, lambda seen: pb.REASON_CODE_FEATURES_MISSING in seen.reasons)
    assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)


def test_the_cached_score_stage_can_be_switched_off(product: Product) -> None:
    request = admin_pb2.SetFlagRequest(name="cached_score", enabled=False, author="test", reason="test")
    product.admin.SetFlag(request, timeout=5.0)
    product.decide_until(pb.SOURCE_PRIMARY)
    product.stack["primary"].kill()
    product.stack["secondary"].kill()
    decision = product.decide_until(pb.SOURCE_RULES)
    assert pb.DEGRADATION_CACHED_SCORE_OFF in decision.degradations


def test_forced_breakers_are_obeyed_and_expire(product: Product) -> None:
    product.force("primary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    assert product.decide_until(pb.SOURCE_SECONDARY).degradations == [pb.DEGRADATION_PRIMARY_BREAKER_OPEN]
    product.force("primary", admin_pb2.BREAKER_MODE_AUTOMATIC)
    product.decide_until(pb.SOURCE_PRIMARY)
    product.force("primary", admin_pb2.BREAKER_MODE_FORCED_OPEN, Duration(nanos=300_000_000))
    product.decide_until(pb.SOURCE_SECONDARY)
    product.decide_until(pb.SOURCE_PRIMARY)


@pytest.mark.fault("A2", "Both champions hang", "An answer inside the deadline, from CACHED_SCORE or RULES.")
def test_hung_replicas_leave_every_caller_an_answer_inside_its_deadline(product: Product) -> None:
    product.stack["primary"].pause()
    product.stack["secondary"].pause()
    for _ in range(50):
        decision = product.decide(deadline_seconds=0.2)
        assert decision.budget.used_us <= decision.budget.allowed_us
        assert decision.source in (pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES)
