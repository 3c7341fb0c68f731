"""What callers see of the decision port, whoever speaks HTTP/2 there: one suite for both edges."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import grpc
import h2.errors
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from support.harness import INSTRUMENTS, eventually
from support.js_client import node_tests
from support.server_group import WAYS_IN, Group, order, reply_statuses, server_environment, server_group, way_in
from support.wire import DECIDE, STREAM, Caller, framed, leave_at_any_moment

from feature_cache.compiled import SWITCH
from local.stack.ports import free_ports
from pretrade.client.retries import retry_delay
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.decision.admission import PATIENCE_SECONDS
from server.envoy import lane
from server.journal.journal_file import journals_of
from server.journal.reply_status import REPLIED

pytestmark = pytest.mark.stack
_ROOT: Final = Path(__file__).parents[2]
_SECONDS: Final = 2.0
_MAX_BYTES: Final = 1_048_576


@pytest.fixture(scope="module", params=WAYS_IN)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    directory = tmp_path_factory.mktemp("edge")
    (http,) = free_ports(1)
    changes = {"PRETRADE_GRPC__READ_SECONDS": "0.5", "PRETRADE_HTTP__PORT": str(http)}
    with server_group(directory, 1, **way_in(request.param), **changes) as group:
        yield group


@pytest.fixture(scope="module")
def envoy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with server_group(tmp_path_factory.mktemp("envoy"), 1, PRETRADE_GRPC__EDGE="auto") as group:
        yield group


@pytest.fixture
def channel(group: Group) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(group.decision) as channel:
        yield channel


@pytest.fixture
def decisions(channel: grpc.Channel) -> decision_pb2_grpc.DecisionServiceStub:
    return decision_pb2_grpc.DecisionServiceStub(channel)


def wire(ref: str = "one", **changes: Any) -> bytes:
    return framed(pb.DecideRequest(order=order(ref, **changes)).SerializeToString())


def test_a_sound_order_is_decided(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    decision = decisions.Decide(pb.DecideRequest(order=order()), timeout=_SECONDS).decision
    assert decision.order_ref == "one"
    assert decision.action == pb.ACTION_ABSTAIN, "there are no features"


def test_only_plain_calls_take_the_lane_and_only_where_there_is_one(
    group: Group, decisions: decision_pb2_grpc.DecisionServiceStub
) -> None:
    def calls(answered_by: str) -> float:
        return group.metric("pretrade_lane_calls_total", answered_by=answered_by)

    before = calls("lane"), calls("application")
    plain = pb.DecideRequest(order=order())
    decisions.Decide(plain, timeout=_SECONDS)
    decisions.Decide(plain, timeout=_SECONDS, metadata=(("x-correlation-id", "mine"),))
    decisions.Decide(pb.DecideRequest(order=order(), explain=True), timeout=_SECONDS)
    decisions.Decide(plain, timeout=_SECONDS, metadata=(("x-of-mine", "1"),))
    decisions.Decide(plain, timeout=_SECONDS, compression=grpc.Compression.Gzip)
    decisions.DecideBatch(pb.DecideBatchRequest(orders=[order()]), timeout=_SECONDS)
    has_lane = group.env["PRETRADE_GRPC__EDGE"] == "envoy" and SWITCH not in group.env and not lane.missing()
    expected = (2.0, 1.0) if has_lane else (0.0, 0.0)
    assert (calls("lane") - before[0], calls("application") - before[1]) == expected


def test_calls_that_are_reset_at_any_moment_leave_nothing_under_way(
    group: Group, decisions: decision_pb2_grpc.DecisionServiceStub
) -> None:
    chance = random.Random(15)
    leave_at_any_moment(group.decision, (wire(f"reset-{number}") for number in itertools.count()), chance)
    eventually(lambda: group.metric("pretrade_in_flight"), lambda count: count == 0)
    eventually(lambda: group.metric("pretrade_replies_owed"), lambda count: count == 0)
    assert decisions.Decide(pb.DecideRequest(order=order()), timeout=_SECONDS).decision.order_ref == "one"


def test_an_explanation_is_there_when_it_was_asked_for(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    asked = decisions.Decide(pb.DecideRequest(order=order(), explain=True), timeout=_SECONDS)
    assert asked.decision.action == pb.ACTION_ABSTAIN
    assert asked.explanation.status == pb.EXPLANATION_STATUS_NO_MODEL
    assert "NONE" in asked.explanation.message
    plain = decisions.Decide(pb.DecideRequest(order=order()), timeout=_SECONDS)
    assert not plain.HasField("explanation")


def test_an_error_has_its_status_its_words_and_its_details(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        decisions.Decide(pb.DecideRequest(order=order(instrument="100 % ÄPFEL")), timeout=_SECONDS)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "'100 % ÄPFEL' is not configured" in str(refused.value.details())
    status = rpc_status.from_call(refused.value)  # type: ignore[arg-type]  # it is a call as well
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "UNKNOWN_INSTRUMENT",
        "pretrade",
        {"field": "instrument"},
    )


@pytest.mark.parametrize(
    ("path", "code", "reason"),
    [
        (DECIDE, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST"),
        (f"{DECIDE}Nothing", grpc.StatusCode.UNIMPLEMENTED, "UNKNOWN_METHOD"),
        ("/grpc.health.v1.Health/Check", grpc.StatusCode.NOT_FOUND, "UNKNOWN_SERVICE"),
    ],
)
def test_a_call_that_fails_says_why_for_programs_and_is_counted_once(
    group: Group, channel: grpc.Channel, path: str, code: grpc.StatusCode, reason: str
) -> None:
    call: Any = channel.unary_unary(path)
    before = group.metric("pretrade_errors_total", reason=reason)
    with pytest.raises(grpc.RpcError) as refused:
        call(b"\n\1x", timeout=_SECONDS)  # a health check of the service `x`
    assert refused.value.code() is code
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(refused.value).details[0].Unpack(info)  # type: ignore[arg-type]  # it is a call as well
    assert (info.reason, info.domain) == (reason, "pretrade")
    assert group.metric("pretrade_errors_total", reason=reason) == before + 1


@pytest.mark.parametrize("timeout", ["0n", "0m", "0S", "0H"])
def test_a_deadline_that_has_passed_gets_no_decision(group: Group, timeout: str) -> None:
    with Caller(group.decision) as caller:
        reply = caller.call(wire(), extra=[("grpc-timeout", timeout)])
    assert (reply.status, reply.body) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], b"")


@pytest.mark.parametrize("timeout", ["2S", "2000m", "2000000u", "99999999n", "1M", "99999999H", "9" * 99 + "S"])
def test_every_form_of_a_timeout_is_understood(group: Group, timeout: str) -> None:
    with Caller(group.decision) as caller:
        reply = caller.call(wire(), extra=[("grpc-timeout", timeout)])
    assert reply.status == 0, reply
    allowed = pb.DecideResponse.FromString(reply.body[5:]).decision.budget.allowed_us
    if timeout == "99999999n":
        assert 90_000 < allowed <= 101_000  # grpc.aio counts in whole milliseconds
    else:
        assert allowed == 1_500_000, "the server's cap"


@pytest.mark.parametrize("timeout", ["", "1", "m", "-1S", "1.5S", "5x", "abc"])
def test_a_timeout_that_is_none_is_refused(group: Group, timeout: str) -> None:
    with Caller(group.decision) as caller:
        reply = caller.call(wire(), extra=[("grpc-timeout", timeout)])
    assert (reply.status, reply.body) == (grpc.StatusCode.INTERNAL.value[0], b"")


def test_metadata_of_any_kind_is_no_obstacle(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    metadata: tuple[tuple[str, str | bytes], ...] = (
        *(("x-trace", "a b"), ("x-trace", "again")),
        *(("x-bytes-bin", b"\x00\xff\x80"), ("x-long", "y" * 4_000)),
    )
    assert decisions.Decide(pb.DecideRequest(order=order()), timeout=_SECONDS, metadata=metadata).HasField("decision")


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests_are_read(
    decisions: decision_pb2_grpc.DecisionServiceStub, algorithm: grpc.Compression
) -> None:
    request = pb.DecideBatchRequest(orders=[order(f"{i}") for i in range(50)])
    answer = decisions.DecideBatch(request, timeout=_SECONDS, compression=algorithm)
    assert [result.order_ref for result in answer.results] == [f"{i}" for i in range(50)]


def test_what_cannot_be_read_gets_its_status(group: Group) -> None:
    codes = grpc.StatusCode
    gzip = [("grpc-encoding", "gzip")]
    cases = [
        (codes.RESOURCE_EXHAUSTED, framed(bytes(_MAX_BYTES + 1)), DECIDE, []),
        (codes.RESOURCE_EXHAUSTED, framed(b"x", length=2_000_000_000), DECIDE, []),
        (codes.INTERNAL, framed(b"never gzip", compressed=1), DECIDE, gzip),
        (codes.INTERNAL, framed(b"how?", compressed=1), DECIDE, []),
        (codes.UNIMPLEMENTED, wire(), "/pretrade.decision.v1.DecisionService/Guess", []),
        (codes.UNIMPLEMENTED, wire(), "/no.such/Service", []),
        (codes.INVALID_ARGUMENT, framed(b"\xff\xff"), DECIDE, []),
        (codes.INVALID_ARGUMENT, wire()[:-3], DECIDE, []),
        (codes.INVALID_ARGUMENT, b"", DECIDE, []),
        (codes.INVALID_ARGUMENT, framed(b"\xff\xff"), STREAM, []),
    ]
    for code, body, path, extra in cases:
        with Caller(group.decision) as caller:
            reply = caller.call(body, path, extra)
        assert (reply.status, reply.body) == (code.value[0], b""), (code, body[:20], path, reply)


def test_a_request_that_does_not_end_is_ended(group: Group) -> None:
    with Caller(group.decision) as caller:
        streams = [caller.begin(), caller.begin()]
        caller.send(streams[1], wire()[:9])
        for stream in streams:
            assert caller.reply(stream).status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert caller.call(wire()).status == 0, "the connection is still good"


def test_a_request_in_many_pieces_is_whole(group: Group) -> None:
    with Caller(group.decision) as caller:
        stream = caller.begin()
        for byte in wire()[:-1]:
            caller.send(stream, bytes((byte,)))
        caller.send(stream, wire()[-1:], end=True)
        assert caller.reply(stream).status == 0


def test_a_call_that_says_reduce_only_holds_such_orders_alone(group: Group) -> None:
    """Else any call could pass Envoy's gate. The same on the edge without a gate: callers need not know which it is."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(group.decision, options) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        marked = (("pretrade-reduce-only", "0"),)
        before = group.metric("pretrade_errors_total", reason="NOT_REDUCE_ONLY")
        reducing, other = order("r", reduce_only=True), order("o")
        assert stub.Decide(pb.DecideRequest(order=reducing), timeout=_SECONDS, metadata=marked).HasField("decision")
        sound = stub.DecideBatch(pb.DecideBatchRequest(orders=[reducing] * 3), timeout=_SECONDS, metadata=marked)
        assert [result.HasField("decision") for result in sound.results] == [True] * 3
        for call in (
            lambda: stub.Decide(pb.DecideRequest(order=other), timeout=_SECONDS, metadata=marked),
            lambda: stub.DecideBatch(
                pb.DecideBatchRequest(orders=[reducing, other]), timeout=_SECONDS, metadata=marked
            ),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            info = error_details_pb2.ErrorInfo()
            assert rpc_status.from_call(refused.value).details[0].Unpack(info)  # type: ignore[arg-type]
            assert (info.reason, dict(info.metadata)) == ("NOT_REDUCE_ONLY", {"field": "reduce_only"})
        assert group.metric("pretrade_errors_total", reason="NOT_REDUCE_ONLY") == before + 2
        # A stream passes no gate, and admits each order by itself.
        streamed = stub.DecideStream(iter([pb.DecideStreamRequest(order=other)]), timeout=_SECONDS, metadata=marked)
        assert [answer.result.HasField("decision") for answer in streamed] == [True]


def test_a_batch_is_answered_in_its_order(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    orders = [order(f"{i}", quantity=-1.0 if i == 70 else 1.0) for i in range(200)]
    answer = decisions.DecideBatch(pb.DecideBatchRequest(orders=orders), timeout=_SECONDS)
    assert [result.order_ref for result in answer.results] == [f"{i}" for i in range(200)]
    assert [i for i, result in enumerate(answer.results) if result.HasField("error")] == [70]


def test_a_stream_answers_while_it_is_open(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    asked: list[str] = []

    def one_after_another() -> Iterator[pb.DecideStreamRequest]:
        for number in range(30):
            eventually(lambda: len(answered), lambda count, number=number: count == number)  # type: ignore[misc]
            asked.append(f"{number}")
            yield pb.DecideStreamRequest(order=order(f"{number}"))

    answered: list[str] = []
    answered.extend(answer.result.order_ref for answer in decisions.DecideStream(one_after_another(), timeout=30.0))
    assert answered == asked == [f"{number}" for number in range(30)]


def test_a_stream_answers_each_order_once(decisions: decision_pb2_grpc.DecisionServiceStub) -> None:
    requests = (pb.DecideStreamRequest(order=order(f"{number}")) for number in range(1_000))
    answered = [answer.result.order_ref for answer in decisions.DecideStream(requests, timeout=30.0)]
    assert sorted(answered, key=int) == [f"{number}" for number in range(1_000)]


def test_a_caller_may_say_after_each_result_that_it_has_read_it(group: Group) -> None:
    with Caller(group.decision) as caller:
        stream = caller.begin(STREAM)
        reply = caller.replies[stream]
        for number in range(3):
            reply.body = b""
            caller.send(stream, framed(pb.DecideStreamRequest(order=order(f"{number}")).SerializeToString()))
            assert caller.read(lambda: bool(reply.body)), "an answer"
            for _ in range(60):  # what 64 results that came in one frame are worth
                caller.http.increment_flow_control_window(1, stream)
                caller.http.increment_flow_control_window(1)
            caller.flush()
        caller.wait_until_read()
        assert not caller.closed


def test_two_orders_of_a_stream_with_the_same_reference_are_two_decisions(
    decisions: decision_pb2_grpc.DecisionServiceStub,
) -> None:
    requests = iter([pb.DecideStreamRequest(order=order("twin"))] * 2)
    answers = [answer.result for answer in decisions.DecideStream(requests, timeout=30.0)]
    assert [answer.order_ref for answer in answers] == ["twin", "twin"]
    assert len({answer.decision.decision_id for answer in answers}) == 2


@pytest.mark.parametrize("microseconds", [500, 700_250])
def test_an_order_is_allowed_no_more_time_than_it_says(
    decisions: decision_pb2_grpc.DecisionServiceStub, microseconds: int
) -> None:
    asked = order()
    asked.timeout.FromMicroseconds(microseconds)
    answer: Any = decisions.Decide.future(pb.DecideRequest(order=asked), timeout=_SECONDS)
    if answer.code() is grpc.StatusCode.OK:
        allowed = answer.result().decision.budget.allowed_us
        assert microseconds - 2 <= allowed <= microseconds, "it is cut, and never rounded up"
    else:
        assert answer.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_garbage_ends_a_stream_after_the_answers_due(group: Group) -> None:
    sound = framed(pb.DecideStreamRequest(order=order("before")).SerializeToString())
    with Caller(group.decision) as caller:
        stream = caller.begin(STREAM)
        caller.send(stream, sound + framed(b"\xff\xff\xff\xff"))
        reply = caller.reply(stream)
    assert reply.status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert pb.DecideStreamResponse.FromString(reply.body[5:]).result.order_ref == "before"


def test_a_stream_ends_at_its_deadline(decisions: decision_pb2_grpc.DecisionServiceStub, group: Group) -> None:
    with Caller(group.decision) as caller:
        stream = caller.begin(STREAM, extra=[("grpc-timeout", "200m")])
        caller.flush()
        reply = caller.reply(stream)
    assert reply.status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]


def test_nobody_is_said_to_have_heard_what_he_did_not_wait_for(group: Group) -> None:
    (journal,) = journals_of(group.directory / "journal.db")
    with Caller(group.decision) as caller:
        with closing(sqlite3.connect(journal, isolation_level=None)) as writer:
            # No decision is durable, and therefore none is answered, before the server knows that its caller has left.
            writer.execute("BEGIN IMMEDIATE")
            for number in range(60):
                stream = caller.begin()
                caller.http.send_data(stream, wire(f"gone-{number}"), end_stream=True)
                caller.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
                caller.flush()
            caller.wait_until_read()
        assert caller.call(wire("stayed")).status == 0
    statuses = eventually(lambda: reply_statuses(group), lambda found: "stayed" in found)
    assert statuses["stayed"] == REPLIED
    eventually(
        lambda: [ref for ref, status in reply_statuses(group).items() if ref.startswith("gone") and status == REPLIED],
        lambda wrong: not wrong,
    )


def test_a_closed_connection_ends_its_calls(group: Group) -> None:
    with grpc.insecure_channel(group.decision) as channel:
        watch = health_stub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        before = group.metric("pretrade_event_loop_tasks")
        with Caller(group.decision) as caller:
            for number in range(20):
                caller.begin(STREAM)
                caller.begin("/grpc.health.v1.Health/Watch", extra=[("x-number", f"{number}")])
            caller.flush()
            eventually(lambda: group.metric("pretrade_event_loop_tasks"), lambda tasks: tasks >= before + 20)
        eventually(lambda: group.metric("pretrade_event_loop_tasks"), lambda tasks: tasks <= before + 2)


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)  # its types know no methods


def test_health_can_be_checked_and_watched(channel: grpc.Channel) -> None:
    health = health_stub(channel)
    for service in ("", "pretrade.decision.v1.DecisionService"):
        assert health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_SECONDS).status == 1
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="no.such"), timeout=_SECONDS)
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_grpcurl_finds_its_way_by_reflection(group: Group) -> None:
    def grpcurl(*arguments: str) -> str:
        argv = [str(Path(sys.executable).with_name("grpcurl")), "-plaintext", "-max-time", "10", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout

    listed = grpcurl(group.decision, "list").split()
    assert {"grpc.health.v1.Health", "pretrade.decision.v1.DecisionService"} <= set(listed)
    assert "SIDE_BUY" in grpcurl(group.decision, "describe", "pretrade.decision.v1.Side")
    asked = {
        "order": {"order_ref": "c", "instrument": INSTRUMENTS[0], "side": "SIDE_BUY", "quantity": 1, "strategy": "t"}
    }
    answer = json.loads(grpcurl("-d", json.dumps(asked), group.decision, "pretrade.decision.v1.DecisionService/Decide"))
    assert answer["decision"]["order_ref"] == "c"


@pytest.mark.usefixtures("js_client")
def test_a_server_answers_the_javascript_clients_as_their_fake_server_does(group: Group) -> None:
    url = f"http://127.0.0.1:{group.env['PRETRADE_HTTP__PORT']}"
    node_tests("test/contract.test.js", PRETRADE_TEST_ADDRESS=group.decision, PRETRADE_TEST_URL=url)


@pytest.mark.fault(
    "E1",
    "Calls arrive at Envoy beyond the admission limit",
    "Envoy refuses them with RESOURCE_EXHAUSTED before Python sees them.",
)
def test_envoy_refuses_calls_beyond_the_limit_before_anybody_takes_them_up(tmp_path: Path) -> None:
    limit = 4
    changes = {
        "PRETRADE_GRPC__EDGE": "envoy",
        "PRETRADE_GRPC__READ_SECONDS": "60",
        "PRETRADE_ADMISSION__MAX_IN_FLIGHT": f"{limit}",
        "PRETRADE_ADMISSION__MIN_IN_FLIGHT": f"{limit}",
    }
    with (
        server_group(tmp_path, 1, **changes) as group,
        Caller(group.decision) as slow,
        grpc.insecure_channel(group.decision) as channel,
    ):
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        request = pb.DecideRequest(order=order())
        stub.Decide(request, timeout=_SECONDS)
        begun: list[int] = []

        def refusal_of_one_more() -> Any:
            """How a call is refused while so many wait for their messages. Envoy may count one that has just ended."""
            slow.read(lambda: False, 0.05)
            begun[:] = [stream for stream in begun if not slow.replies[stream].ended]
            begun.extend(slow.begin() for _ in range(limit - len(begun)))
            slow.flush()
            return refusal(stub, request)

        eventually(refusal_of_one_more, lambda refused: refused is not None)
        refused = refusal(stub, request)
        assert refused is not None
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = rpc_status.from_call(refused)
        assert details is not None
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert details.details[0].Unpack(info)
        assert details.details[1].Unpack(retry)
        assert (info.domain, info.reason) == ("pretrade", "TOO_MANY_IN_FLIGHT")
        assert retry.retry_delay.nanos == 50_000_000
        assert retry_delay(refused) == 0.05
        over_http = httpx.post(f"http://{group.decision}{DECIDE}", json={})
        assert (over_http.status_code, over_http.headers["retry-after"]) == (429, "1")
        assert over_http.headers["content-type"] == "application/problem+json"
        assert over_http.json()["reason"] == "TOO_MANY_IN_FLIGHT"
        shorter = httpx.post(f"http://{group.decision}/v1/decide", json={})
        assert shorter.json()["reason"] == "TOO_MANY_IN_FLIGHT", "the gate counts the shorter path, too"
        web = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
        assert httpx.post(f"http://{group.decision}{DECIDE}", content=wire(), headers=web).headers["grpc-status"] == "8"
        # What can only reduce an exposure passes the gate, and so does all that is no unary decision.
        reducing = pb.DecideRequest(order=order("r", reduce_only=True))
        marked = (("pretrade-reduce-only", "1"),)
        assert stub.Decide(reducing, timeout=_SECONDS, metadata=marked).decision.order_ref == "r"
        with pytest.raises(grpc.RpcError) as lied:
            stub.Decide(request, timeout=_SECONDS, metadata=marked)
        assert lied.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "it came in and decided nothing"
        assert health_stub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS).status == 1
        streamed = stub.DecideStream(iter([pb.DecideStreamRequest(order=order("s"))]), timeout=_SECONDS)
        assert [answer.result.HasField("decision") for answer in streamed] == [True]
        eventually(lambda: group.metric("pretrade_errors_total", reason="TOO_MANY_IN_FLIGHT"), lambda count: count >= 4)
        assert group.metric("pretrade_shed_total") >= 4
        assert "refused before they are taken up" in group.log()
        for stream in begun:
            slow.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        slow.flush()
        eventually(lambda: refusal(stub, request), lambda refused: refused is None)


