"""The lane between an Envoy and the application: what it takes, what goes on, and that each call ends once."""

from __future__ import annotations

import asyncio
import itertools
import random
import select
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import grpc
import pytest
from support.fake_envoy import fake_envoy_here
from support.waiting import until

from local.bench.fake_envoy import DROP, GO_ON, STOP, FakeEnvoy, Request
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.metrics import DecisionMetrics
from server.envoy import lane
from server.envoy.asgi import GrpcApplication
from server.errors import OverloadedError
from server.rpc.decision import Plain
from server.rpc.framing import framed

MESSAGE = framed(b"an order")
DECISION = pb.Decision(decision_id="one").SerializeToString()
ANSWER = pb.DecideResponse(decision=pb.Decision(decision_id="one")).SerializeToString()
OK = [
    ("H", b":status=200\ncontent-type=application/grpc\ngrpc-accept-encoding=identity,gzip,deflate\n"),
    ("D", framed(ANSWER)),
    ("T", b"grpc-status=0\n"),
]


@pytest.fixture
def envoy() -> Iterator[FakeEnvoy]:
    envoy = fake_envoy_here()
    envoy.filter.open_lane()
    yield envoy
    envoy.run()
    envoy.filter.take()
    envoy.filter.close_lane()


def taken(envoy: FakeEnvoy, request: Request, body: bytes = MESSAGE) -> Any:
    """The filter's call for a request."""
    assert request.headers() == STOP
    assert request.body(body) == DROP
    ((call,), ended) = envoy.filter.take()
    assert ended == []
    return call


def test_what_envoy_did_before_the_import_is_not_undone_by_it(envoy: FakeEnvoy) -> None:
    assert envoy.filter.loaded()


def test_a_plain_call_comes_with_what_it_carries(envoy: FakeEnvoy) -> None:
    request = envoy.request(grpc_timeout="25m", x_correlation_id="mine", user_agent="grpc-c/1")
    call = taken(envoy, request)
    assert call.message == b"an order"
    assert call.deadline == call.arrived + 0.025
    assert dict(call.headers) == {
        b"grpc-timeout": b"25m",
        b"x-correlation-id": b"mine",
        b"x-pretrade-arrived": b"1790000000.000001",
    }
    assert not call.is_bare
    request.forget()


@pytest.mark.parametrize("timeout", [None, "1S"])
def test_a_deadline_alone_is_nothing_that_goes_along(envoy: FakeEnvoy, timeout: str | None) -> None:
    request = envoy.request(grpc_timeout=timeout)
    assert taken(envoy, request).is_bare
    request.forget()


@pytest.mark.parametrize(
    "changes",
    [
        {":method": "GET"},
        {":path": "/pretrade.decision.v1.DecisionService/DecideBatch"},
        {"content-type": "application/json"},
        {"content-type": None},
        {"grpc-encoding": "gzip"},
        {"grpc-timeout": "soon"},
        {"grpc-timeout": "m"},
        {"grpc-timeout": "123456789S"},
        {"pretrade-reduce-only": "1"},
        {"x-forwarded-client-cert": 'Cert="…"'},
        {"authorization": "Bearer " + "x" * 2_048},
    ],
    ids=str,
)
def test_a_call_with_anything_else_goes_on_untouched(envoy: FakeEnvoy, changes: dict[str, str | None]) -> None:
    request = envoy.request(**changes)
    assert request.headers() == GO_ON
    assert request.body(MESSAGE) == GO_ON
    assert envoy.filter.take() == ([], [])
    request.forget()
    assert envoy.filter.take() == ([], [])


def test_every_header_of_many_is_looked_at(envoy: FakeEnvoy) -> None:
    request = envoy.request(*((b"traceparent", b"%d" % number) for number in range(40)))
    assert request.headers() == GO_ON
    request.forget()


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0", b"\1" + MESSAGE[1:], MESSAGE[:-1], MESSAGE + b"more", MESSAGE + MESSAGE, framed(bytes(20_000))],
    ids=["nothing", "no prefix", "compressed", "cut", "more", "two", "long"],
)
def test_an_odd_body_goes_on_whole(envoy: FakeEnvoy, body: bytes) -> None:
    request = envoy.request()
    assert request.headers() == STOP
    assert request.body(body) == GO_ON
    assert envoy.filter.take() == ([], [])
    request.forget()


