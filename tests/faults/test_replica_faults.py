"""No model, no features, forced breakers: the rest of the chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from support.harness import Load, Product, eventually

from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

Seen = Callable[[str], None]


@pytest.mark.fault("A11", "Both champions are killed", "EMBEDDED: the same model in the server's own process.")
def test_without_replicas_the_same_model_answers_in_the_servers_own_process(product: Product, seen: Seen) -> None:
    before = product.decide_until(pb.SOURCE_PRIMARY)
    with Load(product, count=2) as load:
        product.stack["primary"].kill()
        product.stack["secondary"].kill()
        product.decide_until(pb.SOURCE_EMBEDDED)
        load.wait_for_more(200)
    answered = [decision for decision in load.decisions if decision.source == pb.SOURCE_EMBEDDED]
    sources = {one.source for one in load.decisions if pb.DEGRADATION_FEATURES_STALE not in one.degradations}
    assert sources <= {pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_EMBEDDED}, "a model, every time"
    for decision in answered:
        assert (decision.model_name, decision.model_version) == (before.model_name, before.model_version)
        assert (decision.threshold, decision.HasField("score")) == (before.threshold, True)
        assert pb.STAGE_EMBEDDED in {use.stage for use in decision.budget.stages}
    assert product.metric("pretrade_embedded_rows_total", model="default", fate="scored") >= len(answered)
    product.switch("embedded", False)
    fallback = product.decide()
    assert fallback.source in (pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES)
    assert pb.DEGRADATION_EMBEDDED_OFF in fallback.degradations
    seen(f"{len(answered)} of {len(load.decisions)} decisions were the embedded model's, the others a replica's")


@pytest.mark.fault(
    "A11",
    "Both champions are killed without an embedded model, then the features stop",
    "CACHED_SCORE, then RULES, then ABSTAIN.",
)
def test_without_replicas_the_last_score_answers_then_the_rules_then_nobody(product: Product) -> None:
    product.switch("embedded", False)
    with Load(product, count=1) as load:  # asks all the time, since a score is young for a second only
        eventually(load.sources, lambda sources: pb.SOURCE_PRIMARY in sources)
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


@pytest.mark.long
@pytest.mark.fault("C7", "An instrument's features stop", "ABSTAIN with FEATURES_STALE, then with FEATURES_MISSING.")
def test_features_that_expired_are_missing_and_decide_nothing(product: Product) -> None:
    product.market.pause()
    decision = eventually(product.decide, lambda seen: pb.REASON_CODE_FEATURES_MISSING in seen.reasons)
    assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)


def test_the_cached_score_stage_can_be_switched_off(product: Product) -> None:
    product.switch("cached_score", False)
    product.switch("embedded", False)
    product.decide_until(pb.SOURCE_PRIMARY)
    for name in ("primary", "secondary"):
        product.force(name, admin_pb2.BREAKER_MODE_FORCED_OPEN)
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


@pytest.mark.fault("A2", "Both champions hang", "An answer inside the deadline, from EMBEDDED.")
def test_hung_replicas_leave_every_caller_an_answer_inside_its_deadline(product: Product) -> None:
    product.stack["primary"].pause()
    product.stack["secondary"].pause()
    for _ in range(50):
        decision = product.decide(deadline_seconds=0.2)
        assert decision.budget.used_us <= decision.budget.allowed_us
        assert decision.source == pb.SOURCE_EMBEDDED


@pytest.mark.fault(
    "A2", "Both champions hang without an embedded model", "An answer inside the deadline, from CACHED_SCORE or RULES."
)
def test_hung_replicas_leave_the_last_score_or_the_rules_where_no_model_is_embedded(product: Product) -> None:
    product.switch("embedded", False)
    product.stack["primary"].pause()
    product.stack["secondary"].pause()
    for _ in range(50):
        decision = product.decide(deadline_seconds=0.2)
        assert decision.budget.used_us <= decision.budget.allowed_us
        assert decision.source in (pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES)


def test_an_embedded_model_that_is_asked_first_is_checked_by_the_primary(product: Product) -> None:
    stages = ["embedded", "model", "cached_score", "rules"]
    product.admin.SetChain(admin_pb2.SetChainRequest(stages=stages, author="test", reason="test"), timeout=5.0)
    first = product.decide_until(pb.SOURCE_EMBEDDED)
    assert not first.degradations
    assert {use.stage for use in first.budget.stages}.isdisjoint((pb.STAGE_PRIMARY, pb.STAGE_SECONDARY))
    with Load(product, count=4) as load:
        eventually(lambda: product.metric("pretrade_embedded_checks_total", model="default", fate="agreed"), bool)
    assert load.sources() <= {pb.SOURCE_EMBEDDED, pb.SOURCE_NONE}, "nobody where the features were stale"
    assert product.metric("pretrade_embedded_checks_total", model="default", fate="disagreed") == 0
    version = product.status().embedded
    assert (version.model_version, version.problem) == (first.model_version, "")
