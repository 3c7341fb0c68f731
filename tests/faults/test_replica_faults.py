"""Replicas that die, hang or never answer: who answers instead, and what it is counted as."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from harness import Load, Product, eventually

from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack


def test_a_killed_primary_fails_no_call_and_the_secondary_takes_over_until_it_is_back(product: Product) -> None:
    with Load(product) as load:
        load.wait_for_more(200)
        assert pb.SOURCE_PRIMARY in load.sources()
        product.stack["primary"].kill()
        product.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        load.wait_for_more(200)
        during = load.decisions[-100:]
        product.stack.restart("primary")
        product.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
        load.wait_for_more(200)
        after = load.decisions[-100:]
    assert not load.errors
    assert pb.SOURCE_SECONDARY in {decision.source for decision in during}
    assert pb.SOURCE_PRIMARY not in {decision.source for decision in during}
    assert all(pb.DEGRADATION_PRIMARY_BREAKER_OPEN in decision.degradations for decision in during)
    assert pb.SOURCE_PRIMARY in {decision.source for decision in after}
    assert len({decision.decision_id for decision in load.decisions}) == len(load.decisions)


def test_a_hung_primary_costs_no_call_its_answer(product: Product) -> None:
    with Load(product) as load:
        load.wait_for_more(200)
        product.stack["primary"].pause()
        product.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        load.wait_for_more(200)
        product.stack["primary"].resume()
        product.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
    assert not load.errors
    assert pb.SOURCE_NONE not in load.sources()
    outcomes = product.replica("primary").outcomes
    assert outcomes["timeout"] > 0
    eventually(lambda: product.replica("primary").abandoned, lambda abandoned: abandoned == 0)


def test_without_replicas_the_last_score_answers_then_the_rules_then_nobody(product: Product) -> None:
    product.decide_until(pb.SOURCE_PRIMARY)
    product.stack["primary"].kill()
    product.stack["secondary"].kill()
    cached = product.decide_until(pb.SOURCE_CACHED_SCORE)
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


def test_a_hung_shadow_target_changes_no_answer_and_its_drops_are_counted(product: Product) -> None:
    with Load(product) as load:
        load.wait_for_more(200)
        product.stack["challenger"].pause()
        product.wait_for_breaker("challenger", admin_pb2.BREAKER_STATE_OPEN)
        before = len(load.decisions)
        load.wait_for_more(500)
        during = load.decisions[before:]
    assert not load.errors
    assert pb.SOURCE_PRIMARY in {decision.source for decision in during}
    assert product.metric("pretrade_shadow_rows_total", fate="refused") > 0


def test_forced_breakers_are_obeyed_and_expire(product: Product) -> None:
    product.force("primary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    assert product.decide_until(pb.SOURCE_SECONDARY).degradations == [pb.DEGRADATION_PRIMARY_BREAKER_OPEN]
    product.force("primary", admin_pb2.BREAKER_MODE_AUTOMATIC)
    product.decide_until(pb.SOURCE_PRIMARY)
    product.force("primary", admin_pb2.BREAKER_MODE_FORCED_OPEN, Duration(nanos=300_000_000))
    product.decide_until(pb.SOURCE_SECONDARY)
    product.decide_until(pb.SOURCE_PRIMARY)


def test_hung_replicas_leave_every_caller_an_answer_inside_its_deadline(product: Product) -> None:
    product.stack["primary"].pause()
    product.stack["secondary"].pause()
    for _ in range(50):
        decision = product.decide(deadline_seconds=0.2)
        assert decision.budget.used_us <= decision.budget.allowed_us
        assert decision.source in (pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES)