def test_a_message_in_pieces_is_put_together(envoy: FakeEnvoy) -> None:
    request = envoy.request()
    assert request.headers() == STOP
    assert request.body(MESSAGE[:6], piece=2, end=False) == STOP
    assert request.body(MESSAGE[6:], piece=1) == DROP
    ((call,), _) = envoy.filter.take()
    assert call.message == b"an order"
    request.forget()


def test_a_call_with_trailers_goes_on(envoy: FakeEnvoy) -> None:
    request = envoy.request()
    request.headers()
    assert request.body(MESSAGE, end=False) == STOP
    assert request.trailers() == GO_ON
    request.forget()
    assert envoy.filter.take() == ([], [])


def test_a_message_that_is_slow_to_come_goes_on(envoy: FakeEnvoy) -> None:
    slow, quick = envoy.request(), envoy.request()
    slow.headers()
    call = taken(envoy, quick)
    envoy.filter.pass_on_slow(call.arrived + 60.0)
    envoy.run()
    assert slow.went_on
    assert not quick.went_on
    assert slow.body(MESSAGE) == GO_ON
    slow.forget()
    quick.forget()


def test_one_wake_serves_all_that_comes_until_the_loop_looks(envoy: FakeEnvoy) -> None:
    fd = envoy.filter.open_lane()
    requests = [envoy.request() for _ in range(5)]
    for request in requests:
        request.headers()
        request.body(MESSAGE)
    assert select.select([fd], [], [], 0)[0]
    assert len(envoy.filter.take()[0]) == 5
    assert not select.select([fd], [], [], 0)[0]
    for request in requests:
        request.forget()


def test_a_lane_that_is_closed_takes_nothing(envoy: FakeEnvoy) -> None:
    begun, later = envoy.request(), envoy.request()
    assert begun.headers() == STOP
    envoy.filter.close_lane()
    assert begun.body(MESSAGE) == GO_ON
    assert later.headers() == GO_ON
    begun.forget()
    later.forget()


def test_no_more_calls_are_taken_than_it_has_places(envoy: FakeEnvoy) -> None:
    requests = [envoy.request() for _ in range(8_193)]
    said = Counter((request.headers(), request.body(MESSAGE)) for request in requests)
    assert said == {(STOP, DROP): 8_192, (STOP, GO_ON): 1}
    for request in requests:
        request.forget()
    arrived, ended = envoy.filter.take()
    assert (len(arrived), len(ended)) == (8_192, 8_192)
    last = envoy.request()
    assert taken(envoy, last) is not None, "there is room again"
    last.forget()


@pytest.mark.parametrize(("parts", "heard"), [(99, True), (1, False), (2, False), (3, True)])
def test_an_answer_is_heard_when_envoy_took_all_of_it(envoy: FakeEnvoy, parts: int, heard: bool) -> None:
    request = envoy.request()
    call = taken(envoy, request)
    request.leave(after=parts)
    head, trailers = envoy.filter.packed([(b":status", b"200")]), envoy.filter.packed([(b"grpc-status", b"0")])
    call.answer(head, MESSAGE, trailers)
    assert envoy.filter.take() == ([], []), "the worker has not run"
    assert envoy.run() == 1
    assert envoy.filter.take() == ([], [(call, heard)])
    request.forget()
    assert envoy.filter.take() == ([], []), "a call ends once"


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 128, 300, 16_379, 16_384, 20_000])
def test_an_answer_of_one_part_is_framed_as_the_generated_classes_write_it(envoy: FakeEnvoy, size: int) -> None:
    request = envoy.request()
    call = taken(envoy, request)
    decision = pb.Decision(order_ref="x" * size) if size else pb.Decision()
    head, trailers = envoy.filter.packed([(b":status", b"200")]), envoy.filter.packed([(b"grpc-status", b"0")])
    call.answer_with(head, lane._DECISION, decision.SerializeToString(), trailers)
    call.answer_with(head, lane._DECISION, b"not this one", trailers)
    assert envoy.run() == 1
    message = framed(pb.DecideResponse(decision=decision).SerializeToString())
    assert request.sent == [("H", b":status=200\n"), ("D", message), ("T", b"grpc-status=0\n")]
    request.forget()


def answered(envoy: FakeEnvoy, calls: Sequence[Any]) -> None:
    """All of them get answers, each with its number."""
    head, trailers = envoy.filter.packed([(b":status", b"200")]), envoy.filter.packed([(b"grpc-status", b"0")])
    for number, call in enumerate(calls):
        call.answer(head, framed(b"%d" % number), trailers)


