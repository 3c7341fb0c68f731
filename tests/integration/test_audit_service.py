"""`AuditService` of a running server: PostgreSQL, journal, models from the store, real processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.harness import Load, Product, eventually, stack_admin_channel

from feature_cache import features
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack
SECONDS = 20.0


@pytest.fixture
def audit(product: Product) -> Iterator[audit_pb2_grpc.AuditServiceStub]:
    with stack_admin_channel(product.stack.endpoints) as channel:
        yield audit_pb2_grpc.AuditServiceStub(channel)


def get(audit: audit_pb2_grpc.AuditServiceStub, decision_id: str) -> audit_pb2.GetDecisionResponse:
    return audit.GetDecision(audit_pb2.GetDecisionRequest(decision_id=decision_id), timeout=SECONDS)


def replay(audit: audit_pb2_grpc.AuditServiceStub, decision: pb.Decision) -> audit_pb2.ReplayDecisionResponse:
    request = audit_pb2.ReplayDecisionRequest(decision_id=decision.decision_id)
    return audit.ReplayDecision(request, timeout=60.0)


def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), str(caught.value.details())


def test_a_decision_is_found_in_the_journal_at_once_and_in_the_database_later(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    decision = product.decide(order_ref="mine")
    # In the first moment it is not settled yet whether the caller heard it.
    found = eventually(lambda: get(audit, decision.decision_id).decision, lambda one: one.reply_status == "replied")
    assert found.packet.order.order_ref == "mine"
    stored = eventually(lambda: get(audit, decision.decision_id).decision, lambda one: one.found_in == "database")
    assert (stored.position, stored.hash, stored.packet) == (found.position, found.hash, found.packet)
    assert tuple(get(audit, decision.decision_id).feature_names) == features.NAMES, "without them nobody reads a vector"
    assert len(stored.packet.model_input) == 4 * len(features.NAMES)
    assert status_of(lambda: get(audit, "nobody"))[0] is grpc.StatusCode.NOT_FOUND


def test_pages_hold_every_decision_once_the_newest_first(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    since = Timestamp()
    since.FromNanoseconds(time.time_ns())
    made = [product.decide(strategy=f"paged-{i % 2}").decision_id for i in range(25)]
    wanted = audit_pb2.DecisionFilter(since=since, strategies=["paged-0"], instruments=[product.order().instrument])
    listed: list[str] = []
    token = ""
    while True:
        page = audit.ListDecisions(
            audit_pb2.ListDecisionsRequest(filter=wanted, page_size=4, page_token=token), timeout=SECONDS
        )
        assert not page.incomplete
        listed += [one.packet.decision.decision_id for one in page.decisions]
        token = page.next_page_token
        if not token:
            break
    assert listed == made[::2][::-1]


def test_filters_by_action_source_and_model_mean_the_same_in_journal_and_database(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    since = Timestamp()
    since.FromNanoseconds(time.time_ns())
    scored = product.decide_until(pb.SOURCE_PRIMARY, strategy="filtered")
    refused = product.decide(strategy="filtered", quantity=1e9)
    filters = {
        scored.decision_id: audit_pb2.DecisionFilter(
            since=since, strategies=["filtered"], sources=[pb.SOURCE_PRIMARY], decided_actions=[scored.action]
        ),
        refused.decision_id: audit_pb2.DecisionFilter(
            since=since,
            strategies=["filtered"],
            heard_actions=[audit_pb2.HeardAction.ValueType(refused.action)],
            model=refused.model_version,
        ),
    }

    def listed(wanted: audit_pb2.DecisionFilter) -> dict[str, str]:
        page = audit.ListDecisions(audit_pb2.ListDecisionsRequest(filter=wanted), timeout=SECONDS)
        return {one.packet.decision.decision_id: one.found_in for one in page.decisions}

    def in_audit(decision_id: str, found: dict[str, str]) -> bool:
        return decision_id in found

    def in_database(decision_id: str, found: dict[str, str]) -> bool:
        return found.get(decision_id) == "database"

    for decision_id, wanted in filters.items():
        # What a caller heard is known when its reply was sent, which may be a moment after it has it.
        eventually(partial(listed, wanted), partial(in_audit, decision_id))
        eventually(partial(listed, wanted), partial(in_database, decision_id))
        wanted.model = "another"
        assert listed(wanted) == {}


def test_a_watcher_hears_of_decisions_as_they_become_durable(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    wanted = audit_pb2.DecisionFilter(strategies=["watched"])
    watch = audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(filter=wanted), timeout=SECONDS)
    watch.initial_metadata()  # from here on everything is heard
    made = [product.decide(strategy=name).decision_id for name in ("watched", "other", "watched")]
    heard = [next(watch), next(watch)]
    watch.cancel()
    assert [one.decision.packet.decision.decision_id for one in heard] == [made[0], made[2]]
    assert heard[0].decision.position < heard[1].decision.position
    again = audit.WatchDecisions(
        audit_pb2.WatchDecisionsRequest(filter=wanted, cursor=heard[0].cursor), timeout=SECONDS
    )
    assert next(again).decision.packet.decision.decision_id == made[2]
    again.cancel()
    wrong = audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(cursor="17"), timeout=SECONDS)
    assert status_of(lambda: next(wrong))[0] is grpc.StatusCode.INVALID_ARGUMENT


def can_watch(product: Product, audit: audit_pb2_grpc.AuditServiceStub) -> bool:
    watch = audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(from_oldest=True), timeout=SECONDS)
    product.decide()
    try:
        return bool(next(watch))
    except grpc.RpcError:
        return False
    finally:
        watch.cancel()


def test_a_watcher_that_does_not_read_holds_up_nobody(product: Product, audit: audit_pb2_grpc.AuditServiceStub) -> None:
    idle = [audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(from_oldest=True), timeout=60.0) for _ in range(15)]
    heard = threading.Event()
    watch = audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(), timeout=60.0)
    reader = threading.Thread(target=lambda: heard.set() if next(watch, None) else None)
    reader.start()
    with Load(product, count=2) as load:
        load.wait_for_more(100)
    assert heard.wait(SECONDS)
    reader.join()
    assert not load.errors
    code, _ = status_of(lambda: next(audit.WatchDecisions(audit_pb2.WatchDecisionsRequest(), timeout=SECONDS)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for one in (*idle, watch):
        one.cancel()
    eventually(lambda: can_watch(product, audit), bool)


def test_an_outcome_is_recorded_once_and_a_different_one_refused(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    decision = product.decide()
    outcome = packet_pb2.Outcome(
        decision_id=decision.decision_id, reporter="ems", filled_quantity=0.5, fill_price=60_000.0, markout_bps=-0.5
    )

    def record(**changes: Any) -> audit_pb2.RecordOutcomeResponse:
        said = packet_pb2.Outcome()
        said.CopyFrom(outcome)
        said.MergeFrom(packet_pb2.Outcome(**changes))
        return audit.RecordOutcome(audit_pb2.RecordOutcomeRequest(outcome=said), timeout=SECONDS)

    assert not record().existed
    assert record().existed
    assert status_of(lambda: record(fill_price=60_001.0))[0] is grpc.StatusCode.ALREADY_EXISTS
    assert not record(reporter="other").existed
    assert status_of(lambda: record(decision_id="nobody"))[0] is grpc.StatusCode.NOT_FOUND
    code, message = status_of(lambda: record(fill_price=-1.0))
    assert (code, message.split(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "outcome.fill_price")
    in_database = eventually(
        lambda: get(audit, decision.decision_id), lambda found: found.decision.found_in == "database"
    )
    assert [(one.reporter, one.filled_quantity, one.markout_bps) for one in in_database.outcomes] == [
        ("ems", 0.5, -0.5),
        ("other", 0.5, -0.5),
    ]
    assert record().existed


def test_what_is_no_message_of_the_method_is_refused(product: Product) -> None:
    with stack_admin_channel(product.stack.endpoints) as channel:
        for method in ("GetDecision", "ListDecisions", "RecordOutcome", "ReplayDecision", "ExplainDecision"):
            call: Any = channel.unary_unary(f"/pretrade.audit.v1.AuditService/{method}")
            assert status_of(partial(call, b"\xff\xff", timeout=SECONDS))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_the_whole_fallback_chain_replays_bit_equal(product: Product, audit: audit_pb2_grpc.AuditServiceStub) -> None:
    decisions = [product.decide_until(pb.SOURCE_PRIMARY, side=side) for side in (pb.SIDE_BUY, pb.SIDE_SELL)]
    with Load(product) as load:  # batches of more than one row
        load.wait_for_more(100)
    decisions += load.decisions[-20:]
    product.force("primary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    decisions.append(product.decide_until(pb.SOURCE_SECONDARY))
    product.force("secondary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    decisions += [product.decide_until(pb.SOURCE_EMBEDDED, side=side) for side in (pb.SIDE_BUY, pb.SIDE_SELL)]

    def without_a_model() -> pb.Decision:
        product.switch("embedded", True)
        product.decide_until(pb.SOURCE_EMBEDDED)  # whose score is young for a second only
        product.switch("embedded", False)
        return product.decide()

    decisions.append(eventually(without_a_model, lambda decision: decision.source == pb.SOURCE_CACHED_SCORE))
    decisions.append(product.decide_until(pb.SOURCE_RULES))
    product.market.pause()
    decisions.append(product.decide_until(pb.SOURCE_NONE))
    # A canary's decisions are replayed in test_canary.py.
    assert {one.source for one in decisions} == set(pb.Source.values()) - {pb.SOURCE_UNSPECIFIED, pb.SOURCE_CANARY}
    for decision in decisions:
        replayed = replay(audit, decision)
        assert replayed.equal, (decision, replayed)
        assert replayed.action == decision.action
        assert replayed.HasField("score") == decision.HasField("score")
        if decision.HasField("score"):
            assert replayed.score == decision.score


@pytest.mark.fault(
    "D7",
    "A process that reads the audit dies",
    "Decisions are not affected. One audit query gets UNAVAILABLE, then a new process answers.",
)
def test_a_reading_process_that_dies_is_replaced_and_no_decision_notices(
    product: Product, audit: audit_pb2_grpc.AuditServiceStub
) -> None:
    decision = product.decide()
    get(audit, decision.decision_id)
    server = psutil.Process(product.stack["server"].pid)
    readers = [one for one in server.children() if "server.composition.reading_process" in one.cmdline()]
    assert 1 <= len(readers) <= 2, "one that reads and one that runs models, whatever was asked"
    for reader in readers:
        reader.kill()
    assert product.decide().decision_id

    def found() -> bool:
        try:
            return bool(get(audit, decision.decision_id).decision.position)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False  # only who asks before the death was noticed hears of it

    eventually(found, bool)
