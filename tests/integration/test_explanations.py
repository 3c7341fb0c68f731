"""Why the model scored as it did: beside the reply, from the audit service, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest
from google.protobuf.json_format import Parse
from support.harness import Product, eventually, stack_admin_channel
from typer.testing import CliRunner

from feature_cache import features
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc
from pretrade.client.cli.main import app as pretrade
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.commands import app

pytestmark = pytest.mark.stack


@pytest.fixture
def audit(product: Product) -> Iterator[audit_pb2_grpc.AuditServiceStub]:
    with stack_admin_channel(product.stack.endpoints) as channel:
        yield audit_pb2_grpc.AuditServiceStub(channel)


def decide(product: Product, deadline_seconds: float = 5.0, **changes: object) -> pb.DecideResponse:
    request = pb.DecideRequest(order=product.order(**changes), explain=True)
    return product.decisions.Decide(request, timeout=deadline_seconds)


def explained(audit: audit_pb2_grpc.AuditServiceStub, decision: pb.Decision) -> pb.Explanation:
    request = audit_pb2.ExplainDecisionRequest(decision_id=decision.decision_id)
    return audit.ExplainDecision(request, timeout=60.0).explanation


def assert_explains(explanation: pb.Explanation, decision: pb.Decision) -> None:
    assert explanation.status == pb.EXPLANATION_STATUS_READY, explanation.message
    assert (explanation.decision_id, explanation.method) == (decision.decision_id, "tree_shap")
    assert explanation.model_version == decision.model_version
    assert [one.feature for one in explanation.contributions] == list(features.NAMES)
    total = explanation.base + sum(one.contribution for one in explanation.contributions)
    assert total == pytest.approx(explanation.margin, abs=2e-5)
    assert any(one.contribution for one in explanation.contributions)


def test_an_explanation_comes_with_the_reply_once_the_model_is_loaded(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    plain = product.decide_until(pb.SOURCE_PRIMARY)
    response = product.decisions.Decide(pb.DecideRequest(order=product.order()), timeout=5.0)
    assert not response.HasField("explanation")
    # The audit service waits for the model, whose first start takes seconds.
    assert_explains(explained(audit, plain), plain)
    ready = eventually(lambda: decide(product), lambda seen: seen.explanation.status == pb.EXPLANATION_STATUS_READY)
    assert_explains(ready.explanation, ready.decision)
    assert ready.explanation == explained(audit, ready.decision)
    spread = ready.explanation.contributions[features.INDEX["spread_bps"]]
    assert spread.value == pytest.approx(0.1)
    assert product.metric("pretrade_explanations_total", status="READY") >= 1


def test_a_process_that_hangs_delays_no_reply_beyond_its_patience(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    decision = product.decide_until(pb.SOURCE_PRIMARY)
    assert_explains(explained(audit, decision), decision)
    server = psutil.Process(product.stack["server"].pid)
    readers = [one for one in server.children(recursive=True) if "server.composition.reading_process" in one.cmdline()]
    for reader in readers:
        reader.suspend()
    try:
        late = decide(product)
        assert late.decision.source == pb.SOURCE_PRIMARY
        assert late.explanation.status == pb.EXPLANATION_STATUS_LATE
        assert product.decide().decision_id
    finally:
        for reader in readers:
            reader.resume()
    assert_explains(explained(audit, late.decision), late.decision)


def test_a_cached_score_is_explained_by_the_decision_it_came_from_and_rules_not_at_all(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    product.switch("embedded", False)
    origin = product.decide_until(pb.SOURCE_PRIMARY)
    for name in ("primary", "secondary"):
        product.force(name, admin_pb2.BREAKER_MODE_FORCED_OPEN)
    cached = product.decide_until(pb.SOURCE_CACHED_SCORE)
    explanation = explained(audit, cached)
    assert explanation.status == pb.EXPLANATION_STATUS_READY, explanation.message
    assert explanation.decision_id != cached.decision_id
    assert explanation.model_version == origin.model_version
    by_rules = eventually(lambda: decide(product), lambda seen: seen.decision.source == pb.SOURCE_RULES)
    assert by_rules.explanation.status == pb.EXPLANATION_STATUS_NO_MODEL
    assert not by_rules.explanation.contributions
    assert explained(audit, by_rules.decision).status == pb.EXPLANATION_STATUS_NO_MODEL


def test_a_decision_of_the_embedded_model_is_explained_as_a_replicas_would_be(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    product.decide_until(pb.SOURCE_PRIMARY)
    for name in ("primary", "secondary"):
        product.force(name, admin_pb2.BREAKER_MODE_FORCED_OPEN)
    decision = product.decide_until(pb.SOURCE_EMBEDDED)
    assert_explains(explained(audit, decision), decision)


def test_a_decision_is_explained_on_the_command_line(product: Product) -> None:
    decision = product.decide_until(pb.SOURCE_PRIMARY)
    endpoints = product.stack.endpoints
    where = ["--journal", str(endpoints.journal), "--database-url", str(endpoints.database_url)]
    command = ["show", decision.decision_id, "--explain", *where]
    shown = CliRunner().invoke(app, [*command, "--models", str(endpoints.model_store)])
    assert shown.exit_code == 0, shown.output
    assert "tree_shap" in shown.output
    assert all(name in shown.output for name in features.NAMES)
    unknown = CliRunner().invoke(app, [*command, "--models", "/nowhere", "--json"])
    assert unknown.exit_code == 0, unknown.output
    document = json.loads(unknown.stdout)["explanation"]
    assert document["status"] == "EXPLANATION_STATUS_UNAVAILABLE"
    assert decision.model_version in document["message"]


def test_a_decision_asked_for_on_the_command_line_comes_with_its_explanation(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    decision = product.decide_until(pb.SOURCE_PRIMARY)
    assert_explains(explained(audit, decision), decision)
    command = ["decide", product.order().instrument, "buy", "0.01", "--limit", str(product.order().limit_price)]
    command += ["--explain", "--timeout-ms", "5000", "--target", str(product.stack.endpoints.decision)]

    def asked() -> pb.DecideResponse:
        answered = CliRunner().invoke(pretrade, [*command, "--json"])
        assert answered.exit_code == 0, answered.output
        return Parse(answered.stdout, pb.DecideResponse())

    response = eventually(asked, lambda seen: seen.explanation.status == pb.EXPLANATION_STATUS_READY)
    assert_explains(response.explanation, response.decision)
    shown = CliRunner().invoke(pretrade, command)
    assert shown.exit_code == 0, shown.output
    assert "spread_bps" in shown.output or "LATE" in shown.output