def test_one_wake_has_all_answers_sent_that_are_there_when_the_worker_looks(envoy: FakeEnvoy) -> None:
    requests = [envoy.request() for _ in range(5)]
    calls = [taken(envoy, request) for request in requests]
    answered(envoy, calls)
    assert envoy.run() == 1
    assert [request.sent[1] for request in requests] == [("D", framed(b"%d" % number)) for number in range(5)]
    assert envoy.filter.take() == ([], [(call, True) for call in calls])
    for request in requests:
        request.forget()


@pytest.mark.parametrize("gone", [{0}, {0, 1}, {0, 2}, {1}, {4}, {0, 1, 2, 3, 4}], ids=str)
def test_answers_are_sent_whoever_goes_before_the_worker_looks(envoy: FakeEnvoy, gone: set[int]) -> None:
    """Also when it is the one whose answer was to wake the worker."""
    requests = [envoy.request() for _ in range(5)]
    calls = [taken(envoy, request) for request in requests]
    answered(envoy, calls)
    for number in gone:
        requests[number].leave()
    envoy.run()
    assert [number for number, request in enumerate(requests) if request.sent] == sorted({0, 1, 2, 3, 4} - gone)
    assert dict(envoy.filter.take()[1]) == {call: number not in gone for number, call in enumerate(calls)}
    later = envoy.request()
    answered(envoy, [taken(envoy, later)])
    envoy.run()
    assert later.sent, "the worker is woken again"
    for request in (*requests, later):
        request.forget()


def test_a_caller_may_go_while_the_answers_of_others_are_sent(envoy: FakeEnvoy) -> None:
    requests = [envoy.request() for _ in range(4)]
    calls = [taken(envoy, request) for request in requests]
    requests[1].takes_along(requests[2])  # whose answer is next
    requests[0].takes_along(requests[3])  # who has none yet
    answered(envoy, calls[:3])
    envoy.run()
    assert [bool(request.sent) for request in requests] == [True, True, False, False]
    assert dict(envoy.filter.take()[1]) == dict(zip(calls, [True, True, False, False], strict=True))
    for request in requests:
        request.forget()


async def test_no_answer_is_left_behind_when_it_comes_while_others_are_sent(envoy: FakeEnvoy) -> None:
    first, second = envoy.request(), envoy.request()
    calls = [taken(envoy, first), taken(envoy, second)]
    answered(envoy, calls[:1])
    first.hold()
    running = asyncio.create_task(asyncio.to_thread(envoy.run))
    await until(lambda: first.stands)
    answered(envoy, calls[1:])
    first.hold(False)
    assert await running == 1
    assert second.sent
    assert envoy.filter.take() == ([], [(call, True) for call in calls])
    first.forget()
    second.forget()


def test_a_caller_who_goes_is_told_of_once_and_gets_no_answer(envoy: FakeEnvoy) -> None:
    request = envoy.request()
    call = taken(envoy, request)
    request.leave()
    assert call.is_gone
    call.answer(b"", MESSAGE, b"")
    assert envoy.run() == 0
    assert envoy.filter.take() == ([], [(call, False)])
    request.forget()
    assert envoy.filter.take() == ([], [])


def test_a_caller_may_go_before_its_call_was_seen(envoy: FakeEnvoy) -> None:
    request = envoy.request()
    request.headers()
    request.body(MESSAGE)
    request.forget()
    ((call,), ended) = envoy.filter.take()
    assert ended == [(call, False)]


def test_the_first_answer_counts(envoy: FakeEnvoy) -> None:
    request = envoy.request()
    call = taken(envoy, request)
    call.answer(envoy.filter.packed([(b"grpc-status", b"4")]), b"", b"")
    call.answer(envoy.filter.packed([(b"grpc-status", b"0")]), b"", b"")
    envoy.run()
    assert request.sent == [("E", b"grpc-status=4\n")]
    request.forget()


