"""The benchmark's callers count what a server really does to them; the servers here are real, on loopback."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc.aio
import pytest
from support.leash import LeashedPopen
from support.token_server import server_with_a_token

from loadtest.benchmark.echo import EchoServicer, echo_server
from loadtest.generators.channel import connected
from loadtest.generators.closed_loop import call_decide, call_decide_batch, call_decide_stream
from loadtest.generators.load import Method, plan
from loadtest.generators.measurement import NO_REPLY, WRONG_REPLY
from loadtest.generators.open_loop import offer
from loadtest.generators.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack

INSTRUMENTS: Final = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
PATIENCE_SECONDS: Final = 10.0
RESPONSE: Final = pb.DecideResponse(
    decision=pb.Decision(
        decision_id="0192b4a1-2b3c-7d4e-8f5a-6b7c8d9e0f1a",
        action=pb.ACTION_TRADE,
        score=0.75,
        threshold=0.5,
        source=pb.SOURCE_SECONDARY,
        reasons=[pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD],
        model_name="champion",
    )
)
FLOW: Final = OrderFlow(INSTRUMENTS)
ORDERS: Final = [FLOW.next({}) for _ in range(300)]


class Flaky(EchoServicer):
    """Refuses every third call, and gives every fourth of the others somebody else's decision."""

    def __init__(self) -> None:
        super().__init__(RESPONSE)
        self.calls = 0
        self.refused = 0
        self.swapped = 0

    async def Decide(self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DecideResponse:
        self.calls += 1
        if self.calls % 3 == 0:
            self.refused += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        response = await super().Decide(request, context)
        if self.calls % 4 == 0:
            self.swapped += 1
            response.decision.order_ref = "another"
        return response


class Shuffling(EchoServicer):
    """A stream that answers in pairs, the later order first; the first of each ten with an error."""

    def __init__(self) -> None:
        super().__init__(RESPONSE)
        self.answered = 0
        self.errors = 0

    async def DecideStream(
        self, request_iterator: AsyncIterator[pb.DecideStreamRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DecideStreamResponse]:
        held: list[pb.Order] = []
        async for request in request_iterator:
            held.append(request.order)
            if len(held) == 2:
                while held:
                    yield pb.DecideStreamResponse(result=self._answer(held.pop()))
        for order in held:
            yield pb.DecideStreamResponse(result=self._answer(order))

    def _answer(self, order: pb.Order) -> pb.OrderResult:
        self.answered += 1
        if self.answered % 10 == 1:
            self.errors += 1
            return pb.OrderResult(order_ref=order.order_ref, error=pb.OrderError(code=3, reason="UNKNOWN_INSTRUMENT"))
        return self._result(order)


class Broken(EchoServicer):
    """A stream that ends with UNAVAILABLE after 10 answers, with others under way."""

    async def DecideStream(
        self, request_iterator: AsyncIterator[pb.DecideStreamRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DecideStreamResponse]:
        answers = 0
        async for request in request_iterator:
            if answers == 10:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            answers += 1
            yield pb.DecideStreamResponse(result=self._result(request.order))


@asynccontextmanager
async def listening(servicer: decision_pb2_grpc.DecisionServiceServicer) -> AsyncIterator[str]:
    """`host:port` of a server in this process. One that is left running would keep the process from ending."""
    server = grpc.aio.server()
    decision_pb2_grpc.add_DecisionServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def serving(
    servicer: decision_pb2_grpc.DecisionServiceServicer,
) -> AsyncIterator[decision_pb2_grpc.DecisionServiceAsyncStub]:
    async with listening(servicer) as address, grpc.aio.insecure_channel(address) as channel:
        yield decision_pb2_grpc.DecisionServiceStub(channel)


async def test_every_call_is_counted_once_as_a_decision_or_under_its_error() -> None:
    servicer = Flaky()
    async with serving(servicer) as stub:
        measured = await call_decide(stub, ORDERS, callers=4, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert servicer.refused > 0
    assert servicer.swapped > 0
    assert measured.errors == {"RESOURCE_EXHAUSTED": servicer.refused, WRONG_REPLY: servicer.swapped}
    decided = servicer.calls - servicer.refused - servicer.swapped
    assert len(measured.latencies) == decided
    assert measured.actions == {"TRADE": decided}
    assert measured.sources == {"SECONDARY": decided}
    assert 0 < max(measured.latencies) < measured.seconds
    assert measured.rate == pytest.approx(decided / measured.seconds)


class Full(EchoServicer):
    """Refuses every order, and asks for a minute's pause."""

    def __init__(self) -> None:
        super().__init__(RESPONSE)
        self.calls = 0

    async def Decide(self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DecideResponse:
        await self._refuse(context)
        raise AssertionError

    async def DecideBatch(
        self, request: pb.DecideBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.DecideBatchResponse:
        self.calls += 1
        if self.calls > 1:
            await self._refuse(context)
        return pb.DecideBatchResponse(results=[self._refused(order) for order in request.orders])

    async def DecideStream(
        self, request_iterator: AsyncIterator[pb.DecideStreamRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.DecideStreamResponse]:
        async for request in request_iterator:
            self.calls += 1
            yield pb.DecideStreamResponse(result=self._refused(request.order))

    async def _refuse(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.calls += 1
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "60000"),))

    def _refused(self, order: pb.Order) -> pb.OrderResult:
        result = pb.OrderResult(order_ref=order.order_ref, error=pb.OrderError(code=8))
        result.error.retry_delay.FromSeconds(60)
        return result


async def test_a_caller_that_is_refused_asks_again_when_it_was_told_to() -> None:
    servicer = Full()
    async with serving(servicer) as stub:
        measured = await call_decide(stub, ORDERS, callers=4, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert servicer.calls == 4
    assert measured.errors == {"RESOURCE_EXHAUSTED": 4}


async def test_a_caller_of_batches_does_so_if_none_of_its_orders_is_decided() -> None:
    for calls in (1, 2):
        servicer = Full()
        servicer.calls = calls - 1  # the orders are refused, or the call is
        async with serving(servicer) as stub:
            measured = await call_decide_batch(stub, ORDERS, callers=1, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
        assert servicer.calls == calls + (calls > 1)
        assert measured.errors == {"RESOURCE_EXHAUSTED": 64}


async def test_an_order_of_a_stream_that_is_refused_keeps_its_place_until_it_may_be_sent_again() -> None:
    servicer = Full()
    async with serving(servicer) as stub:
        measured = await call_decide_stream(stub, ORDERS, callers=3, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert servicer.calls == 3
    assert measured.errors["RESOURCE_EXHAUSTED"] == 3


async def test_a_closed_loop_has_never_more_calls_under_way_than_callers() -> None:
    class Counting(EchoServicer):
        under_way = 0
        most = 0
        second = asyncio.Event()

        async def Decide(
            self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.DecideResponse:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if self.under_way > 1:
                self.second.set()
            await self.second.wait()  # the first call alone waits, until another one is under way, too
            await asyncio.sleep(0)  # lets the other calls in
            self.under_way -= 1
            return await super().Decide(request, context)

    servicer = Counting(RESPONSE)
    async with serving(servicer) as stub:
        await call_decide(stub, ORDERS, callers=5, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert 1 < servicer.most <= 5


async def test_answers_of_a_stream_are_matched_to_their_orders_in_any_order() -> None:
    servicer = Shuffling()
    async with serving(servicer) as stub:
        measured = await call_decide_stream(stub, ORDERS, callers=8, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert servicer.errors > 0
    assert measured.errors == {"INVALID_ARGUMENT": servicer.errors}
    assert len(measured.latencies) == servicer.answered - servicer.errors
    assert measured.sources == {"SECONDARY": len(measured.latencies)}


async def test_orders_of_a_stream_that_breaks_are_counted_as_unanswered() -> None:
    async with serving(Broken(RESPONSE)) as stub:
        measured = await call_decide_stream(stub, ORDERS, callers=8, seconds=5, deadline_seconds=PATIENCE_SECONDS)
    assert measured.seconds < 5
    assert len(measured.latencies) == 10
    assert 1 <= measured.errors[NO_REPLY] <= 8
    # Where a write was under way when the stream broke, grpc.aio reports its failure, INTERNAL, in the status's place.
    status = dict(measured.errors)
    del status[NO_REPLY]
    assert status in ({"UNAVAILABLE": 1}, {"INTERNAL": 1})


async def test_callers_show_the_credentials_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with server_with_a_token(RESPONSE, "secret") as server:
        (tmp_path / "ca.pem").write_bytes(server.ca)
        monkeypatch.setenv("PRETRADE_CLIENT_CA", str(tmp_path / "ca.pem"))
        monkeypatch.setenv("PRETRADE_CLIENT_TLS_NAME", server.name)
        async with connected(server.address) as stub:
            with pytest.raises(grpc.aio.AioRpcError, match="no token"):
                await stub.Decide(pb.DecideRequest(order=ORDERS[0]), timeout=PATIENCE_SECONDS)
        (tmp_path / "token").write_text("secret\n")
        monkeypatch.setenv("PRETRADE_CLIENT_TOKEN_FILE", str(tmp_path / "token"))
        async with connected(server.address) as stub:
            await stub.Decide(pb.DecideRequest(order=ORDERS[0]), timeout=PATIENCE_SECONDS)
            measured = await call_decide_stream(stub, ORDERS, callers=2, seconds=0.1, deadline_seconds=PATIENCE_SECONDS)
            assert (measured.errors, len(measured.latencies) > 0) == ({}, True)
        monkeypatch.delenv("PRETRADE_CLIENT_CA")
        with pytest.raises(RuntimeError, match="without TLS"):
            async with connected(server.address):
                pass


async def test_callers_with_a_token_do_not_keep_their_process_from_going_on(tmp_path: Path) -> None:
    """In a process of its own, in which a server that ends takes the last of gRPC with it, and which can be killed."""
    process = LeashedPopen.module("support.token_server", [str(tmp_path), "100"])
    try:
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def bench(*arguments: str) -> tuple[int, str]:
    """Runs the command; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadtest.benchmark.bench",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_every_order_of_a_batch_is_counted_once() -> None:
    class Choosy(EchoServicer):
        batches = 0

        async def DecideBatch(
            self, request: pb.DecideBatchRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.DecideBatchResponse:
            """One error, one answer to somebody else, one answer missing."""
            self.batches += 1
            response = await super().DecideBatch(request, context)
            response.results[0].error.code = 8
            response.results[1].order_ref = "another"
            del response.results[-1]
            return response

    servicer = Choosy(RESPONSE)
    async with serving(servicer) as stub:
        measured = await call_decide_batch(stub, ORDERS, callers=2, seconds=0.2, deadline_seconds=PATIENCE_SECONDS)
    assert servicer.batches > 0
    assert measured.errors == dict.fromkeys(("RESOURCE_EXHAUSTED", WRONG_REPLY, NO_REPLY), servicer.batches)
    assert measured.decisions == 61 * servicer.batches
    assert len(measured.latencies) == servicer.batches


@pytest.mark.parametrize(("method", "calls"), [("unary", 192), ("stream", 192), ("batch", 3)])
async def test_an_open_loop_sends_all_that_is_due(method: Method, calls: int) -> None:
    async with serving(EchoServicer(RESPONSE)) as stub:
        measured = await offer(stub, method, ORDERS, rate=640, seconds=0.3, deadline_seconds=PATIENCE_SECONDS)
    assert measured.errors == {}
    assert (measured.decisions, len(measured.latencies)) == (192, calls)
    assert min(measured.latencies) > 0


async def test_latency_in_an_open_loop_counts_from_when_a_call_was_due() -> None:
    class Stalling(EchoServicer):
        """Holds up the whole process once, the generator in it too."""

        stalled = False

        async def Decide(
            self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.DecideResponse:
            if not self.stalled:
                self.stalled = True
                time.sleep(0.25)  # noqa: ASYNC251 - that is the point
            return await super().Decide(request, context)

    async with serving(Stalling(RESPONSE)) as stub:
        measured = await offer(stub, "unary", ORDERS, rate=200, seconds=0.5, deadline_seconds=PATIENCE_SECONDS)
    assert measured.decisions == 100
    # Not one call waited, but some 50 were due meanwhile.
    assert sum(latency > 0.1 for latency in measured.latencies) > 25


@pytest.mark.long
async def test_the_benchmark_of_a_target_measures_every_load_and_writes_json(tmp_path: Path) -> None:
    json_path = tmp_path / "bench.json"
    options = ["--quick", "--seconds", "0.1", "--rounds", "2", "--deadline-ms", "10000", "--json", str(json_path)]
    async with echo_server(RESPONSE) as target:
        code, output = await bench("--target", target, *options)
    assert code == 0, output
    for column in ("dec./s", "p50", "p99", "errors"):
        assert column in output
    assert "/echo" not in output
    document = json.loads(json_path.read_text())
    assert document["target"] == target
    wanted = plan(quick=True, rounds=2, seconds=0.1, deadline_seconds=10.0)
    assert [each["load"] for each in document["results"]] == [load.name for load in (*wanted.closed, *wanted.opened)]
    for each in document["results"]:
        assert each["errors"] == 0
        assert each["decisions"] > 0
        assert each["scored"] == 1.0
        assert each["cpu_us"] is None


async def test_without_a_server_the_benchmark_says_so() -> None:
    code, output = await bench("--target", "127.0.0.1:1")
    assert code == 1
    assert "127.0.0.1:1 does not decide" in " ".join(output.split())
    assert "Traceback" not in output


async def test_a_server_that_decides_nothing_is_not_measured() -> None:
    class Refusing(EchoServicer):
        async def Decide(
            self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.DecideResponse:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "instrument: is not configured here")

    async with listening(Refusing(RESPONSE)) as target:
        code, output = await bench("--target", target)
    assert code == 1
    assert "INVALID_ARGUMENT: instrument: is not configured here" in " ".join(output.split())


async def test_the_echo_server_ends_with_its_parent() -> None:
    """Its standard input closes when whoever started it dies."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.benchmark.echo", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(RESPONSE.SerializeToString().hex().encode() + b"\n")
    assert int(await process.stdout.readline()) > 0
    process.stdin.close()
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await process.wait() == 0
