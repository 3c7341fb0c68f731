"""The contract on a whole server: real TorchServe replicas, Valkey, PostgreSQL, journal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast
from urllib.request import urlopen

import grpc
import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from prometheus_client.parser import text_string_to_metric_families
from support.harness import (
    CAP_SECONDS,
    DEADLINE_SECONDS,
    INSTRUMENTS,
    MID,
    Product,
    calm_values,
    eventually,
    stack_admin_channel,
)

from feature_cache import features
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.schema import CONTROL_CHANGES, DECISIONS
from server.composition.metrics_port import METRICS

pytestmark = pytest.mark.stack

SERVICE = "pretrade.decision.v1.DecisionService"


def test_a_sound_order_is_decided_by_the_primary_with_all_that_proves_it(product: Product) -> None:
    decision = product.decide_until(pb.SOURCE_PRIMARY)
    assert decision.action in (pb.ACTION_TRADE, pb.ACTION_NO_TRADE)
    assert 0 <= decision.score <= 1
    assert (decision.score >= decision.threshold) == (decision.action == pb.ACTION_TRADE)
    assert decision.model_name == "champion"
    assert decision.model_version == product.replica("primary").model_version
    assert not decision.degradations
    assert 0 <= decision.feature_age.ToNanoseconds() < 1e9
    stages = [use.stage for use in decision.budget.stages]
    assert stages == [
        pb.STAGE_ADMISSION,
        pb.STAGE_FEATURES,
        pb.STAGE_PRIMARY,
        pb.STAGE_GUARDS,
        pb.STAGE_AUDIT,
    ]
    assert sum(use.used_us for use in decision.budget.stages) <= decision.budget.used_us
    assert decision.budget.used_us < decision.budget.allowed_us <= DEADLINE_SECONDS * 1e6


def test_the_packet_in_sql_is_the_reply(product: Product) -> None:
    decision = product.decide(order_ref="audited")
    engine = sa.create_engine(str(product.stack.endpoints.database_url))
    query = sa.select(DECISIONS).where(DECISIONS.c.decision_id == decision.decision_id)

    def row() -> sa.RowMapping | None:
        if not sa.inspect(engine).has_table(DECISIONS.name):
            return None
        with engine.connect() as connection:
            return connection.execute(query).mappings().one_or_none()

    found = eventually(row, lambda seen: seen is not None)
    engine.dispose()
    assert found is not None
    assert found["action"] == pb.Action.Name(decision.action).removeprefix("ACTION_")
    assert found["source"] == pb.Source.Name(decision.source).removeprefix("SOURCE_")
    assert found["score"] == decision.score
    assert found["order_ref"] == "audited"
    assert found["durability"] == "fsync"


def test_a_batch_answers_each_order_in_order_and_a_bad_one_fails_alone(product: Product) -> None:
    orders = [product.order(order_ref=str(i)) for i in range(5)]
    orders[2].quantity = -1
    results = product.decisions.DecideBatch(pb.DecideBatchRequest(orders=orders), timeout=DEADLINE_SECONDS).results
    assert [result.order_ref for result in results] == ["0", "1", "2", "3", "4"]
    assert [result.WhichOneof("outcome") for result in results] == [
        "decision",
        "decision",
        "error",
        "decision",
        "decision",
    ]
    assert results[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (results[2].error.reason, results[2].error.field) == ("INVALID_QUANTITY", "quantity")


def test_a_stream_answers_every_order_by_its_reference(product: Product) -> None:
    def requests() -> Iterator[pb.DecideStreamRequest]:
        for i in range(50):
            order = product.order(order_ref=str(i), instrument=INSTRUMENTS[i % 2])
            if i == 7:
                order.side = pb.SIDE_UNSPECIFIED
            if i == 8:
                order.order_ref = ""
            yield pb.DecideStreamRequest(order=order)

    results = [response.result for response in product.decisions.DecideStream(requests(), timeout=30)]
    assert sorted(result.order_ref for result in results) == sorted({*map(str, range(50)), ""} - {"8"})
    failed = {(result.order_ref, result.error.reason) for result in results if result.HasField("error")}
    assert failed == {("7", "UNKNOWN_SIDE"), ("", "MISSING_ORDER_REF")}


def test_a_caller_may_bring_its_own_features(product: Product) -> None:
    vector = pb.FeatureVector(feature_set_id="mf1", values=calm_values().tolist())
    decision = product.decide_until(pb.SOURCE_PRIMARY, features=vector)
    assert not decision.HasField("feature_age")


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"instrument": "DOGE.NOWHERE"}, "UNKNOWN_INSTRUMENT", "instrument"),
        ({"side": 9}, "UNKNOWN_SIDE", "side"),
        ({"quantity": -1.0}, "INVALID_QUANTITY", "quantity"),
        ({"quantity": math.nan}, "INVALID_QUANTITY", "quantity"),
        ({"limit_price": math.inf}, "INVALID_LIMIT_PRICE", "limit_price"),
        ({"strategy": ""}, "INVALID_STRATEGY", "strategy"),
        ({"features": pb.FeatureVector(feature_set_id="mf1", values=[1.0])}, "WRONG_FEATURE_COUNT", "features.values"),
        (
            {"features": pb.FeatureVector(feature_set_id="mf1", values=[math.nan] * 25)},
            "NON_FINITE_FEATURE",
            "features.values[0]",
        ),
        ({"features": pb.FeatureVector(feature_set_id="mf9")}, "UNKNOWN_FEATURE_SET", "features.feature_set_id"),
    ],
)
@pytest.mark.fault("E4", "An order breaks a rule of the contract", "INVALID_ARGUMENT, naming the field and the rule.")
def test_a_bad_order_is_refused_with_field_and_rule(
    product: Product, changes: dict[str, Any], reason: str, field: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        product.decide(**changes)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith(f"{field}: ")
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, info.metadata["field"]) == ("pretrade", reason, field)
    assert "Traceback" not in str(caught.value)


def test_an_oversize_message_is_refused(product: Product) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        product.decide(deadline_seconds=5.0, strategy="x" * 2_000_000)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["Decide", "DecideBatch", "DecideStream"])
def test_garbage_on_the_wire_is_an_invalid_argument_and_shows_nothing_of_ours(product: Product, method: str) -> None:
    def call(channel: grpc.Channel) -> list[bytes]:
        path = f"/{SERVICE}/{method}"
        if method == "DecideStream":
            stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            return list(stream(iter([garbage]), timeout=5.0))
        unary: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        return [unary(garbage, timeout=5.0)]

    garbage = b"\xff\xff\xff\xff"
    channel = grpc.insecure_channel(str(product.stack.endpoints.decision))
    with channel, pytest.raises(grpc.RpcError) as caught:
        call(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "the request is not a valid message of this method"


def test_the_largest_batch_is_decided_whole(product: Product) -> None:
    orders = [product.order(order_ref=str(i)) for i in range(1_024)]
    results = product.decisions.DecideBatch(pb.DecideBatchRequest(orders=orders), timeout=30.0).results
    assert [result.order_ref for result in results] == list(map(str, range(1_024)))
    assert all(result.HasField("decision") for result in results)
    assert pb.SOURCE_PRIMARY in {result.decision.source for result in results}


def test_a_larger_batch_is_refused(product: Product) -> None:
    request = pb.DecideBatchRequest(orders=[product.order()] * 1_025)
    with pytest.raises(grpc.RpcError) as caught:
        product.decisions.DecideBatch(request, timeout=5.0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_book_that_stands_still_while_trades_go_on_is_stale(product: Product) -> None:
    product.market.values = calm_values()
    product.market.values[features.INDEX["book_age_ms"]] = 60_000
    decision = eventually(product.decide, lambda seen: pb.REASON_CODE_FEATURES_STALE in seen.reasons)
    assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)
    assert pb.REASON_CODE_PRICE_COLLAR not in decision.reasons


def test_without_a_deadline_the_servers_cap_applies(product: Product) -> None:
    decision = product.decisions.Decide(pb.DecideRequest(order=product.order())).decision
    assert decision.budget.allowed_us == pytest.approx(1e6 * CAP_SECONDS, abs=1)


def test_an_expired_deadline_gets_no_decision(product: Product) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        product.decide(timeout=Duration(nanos=1))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert product.metric("pretrade_errors_total", reason="DEADLINE_EXPIRED") > 0


def test_a_millisecond_is_either_enough_or_an_error_and_never_a_late_answer(product: Product) -> None:
    for _ in range(20):
        order = product.order(timeout=Duration(nanos=1_000_000))
        results = product.decisions.DecideBatch(pb.DecideBatchRequest(orders=[order]), timeout=5.0).results
        if results[0].HasField("error"):
            assert results[0].error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        else:
            assert results[0].decision.budget.used_us <= results[0].decision.budget.allowed_us <= 1_000


def test_the_same_idempotency_key_gets_the_same_decision_once(product: Product) -> None:
    first = product.decide(idempotency_key="k-1")
    assert product.decide(idempotency_key="k-1") == first
    with pytest.raises(grpc.RpcError) as caught:
        product.decide(idempotency_key="k-1", quantity=2.0)
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


def test_halting_stops_every_trade_and_reducing_lets_reduce_only_orders_pass(product: Product) -> None:
    def set_state(state: admin_pb2.TradingState.ValueType) -> None:
        request = admin_pb2.SetTradingStateRequest(state=state, author="test", reason="guard")
        assert product.admin.SetTradingState(request, timeout=5.0).state == state

    set_state(admin_pb2.TRADING_STATE_HALTED)
    halted = product.decide()
    assert halted.action != pb.ACTION_TRADE
    assert pb.REASON_CODE_TRADING_HALTED in halted.reasons
    set_state(admin_pb2.TRADING_STATE_REDUCING)
    assert pb.REASON_CODE_TRADING_REDUCING in product.decide().reasons
    assert pb.REASON_CODE_TRADING_REDUCING not in product.decide(reduce_only=True).reasons


def test_a_book_before_its_snapshot_decides_nothing(product: Product) -> None:
    product.market.state = BookState.UNKNOWN
    decision = eventually(product.decide, lambda seen: pb.REASON_CODE_BOOK_UNKNOWN in seen.reasons)
    assert (decision.action, decision.source) == (pb.ACTION_ABSTAIN, pb.SOURCE_NONE)


def test_limits_are_held_over_whatever_answers(product: Product) -> None:
    assert pb.REASON_CODE_NOTIONAL_LIMIT in product.decide(quantity=1e6).reasons
    assert pb.REASON_CODE_PRICE_COLLAR in product.decide(limit_price=MID * 2).reasons


def test_health_and_reflection_answer_on_both_ports(product: Product) -> None:
    endpoints = product.stack.endpoints
    for address, service in (
        (endpoints.decision, SERVICE),
        (endpoints.admin, "pretrade.admin.v1.AdminService"),
    ):
        with stack_admin_channel(replace(endpoints, admin=address)) as channel:
            check: grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            for component in ("", "journal", "primary", "feature_cache"):
                status = check(health_pb2.HealthCheckRequest(service=component), timeout=5.0).status
                assert status == health_pb2.HealthCheckResponse.SERVING, component
            assert service in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_admin_refuses_what_it_does_not_know(product: Product) -> None:
    automatic, forced_open = admin_pb2.BREAKER_MODE_AUTOMATIC, admin_pb2.BREAKER_MODE_FORCED_OPEN
    request = admin_pb2.SetBreakerRequest
    for refused, code in (
        (request(replica="tertiary", mode=automatic, author="a", reason="r"), grpc.StatusCode.NOT_FOUND),
        (request(replica="primary", author="a", reason="r"), grpc.StatusCode.INVALID_ARGUMENT),
        (request(replica="primary", mode=forced_open), grpc.StatusCode.INVALID_ARGUMENT),
        (
            request(replica="primary", mode=forced_open, expires_in=Duration(seconds=10**11), author="a", reason="r"),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            product.admin.SetBreaker(refused, timeout=5.0)
        assert caught.value.code() is code


def test_every_change_is_in_the_audit(product: Product) -> None:
    request = admin_pb2.SetFlagRequest(name="shadow", enabled=False, author="ann", reason="challenger is noisy")
    assert not product.admin.SetFlag(request, timeout=5.0).flag.enabled
    engine = sa.create_engine(str(product.stack.endpoints.database_url))
    query = sa.select(CONTROL_CHANGES).where(CONTROL_CHANGES.c.reason == "challenger is noisy")

    def rows() -> list[sa.RowMapping]:
        with engine.connect() as connection:
            return list(connection.execute(query).mappings())

    found = eventually(rows, bool)
    engine.dispose()
    assert (found[0]["subject"], found[0]["previous"], found[0]["value"]) == ("flag/shadow", "on", "off")
    assert found[0]["author"] == "ann"


_AFTER_THE_FIRST_LOOK = ("pretrade_calibration_", "pretrade_label_lag_", "pretrade_journal_")
"""Shown once the audit was asked what it says of itself; of labels only where there are some."""


def test_a_scrape_shows_what_is_declared_and_nothing_else(product: Product) -> None:
    product.decide_until(pb.SOURCE_PRIMARY)
    with urlopen(f"{product.stack.endpoints.metrics_url}/metrics", timeout=5.0) as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    where_configured = {each.name for each in METRICS if each.name.startswith("pretrade_topic_")}
    where_configured |= {each.name for each in METRICS if each.name.startswith(_AFTER_THE_FIRST_LOOK)} - set(families)
    assert set(families) == {each.name for each in METRICS} - where_configured
    for metric in METRICS:
        if metric.name not in where_configured:
            found = {label for sample in families[metric.name].samples for label in sample.labels} - {"le"}
            assert found <= set(metric.labels), metric.name
            assert families[metric.name].type == metric.kind
            assert families[metric.name].documentation == metric.meaning
    assert sum(len(family.samples) for family in families.values()) < 1_000
    states = {sample.labels["state"]: sample.value for sample in families["pretrade_trading_state"].samples}
    assert states == {"ACTIVE": 1, "REDUCING": 0, "HALTED": 0}
    for name in ("pretrade_features_present", "pretrade_features_book_known"):
        assert {sample.labels["instrument"] for sample in families[name].samples} == set(INSTRUMENTS)


def test_a_vector_that_the_model_has_not_seen_is_out_of_its_domain_while_the_guard_is_on(product: Product) -> None:
    product.switch("out_of_domain", True)
    try:
        decision = eventually(
            lambda: product.decide_until(pb.SOURCE_PRIMARY),
            lambda one: pb.REASON_CODE_OUT_OF_DOMAIN in one.reasons and not one.degradations,
        )
        assert decision.action != pb.ACTION_TRADE
    finally:
        product.switch("out_of_domain", False)
    assert pb.REASON_CODE_OUT_OF_DOMAIN not in product.decide_until(pb.SOURCE_PRIMARY).reasons