def test_calls_come_go_and_are_answered_in_two_threads_at_once(envoy: FakeEnvoy) -> None:
    """Each call that was taken ends exactly once, whenever its caller goes."""
    chance, stop, began = random.Random(15), threading.Event(), Counter[int]()
    head, trailers = envoy.filter.packed([(b":status", b"200")]), envoy.filter.packed([(b"grpc-status", b"0")])

    def work() -> None:
        there: list[Request] = []
        for _ in range(20_000):
            request = envoy.request(grpc_timeout="25m")
            request.headers()
            if chance.random() < 0.9:
                began[request.body(MESSAGE, piece=chance.randint(1, 30))] += 1
            if chance.random() < 0.3:
                request.leave(after=chance.randint(1, 3))
            there.append(request)
            if len(there) > 64:
                envoy.run()
                there.pop(chance.randrange(len(there))).forget()
        for request in there:
            envoy.run()
            request.forget()
        stop.set()

    worker = threading.Thread(target=work)
    worker.start()
    calls, over = set[int](), list[int]()
    kept: list[Any] = []
    while True:
        stopped = stop.is_set()
        envoy.filter.pass_on_slow(0.0)
        arrived, ended = envoy.filter.take()
        for call in arrived:
            kept.append(call)
            calls.add(id(call))
            if chance.random() < 0.8:
                call.answer(head, MESSAGE, trailers)
        over += [id(call) for call, _ in ended]
        if stopped and not arrived and not ended:
            break
    worker.join()
    assert len(calls) == began[DROP] > 10_000
    assert sorted(over) == sorted(calls)


class Decider:
    """Decides when it is told to."""

    def __init__(self) -> None:
        self.begun: list[Plain] = []
        self.company: list[bool] = []
        self.were_heard: list[Any] = []
        self.were_not: list[Any] = []
        self.given_up: list[Plain] = []
        self.leaves_to_application = False
        self.leaves_to_begin: set[int] = set()
        """Places of those that cannot be begun together with others."""
        self.together: list[int] = []
        """Calls that were to be begun together, each time."""
        self.bug: Exception | None = None
        """Met where orders are begun together."""
        self.error: Exception | None = None

    def begin(self, request: bytes, call: Any, arrived: float, *, in_company: bool) -> Plain | None:
        if self.error is not None:
            raise self.error
        if self.leaves_to_application:
            return None
        self.company.append(in_company)
        order: Any = request
        self.begun.append((order, asyncio.get_running_loop().create_future()))
        return self.begun[-1]

    def begin_together(
        self, requests: list[bytes], deadlines: list[float | None], arrived: float
    ) -> list[Plain | None]:
        self.together.append(len(requests))
        if self.bug is not None:
            raise self.bug
        begun: list[Plain | None] = []
        for place, (request, deadline) in enumerate(zip(requests, deadlines, strict=True)):
            assert deadline is None or deadline > arrived
            order: Any = request
            one = (order, asyncio.get_running_loop().create_future())
            begun.append(None if place in self.leaves_to_begin else one)
        self.begun += [one for one in begun if one is not None]
        return begun

    def failed(self, error: Exception, begun: Plain, arrived: float, call: Any) -> Exception:
        return error

    def give_up(self, begun: Plain) -> None:
        self.given_up.append(begun)
        begun[1].cancel()

    def sent(self, answer: Any) -> None:
        self.were_heard.append(answer)

    def not_sent(self, answer: Any) -> None:
        self.were_not.append(answer)

    def heard(self, decisions: list[Any]) -> None:
        self.were_heard += decisions

    def unheard(self, decided: Any) -> None:
        self.were_not.append(decided)


class Decision:
    wire = DECISION


class World:
    """A lane in an event loop."""

    def __init__(self, envoy: FakeEnvoy, *, is_open: bool = True, max_message_bytes: int = 1_024) -> None:
        self.envoy = envoy
        self.decider = Decider()
        self.metrics = DecisionMetrics()
        clock = asyncio.get_running_loop().time
        self.application = GrpcApplication(
            max_message_bytes, 5.0, self.decider, self.metrics, clock, lambda: 1_790_000_000.0
        )
        handler: Any = grpc.unary_unary_rpc_method_handler(self._answer, pb.DecideRequest.FromString, bytes)
        self.application.add_registered_method_handlers("pretrade.decision.v1.DecisionService", {"Decide": handler})
        decider: Any = self.decider
        self.lane = lane.Lane(self.application, decider, max_message_bytes, is_open, self.metrics, clock, envoy.filter)
        self.lane.open()

    async def _answer(self, request: pb.DecideRequest, _call: object) -> bytes:
        return ANSWER

    async def settle(self, enough: Any = None) -> None:
        """Lets the loop and the worker do what is due."""
        for _ in itertools.repeat(None, 20):
            await asyncio.sleep(0.001)
            self.envoy.run()

    async def close(self) -> None:
        self.lane.close()
        await self.settle()
        asyncio.get_running_loop().remove_reader(self.envoy.filter.open_lane())
        assert not self.application.in_flight