@pytest.mark.long
@pytest.mark.parametrize("edge", ["envoy", "grpcio"])
def test_batches_are_decided_where_there_is_no_place_for_all_of_their_orders(tmp_path: Path, edge: str) -> None:
    limit, size, callers = 40, 192, 4
    changes = {
        "PRETRADE_GRPC__EDGE": edge,
        "PRETRADE_ADMISSION__MAX_IN_FLIGHT": f"{limit}",
        "PRETRADE_ADMISSION__MIN_IN_FLIGHT": f"{limit}",
    }
    request = pb.DecideBatchRequest(orders=[order(f"{number}") for number in range(size)])
    with server_group(tmp_path, 1, **changes) as group, grpc.insecure_channel(group.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        whole = 0
        for _ in range(3):  # the gate's limit follows what was under way before
            with ThreadPoolExecutor(callers) as threads:
                for refs, seconds in threads.map(lambda _: decided_of(stub, request), range(callers)):
                    is_whole = refs == [f"{number}" for number in range(size)]
                    whole += is_whole
                    # Nobody is refused at once, but a machine may stand still for longer than a batch waits.
                    assert is_whole or seconds >= PATIENCE_SECONDS
        assert whole
        assert (group.metric("pretrade_shed_total") == 0) == (whole == 3 * callers)


def decided_of(stub: decision_pb2_grpc.DecisionServiceStub, request: pb.DecideBatchRequest) -> tuple[list[str], float]:
    """The references of those orders of a batch that are decided, and how long that took."""
    began = time.monotonic()
    try:
        results = list(stub.DecideBatch(request, timeout=30 * _SECONDS).results)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        results = []
    return [one.decision.order_ref for one in results if one.HasField("decision")], time.monotonic() - began


def refusal(stub: decision_pb2_grpc.DecisionServiceStub, request: pb.DecideRequest) -> Any:
    """How a call is refused; None when it is not."""
    try:
        stub.Decide(request, timeout=_SECONDS)
    except grpc.RpcError as error:
        return error
    return None


@pytest.mark.parametrize("text", [False, True])
def test_envoy_speaks_grpc_web(envoy: Group, text: bool) -> None:
    kind = "application/grpc-web-text" if text else "application/grpc-web+proto"
    body = base64.b64encode(wire("web")) if text else wire("web")
    headers = {"content-type": kind, "accept": kind, "x-grpc-web": "1"}
    answer = httpx.post(f"http://{envoy.decision}{DECIDE}", content=body, headers=headers)
    assert answer.headers["content-type"].startswith(kind)
    content = b"".join(map(base64.b64decode, _base64_parts(answer.content))) if text else answer.content
    _, length = struct.unpack_from(">BI", content)
    assert pb.DecideResponse.FromString(content[5 : 5 + length]).decision.order_ref == "web"
    assert content[5 + length] == 0x80, "trailers"
    assert b"grpc-status:0" in content[5 + length :].replace(b" ", b"")


def _base64_parts(content: bytes) -> list[bytes]:
    """Padding may stand in the middle: each part was encoded by itself."""
    return [content[start : start + 4] for start in range(0, len(content), 4)]


@pytest.mark.long
def test_without_envoy_the_start_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "pyvoy.py").write_text("raise ImportError('there is no pyvoy here')")
    env = server_environment(tmp_path, PRETRADE_GRPC__EDGE="envoy")
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env.get('PYTHONPATH', '')}"
    ended = subprocess.run([sys.executable, "-m", "server"], env=env, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert b"pip install 'pretrade-server[envoy]'" in ended.stderr


def test_an_edge_that_nobody_chose_is_envoy_and_the_log_says_so(envoy: Group) -> None:
    assert [line["edge"] for line in log_lines(envoy, "started")] == ["envoy"]


@pytest.mark.long
def test_where_envoy_cannot_run_grpc_aio_serves_and_the_log_says_why(tmp_path: Path) -> None:
    (tmp_path / "pyvoy.py").write_text("raise ImportError('there is no pyvoy here')")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with server_group(tmp_path, 1, PRETRADE_GRPC__EDGE="auto", PYTHONPATH=path) as group:
        assert [line["edge"] for line in log_lines(group, "started")] == ["grpcio"]
        (said,) = log_lines(group, "Envoy cannot run here, so grpc.aio serves")
    assert "there is no pyvoy here" in said["problem"]


def log_lines(group: Group, event: str) -> list[dict[str, Any]]:
    """What a group logged of an event."""
    lines = (json.loads(line) for line in group.log().splitlines() if line.startswith("{"))
    return [line for line in lines if line["event"] == event]


@pytest.mark.long
def test_a_server_that_cannot_start_inside_envoy_ends_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = server_environment(tmp_path, PRETRADE_GRPC__EDGE="envoy", PRETRADE_METRICS__PORT=port)
        ended = subprocess.run([sys.executable, "-m", "server"], env=env, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert b"cannot start" in ended.stderr
