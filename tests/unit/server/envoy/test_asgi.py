"""Calls as Envoy hands them over, with the time at which they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest

from server.decision.metrics import DecisionMetrics
from server.envoy.asgi import GrpcApplication
from server.errors import UnauthenticatedError
from server.rpc.framing import ARRIVED, PEER, framed
from server.security.identity import Attempt

NOW = 1_790_000_000.0
GRPC = (b"content-type", b"application/grpc")


class Outcomes:
    """What became of the answers."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.unheard: list[object] = []

    def sent(self, answer: object) -> None:
        self.heard.append(answer)

    def not_sent(self, answer: object) -> None:
        self.unheard.append(answer)


async def call(waited_seconds: float, allowed: bytes, expired: list[float] | None = None) -> tuple[bytes, float]:
    """The status of a call that waited so long to be taken up, and what it took from then on in seconds."""
    clock = asyncio.get_running_loop().time
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": framed(b""), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def answer(request: bytes, context: object) -> bytes:
        return b""

    late = [] if expired is None else expired
    application = GrpcApplication(1_024, 5.0, Outcomes(), DecisionMetrics(), clock, lambda: NOW, expired=late.append)
    handler: Any = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    application.add_registered_method_handlers("s", {"Do": handler})
    began = clock()
    headers = [GRPC, (b"grpc-timeout", allowed), (ARRIVED, b"%.6f" % (NOW - waited_seconds))]
    await application({"path": "/s/Do", "headers": headers}, receive, send)
    assert not application.in_flight
    status = dict(header for message in sent for header in message.get("headers", ()))[b"grpc-status"]
    return status, clock() - began


@pytest.mark.parametrize(("waited_seconds", "kept_seconds"), [(0.06, 0.05), (5.0, 0.15)])
async def test_a_call_that_waited_past_its_deadline_keeps_its_place_in_the_gate_for_a_while(
    waited_seconds: float, kept_seconds: float
) -> None:
    status, took = await call(waited_seconds, b"50m")
    assert status == b"4"
    assert took > kept_seconds, "what ends at once would make the gate let in more of its kind"


async def test_a_call_that_waited_less_is_answered() -> None:
    status, _ = await call(0.06, b"10S")
    assert status == b"0"


@pytest.mark.parametrize("fails_at", [None, "http.response.body", "http.response.trailers"])
async def test_an_answer_is_sent_when_envoy_has_its_status_too(fails_at: str | None) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": framed(b""), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == fails_at:
            raise OSError("the caller has gone")

    async def answer(request: bytes, context: object) -> bytes:
        return b"the answer"

    clock = asyncio.get_running_loop().time
    outcomes = Outcomes()
    application = GrpcApplication(1_024, 5.0, outcomes, DecisionMetrics(), clock, lambda: NOW)
    handler: Any = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    application.add_registered_method_handlers("s", {"Do": handler})
    await application({"path": "/s/Do", "headers": [GRPC]}, receive, send)
    assert outcomes.heard == ([b"the answer"] if fails_at is None else [])
    assert outcomes.unheard == ([] if fails_at is None else [b"the answer"])


async def test_the_messages_that_a_streams_answer_is_serialised_to_are_sent_together() -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": framed(b"one") + framed(b"two"), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def answers(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[list[bytes]]:
        yield [request async for request in requests]
        yield [b"alone"]

    clock = asyncio.get_running_loop().time
    application = GrpcApplication(1_024, 5.0, Outcomes(), DecisionMetrics(), clock, lambda: NOW)
    handler: Any = grpc.stream_stream_rpc_method_handler(answers, bytes, list)  # type: ignore[arg-type]
    application.add_registered_method_handlers("s", {"Do": handler})
    await application({"path": "/s/Do", "headers": [GRPC]}, receive, send)
    bodies = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert bodies == [framed(b"one") + framed(b"two"), framed(b"alone"), b""]


class Gatekeeper:
    """Lets nobody in, and remembers who came."""

    def __init__(self) -> None:
        self.peers: list[str] = []

    async def admit(self, attempt: Attempt) -> None:
        self.peers.append(attempt.peer())
        raise UnauthenticatedError("NO_TOKEN", "needs a token")


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
async def test_a_caller_comes_from_where_envoy_says_and_not_from_where_it_says_itself(address: str) -> None:
    async def answer(request: bytes, context: object) -> bytes:
        return b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": framed(b""), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        pass

    clock, access = asyncio.get_running_loop().time, Gatekeeper()
    application = GrpcApplication(1_024, 5.0, Outcomes(), DecisionMetrics(), clock, lambda: NOW, cast(Any, access))
    handler: Any = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    application.add_registered_method_handlers("s", {"Do": handler})
    headers = [GRPC, (b"x-forwarded-for", b"198.51.100.7"), (PEER, address.encode())]
    # The scope's client is what Envoy made of `x-forwarded-for`.
    await application({"path": "/s/Do", "headers": headers, "client": ("198.51.100.7", 0)}, receive, send)
    assert access.peers == [address]


async def test_admission_is_told_of_a_call_that_is_taken_up_too_late() -> None:
    expired: list[float] = []
    await call(0.01, b"50m", expired)
    assert expired == []
    await call(0.06, b"50m", expired)
    assert expired == [0.05]


async def test_the_application_knows_what_is_under_way() -> None:
    application = GrpcApplication(
        1_024, 5.0, Outcomes(), DecisionMetrics(), asyncio.get_running_loop().time, lambda: NOW
    )
    read, done = asyncio.Semaphore(0), asyncio.Event()

    async def answer(request: bytes, context: Any) -> bytes:
        context.orders = int(request)
        read.release()
        await done.wait()
        return b""

    handler: Any = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    application.add_registered_method_handlers("s", {"Do": handler})

    async def ask(orders: int, headers: list[tuple[bytes, bytes]]) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": framed(b"%d" % orders), "more_body": False}

        async def send(_message: dict[str, Any]) -> None:
            pass

        await application({"path": "/s/Do", "headers": [GRPC, *headers]}, receive, send)

    async with asyncio.TaskGroup() as tasks:
        for orders, headers in ((1, []), (64, []), (1, [(b"grpc-timeout", b"50S")])):
            tasks.create_task(ask(orders, list(headers)))
            await read.acquire()
        tasks.create_task(ask(1, [(b"grpc-timeout", b"50m"), (ARRIVED, b"%.6f" % (NOW - 1))]))
        await asyncio.sleep(0)
        assert application.unary_under_way == (4, 67, 1, 1), "a call that came too late had a deadline, too"
        done.set()
    assert application.unary_under_way == (0, 0, 0, 0)
