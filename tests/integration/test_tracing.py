"""Spans, logs and audit of one call belong together: from the caller's own span to TorchServe's call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.instrumentation.grpc import client_interceptor
from opentelemetry.instrumentation.grpc.grpcext import intercept_channel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.harness import DEADLINE_SECONDS, INSTRUMENTS, MID, ROOMY, eventually
from support.otlp_collector import OtlpCollector, Received
from support.rig import OpenRig, Rig

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack

FAILED, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
OTLP = "TRACING__OTLP_ENDPOINT"


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    with OtlpCollector() as collector:
        yield collector


def settings(collector: OtlpCollector, **others: str) -> dict[str, str]:
    return (
        ROOMY
        | {
            OTLP: collector.address,
            "TRACING__ONE_IN": "0",
            "TRACING__SLOW_SECONDS": "10",
            "DECISION_LOG__ONE_IN": "0",
            "DECISION_LOG__SLOW_SECONDS": "10",
        }
        | others
    )


def order(ref: str) -> pb.Order:
    return pb.Order(
        order_ref=ref, instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, limit_price=MID, strategy="test"
    )


def decide(rig: Rig, ref: str, *metadata: tuple[str, str]) -> pb.Decision:
    request = pb.DecideRequest(order=order(ref))
    return rig.server.decisions.Decide(request, timeout=DEADLINE_SECONDS, metadata=metadata).decision


def decide_well(rig: Rig, ref: str, trace: Callable[[int], str]) -> str:
    """Decides until nothing went wrong on the way, as it may on a busy machine; the trace id of that call."""
    for number in range(1, 50):
        decision = decide(rig, f"{ref}-{number}", ("traceparent", trace(number)))
        if not decision.degradations:
            return trace(number).split("-")[1]
    raise AssertionError("no good decision")


def unsampled(first: int) -> Callable[[int], str]:
    """Traces that their caller does not keep."""
    return lambda number: f"00-{first + number:032x}-{SPAN}-00"


def whole(collector: OtlpCollector, trace_id: str) -> dict[str, Received]:
    """The spans of a trace by name, once its root is there."""
    name = "pretrade.decision.v1.DecisionService/Decide"
    spans = eventually(
        lambda: collector.trace(trace_id), lambda found: {"audit", name} <= {each.span.name for each in found}
    )
    return {each.span.name.removeprefix("pretrade.decision.v1."): each for each in spans}


def test_a_decision_that_retried_is_one_tree_from_caller_to_torchserve(
    open_rig: OpenRig, collector: OtlpCollector
) -> None:
    rig = open_rig(settings(collector), warm_up_calls=5)
    callers = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(callers))
    rig.stack["primary"].pause()
    with grpc.insecure_channel(rig.server.address) as channel:
        interceptor = client_interceptor(tracer_provider=provider)  # type: ignore[no-untyped-call]
        instrumented = intercept_channel(channel, interceptor)  # type: ignore[no-untyped-call]
        stub = decision_pb2_grpc.DecisionServiceStub(instrumented)
        request = pb.DecideRequest(order=order("retried"))
        correlated = (("x-correlation-id", "basket-7"),)
        decision = stub.Decide(request, timeout=DEADLINE_SECONDS, metadata=correlated).decision
    assert decision.source == pb.SOURCE_SECONDARY

    (caller,) = callers.get_finished_spans()
    trace_id = f"{caller.context.trace_id:032x}"
    spans = whole(collector, trace_id)
    root = spans.pop("DecisionService/Decide")
    assert list(spans) == ["admission", "features", "primary", "secondary", "guards", "audit"]
    assert root.parent_id == f"{caller.context.span_id:016x}"
    assert {each.parent_id for each in spans.values()} == {root.span_id}
    assert {each.trace_id for each in spans.values()} == {trace_id}
    assert root.resource["service.name"] == "pretrade"
    said = root.attributes
    assert (said["pretrade.decision_id"], said["pretrade.source"]) == (decision.decision_id, "SECONDARY")
    assert (said["pretrade.cause"], said["pretrade.correlation_id"]) == ("degraded", "basket-7")
    assert "PRIMARY_TIMEOUT" in said["pretrade.degradations"]
    assert not root.failed, "it was answered"
    primary, secondary = spans["primary"], spans["secondary"]
    assert (primary.failed, primary.attributes["pretrade.outcome"]) == (True, "timeout")
    assert (secondary.failed, secondary.attributes["pretrade.outcome"]) == (False, "success")
    assert secondary.attributes["pretrade.batch_rows"] >= 1
    assert primary.span.kind == secondary.span.kind == 3, "calls to somebody"
    for one, other in zip(list(spans.values())[:-1], list(spans.values())[1:], strict=True):
        assert one.span.end_time_unix_nano <= other.span.start_time_unix_nano
    assert root.span.start_time_unix_nano <= primary.span.start_time_unix_nano
    assert caller.start_time is not None
    assert caller.start_time <= root.span.start_time_unix_nano <= root.span.end_time_unix_nano

    (line,) = eventually(lambda: lines(rig, "retried"), bool)
    assert line["level"] == "warning"
    assert (line["trace_id"], line["decision_id"]) == (trace_id, decision.decision_id)
    assert (line["correlation_id"], line["attempts"]) == ("basket-7", ["primary timeout", "secondary success"])
    rig.server.drain_audit()
    (packet,) = [packet for packet, _ in rig.server.audited() if packet.order.order_ref == "retried"]
    assert (packet.trace_id, packet.correlation_id) == (trace_id, "basket-7")


@pytest.mark.long
def test_what_failed_or_the_caller_keeps_is_told_of_and_other_good_decisions_are_not(
    open_rig: OpenRig, collector: OtlpCollector
) -> None:
    rig = open_rig(settings(collector), warm_up_calls=5)
    dropped = decide_well(rig, "dropped", unsampled(0))
    kept = decide_well(rig, "kept", lambda number: f"00-{1_000 + number:032x}-{SPAN}-01")
    root = whole(collector, kept)["DecisionService/Decide"]
    assert (root.parent_id, root.attributes["pretrade.cause"]) == (SPAN, "caller")
    assert not collector.trace(dropped), "and it came before"
    assert not lines(rig, root.attributes["pretrade.order_ref"]), "a line a decision would be too many"
    assert rig.server.metric("pretrade_reports_chosen_total", sink="traces", cause="caller") == 1

    with pytest.raises(grpc.RpcError):
        decide_with_nothing_left(rig)
    root = eventually(lambda: collector.trace(FAILED), bool)[0]
    assert root.failed
    assert root.span.status.message == "DEADLINE_EXPIRED"
    (line,) = eventually(lambda: lines(rig, "late"), bool)
    assert (line["error"], line["cause"]) == ("DEADLINE_EXPIRED", "failed")


@pytest.mark.long
def test_one_in_n_decisions_is_told_of(open_rig: OpenRig, collector: OtlpCollector) -> None:
    rig = open_rig(settings(collector, TRACING__ONE_IN="4", DECISION_LOG__ONE_IN="8"), warm_up_calls=0)
    made = [decide(rig, f"one-{number}") for number in range(40)]
    are_good = [not one.degradations for one in made]  # on a busy machine some may not be
    chosen = sum(are_good[3::4])
    eventually(lambda: len(sampled(collector)), lambda count: count == chosen)
    assert chosen
    assert rig.server.metric("pretrade_reports_chosen_total", sink="traces", cause="sample") == chosen
    root = sampled(collector)[0]
    spans = whole(collector, root.trace_id)
    assert {"primary", "guards"} <= set(spans)
    logged = sum(are_good) // 8
    eventually(lambda: len(good(rig)), lambda count: count == logged)
    assert rig.server.metric("pretrade_reports_chosen_total", sink="log", cause="sample") == logged
    rig.server.drain_audit()
    named = {packet.decision.decision_id: packet.trace_id for packet, _ in rig.server.audited() if packet.trace_id}
    assert named[str(root.attributes["pretrade.decision_id"])] == root.trace_id
    assert len(named) == len(made) // 4


@pytest.mark.long
def test_a_slow_decision_is_in_the_trace_that_has_its_own_id(open_rig: OpenRig, collector: OtlpCollector) -> None:
    rig = open_rig(settings(collector, TRACING__SLOW_SECONDS="0.000001"), warm_up_calls=0)
    decision = decide(rig, "slow")
    root = whole(collector, decision.decision_id.replace("-", ""))["DecisionService/Decide"]
    assert root.attributes["pretrade.decision_id"] == decision.decision_id
    assert root.attributes["pretrade.cause"] in ("slow", "degraded")


def decide_with_nothing_left(rig: Rig) -> None:
    """Its deadline has passed before it can be read."""
    late = order("late")
    late.timeout.nanos = 1
    request = pb.DecideRequest(order=late)
    rig.server.decisions.Decide(request, timeout=5.0, metadata=(("traceparent", f"00-{FAILED}-{SPAN}-00"),))


def lines(rig: Rig, order_ref: str) -> list[dict[str, Any]]:
    """The canonical lines of an order."""
    return [line for line in rig.server.log("decision") if line["order_ref"] == order_ref]


def sampled(collector: OtlpCollector) -> list[Received]:
    """The roots of good decisions."""
    return [each for each in list(collector.spans) if each.attributes.get("pretrade.cause") == "sample"]


def good(rig: Rig) -> list[dict[str, Any]]:
    """The canonical lines of good decisions."""
    return [line for line in rig.server.log("decision") if line["cause"] == "sample"]
