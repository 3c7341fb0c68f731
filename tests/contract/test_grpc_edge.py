"""What the edge on grpc.aio says of an answer is what its caller got, also where the deadline passes meanwhile.

The caller is on the wire: it does not give up by itself, so that it gets what was written, whenever that was.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import grpc
import pytest
from support.wire import Caller, Reply, framed

from server.errors import DeadlineError
from server.rpc.call import Call
from server.rpc.edge import GrpcEdge
from server.timing.call_deadlines import CallDeadlines

METHOD: Final = "/service/Method"
ANSWER: Final = b"the answer"
NEAR_SECONDS, FAR_SECONDS = 0.7, 30.0
"""Deadlines."""
BEYOND_SECONDS: Final = NEAR_SECONDS + 0.2
OK, DEADLINE_EXCEEDED = (one.value[0] for one in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED))
WRITTEN: Final = (OK, framed(ANSWER))
EXPIRED: Final = (DEADLINE_EXCEEDED, b"")


@dataclass
class Told:
    """What is said of the answers."""

    words: list[str] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def sent(self, answer: object) -> None:
        self._add("sent", answer)

    def in_doubt(self, answer: object) -> None:
        self._add("in doubt", answer)

    def too_late(self, answer: object) -> DeadlineError:
        self._add("too late", answer)
        return DeadlineError("DEADLINE_EXCEEDED", "too late")

    def _add(self, word: str, answer: object) -> None:
        assert answer == ANSWER
        self.words.append(word)
        self.ended.set()


def at_once() -> None:
    pass


def after_the_deadline() -> None:
    """Holds the event loop up, as the machine may: gRPC ends the call meanwhile, and nobody hears of it."""
    time.sleep(BEYOND_SECONDS)


def in_time_and_then_the_loop_stands_still() -> None:
    """The answer is written in time. That it was is seen after the deadline."""
    asyncio.get_running_loop().call_soon(time.sleep, BEYOND_SECONDS)


async def asked(answering: Callable[[], None], seconds: float) -> tuple[Reply, Told]:
    """What a caller got of a method that answers so, and what was said of it."""

    async def answer(_request: bytes, _call: Call) -> bytes:
        answering()
        return ANSWER

    def call(port: int) -> Reply:
        with Caller(f"127.0.0.1:{port}") as caller:
            return caller.call(framed(b"request"), METHOD, [("grpc-timeout", f"{1e3 * seconds:.0f}m")])

    told = Told()
    deadlines = CallDeadlines(time.monotonic, time.time)
    server = grpc.aio.server(interceptors=(GrpcEdge(5.0, Counter(), deadlines, delivery=told),))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Method": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("service", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        reply = await asyncio.to_thread(call, port)
        async with asyncio.timeout(10):
            await told.ended.wait()
    finally:
        await server.stop(None)
    return reply, told


@pytest.mark.parametrize(
    ("answering", "got", "said"),
    [
        pytest.param(after_the_deadline, EXPIRED, "too late", id="an answer after the deadline is not sent"),
        pytest.param(
            in_time_and_then_the_loop_stands_still, WRITTEN, "in doubt", id="what nobody can know is not claimed"
        ),
    ],
)
async def test_of_an_answer_at_its_deadline_no_more_is_said_than_is_true(
    answering: Callable[[], None], got: tuple[int, bytes], said: str
) -> None:
    reply, told = await asked(answering, NEAR_SECONDS)
    assert (reply.status, reply.body) == got
    assert told.words == [said]


async def test_an_answer_that_was_written_in_time_was_sent() -> None:
    reply, told = await asked(at_once, FAR_SECONDS)
    assert (reply.status, reply.body, told.words) == (*WRITTEN, ["sent"])