def send(request: Request, body: bytes = MESSAGE) -> Request:
    assert request.headers() == STOP
    assert request.body(body) == DROP
    return request


async def test_plain_calls_that_come_together_are_begun_together_and_answered(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    requests = [send(envoy.request()) for _ in range(3)]
    await world.settle()
    assert (world.decider.together, world.decider.company) == ([3], [])
    assert world.application.unary_under_way.calls == 3, "Envoy's gate goes by them"
    assert world.application.unary_under_way.patient == 3
    for begun in world.decider.begun:
        begun[1].set_result(Decision())  # type: ignore[arg-type]
    await world.settle()
    assert [request.sent for request in requests] == [OK] * 3
    assert len(world.decider.were_heard) == 3
    assert world.metrics.lane_calls == {"lane": 3, "application": 0}
    await world.close()


async def test_calls_with_nothing_or_only_a_deadline_are_begun_with_one_look(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    world.decider.leaves_to_begin = {1}
    requests = [send(envoy.request(grpc_timeout="5S")) for _ in range(3)]
    requests += [send(envoy.request()), send(envoy.request(grpc_timeout="5S", x_correlation_id="mine"))]
    await world.settle()
    assert world.decider.together == [4], "all but one with an id"
    assert world.decider.company == [True] * 2, "that one, and one that was left"
    assert world.application.unary_under_way.calls == 5
    assert world.application.unary_under_way.patient == 1
    for begun in world.decider.begun:
        begun[1].set_result(Decision())  # type: ignore[arg-type]
    await world.settle()
    assert [request.sent for request in requests] == [OK] * 5
    assert len(world.decider.were_heard) == 5
    assert world.metrics.lane_calls == {"lane": 5, "application": 0}
    await world.close()


async def test_a_bug_that_calls_meet_together_is_met_by_each_by_itself(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    world.decider.bug = ZeroDivisionError()
    requests = [send(envoy.request(grpc_timeout="5S")) for _ in range(2)]
    await world.settle()
    assert (world.decider.together, world.decider.company) == ([2], [True, True])
    for begun in world.decider.begun:
        begun[1].set_result(Decision())  # type: ignore[arg-type]
    await world.settle()
    assert [request.sent for request in requests] == [OK] * 2
    await world.close()


@pytest.mark.parametrize("parts", [0, 2])
async def test_of_calls_that_were_begun_together_who_goes_is_told_apart(envoy: FakeEnvoy, parts: int) -> None:
    world = World(envoy)
    stays, goes = [send(envoy.request(grpc_timeout="5S")) for _ in range(2)]
    await world.settle()
    if not parts:
        goes.leave()
        await world.settle()
    for begun in world.decider.begun:
        if not begun[1].done():
            begun[1].set_result(Decision())  # type: ignore[arg-type]
    if parts:
        goes.leave(after=parts)
    await world.settle()
    assert stays.sent == OK
    assert len(world.decider.were_heard) == 1
    assert (len(world.decider.given_up), len(world.decider.were_not)) == ((1, 0) if not parts else (0, 1))
    await world.close()


async def test_a_caller_who_goes_is_given_up_at_once(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    request = send(envoy.request())
    await world.settle()
    request.leave()
    await world.settle()
    assert world.decider.given_up == world.decider.begun
    await world.close()


@pytest.mark.parametrize("parts", [0, 1, 2])
async def test_an_answer_that_is_not_all_sent_is_unheard(envoy: FakeEnvoy, parts: int) -> None:
    world = World(envoy)
    request = send(envoy.request())
    await world.settle()
    world.decider.begun[0][1].set_result(Decision())  # type: ignore[arg-type]
    if parts:
        request.leave(after=parts)
        await world.settle()
    else:
        await asyncio.sleep(0)  # the answer is under way
        request.leave()
        await world.settle()
    assert (len(world.decider.were_heard), len(world.decider.were_not)) == (0, 1)
    await world.close()


async def test_an_order_that_gets_no_decision_ends_with_the_applications_status(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    early, late = OverloadedError("OVERLOADED", "too many"), OverloadedError("OVERLOADED", "too many")
    world.decider.error = early
    refused = send(envoy.request())
    await world.settle()
    world.decider.error = None
    failed = send(envoy.request())
    await world.settle()
    world.decider.begun[0][1].set_exception(late)
    await world.settle()
    assert refused.sent == failed.sent
    ((kind, headers),) = refused.sent
    assert kind == "E"
    assert headers.startswith(b":status=200\ncontent-type=application/grpc\n")
    assert b"\ngrpc-status=8\n" in headers
    assert world.metrics.errors["OVERLOADED"] == 2
    await world.close()


async def test_a_bug_is_an_internal_error_and_no_silence(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    world.decider.error = ZeroDivisionError()
    request = send(envoy.request())
    await world.settle()
    assert b"\ngrpc-status=13\n" in request.sent[0][1]
    await world.close()


async def test_a_deadline_ends_a_call_that_is_not_decided(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    looking = asyncio.create_task(world.application.run())
    request = send(envoy.request(grpc_timeout="40m"))
    async with asyncio.timeout(5.0):
        while not request.sent:
            await world.settle()
    assert b"\ngrpc-status=4\n" in request.sent[0][1]
    assert world.decider.given_up == world.decider.begun
    looking.cancel()
    await world.close()


async def test_a_decision_that_cannot_be_written_was_not_heard(envoy: FakeEnvoy) -> None:
    world, bugs = World(envoy), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, what: bugs.append(what["exception"]))
    looking = asyncio.create_task(world.application.run())
    request = send(envoy.request(grpc_timeout="1S"))
    await world.settle()
    unwritable: Any = object()
    world.decider.begun[0][1].set_result(unwritable)
    async with asyncio.timeout(5.0):
        while not request.sent:
            await world.settle()
    await world.settle()
    assert [type(bug) for bug in bugs] == [AttributeError]
    assert b"\ngrpc-status=4\n" in request.sent[0][1]
    assert (world.decider.were_heard, world.decider.given_up) == ([], world.decider.begun)
    looking.cancel()
    await world.close()


async def test_the_end_of_the_server_ends_what_is_under_way(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    request = send(envoy.request())
    await world.settle()
    world.application.end_all()
    await world.settle()
    assert b"\ngrpc-status=14\n" in request.sent[0][1]
    await world.close()


@pytest.mark.parametrize("why", ["not plain", "too long", "credentials"])
async def test_what_is_not_plain_is_answered_by_the_application(envoy: FakeEnvoy, why: str) -> None:
    world = World(envoy, is_open=why != "credentials", max_message_bytes=4 if why == "too long" else 1_024)
    world.decider.leaves_to_application = why == "not plain"
    order = pb.DecideRequest(order=pb.Order(order_ref="one")).SerializeToString()
    request = send(envoy.request(), framed(order))
    await world.settle()
    assert world.metrics.lane_calls == {"lane": 0, "application": 1}
    if why == "too long":
        assert b"\ngrpc-status=8\n" in request.sent[0][1]
    else:
        assert [kind for kind, _ in request.sent] == ["H", "D", "T"]
        assert request.sent[1:] == OK[1:]
        assert world.decider.were_heard == [ANSWER]
    await world.close()


async def test_a_call_that_came_too_late_is_the_applications(envoy: FakeEnvoy) -> None:
    world = World(envoy)
    request = send(envoy.request(grpc_timeout="0m"))
    async with asyncio.timeout(5.0):
        while not request.sent:
            await world.settle()
    assert b"\ngrpc-status=4\n" in request.sent[0][1]
    assert world.metrics.lane_calls["application"] == 1
    await world.close()


async def test_a_caller_who_goes_while_the_application_answers_is_unheard(envoy: FakeEnvoy) -> None:
    world = World(envoy, is_open=False)
    request = send(envoy.request(), framed(b""))
    request.leave(after=1)
    await world.settle()
    assert world.decider.were_not == [ANSWER]
    await world.close()


def test_there_is_no_lane_for_another_envoy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_c", object())
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.9")
    assert lane.missing() == f"it is made for Envoy {lane.ENVOY}, and 9.9.9 is installed"
    assert lane.http_filters() == []


def test_there_is_no_lane_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_c", None)
    assert lane.missing() == "it is not compiled"
    assert lane.http_filters() == []
    assert not lane.is_loaded()
