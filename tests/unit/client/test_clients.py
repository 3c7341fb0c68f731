"""What both clients do, in each of the ways to ask; the servers are real, on loopback."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from opentelemetry import trace
from support.askers import CALLS, ORDER, ROOMY_SECONDS, SHARED, STREAM, WAYS, asking

from pretrade.client import (
    AsyncClient,
    CallError,
    Client,
    ClosedError,
    CredentialsError,
    DeadlineError,
    Decision,
    InvalidOrderError,
    KeyReusedError,
    Order,
    OverloadedError,
    UnavailableError,
)
from pretrade.client.asking import Asking, Batch
from pretrade.client.credentials import ClientCredentials
from pretrade.client.errors import error_of_order
from pretrade.client.testing import FakeServer, decision
from pretrade.decision.v1 import decision_pb2 as pb

CODES: Final = grpc.StatusCode
TRACE: Final = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def other() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def order(**changes: object) -> Order:
    fields: dict[str, object] = {"instrument": "BTCUSDT.SIM", "side": "buy", "quantity": 0.05, "strategy": "twap"}
    return Order(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_a_decision_is_read_in_words(server: FakeServer, way: str) -> None:
    server.answer("NO_TRADE", score=0.4, threshold=0.7, source="SECONDARY", reasons=["SCORE_BELOW_THRESHOLD"],
                  degradations=["PRIMARY_TIMEOUT"])  # fmt: skip
    with asking(way, server.address) as ask:
        found = ask(order(order_ref="mine", limit_price=60_000.0))
    assert (found.trades, found.abstains, found.action, found.source) == (False, False, "NO_TRADE", "SECONDARY")
    assert (found.score, found.threshold, found.order_ref, found.server) == (0.4, 0.7, "mine", server.address)
    assert (found.reasons, found.degradations) == (("SCORE_BELOW_THRESHOLD",), ("PRIMARY_TIMEOUT",))
    (asked,) = server.orders
    assert (asked.instrument, asked.side, asked.quantity) == ("BTCUSDT.SIM", pb.SIDE_BUY, 0.05)
    assert (asked.limit_price, asked.strategy, asked.order_ref) == (60_000.0, "twap", "mine")


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_was_cut_off_is_made_again_under_its_key(server: FakeServer, way: str) -> None:
    with asking(way, server.address) as ask:
        ask(ORDER)
        server.fail(CODES.UNAVAILABLE, times=2)
        server.fail(CODES.CANCELLED)
        ask(ORDER)
    first, second = (one.idempotency_key for one in server.orders)
    assert first
    assert first != second, "every order has a key of its own"


@pytest.mark.parametrize("way", CALLS)
def test_the_callers_own_key_is_kept_and_one_of_another_order_is_refused(server: FakeServer, way: str) -> None:
    with asking(way, server.address) as ask:
        first = ask(order(idempotency_key="k"))
        assert ask(order(idempotency_key="k")) == first
        with pytest.raises(KeyReusedError):
            ask(order(idempotency_key="k", quantity=7.0))
    assert {one.idempotency_key for one in server.orders} == {"k"}


@pytest.mark.parametrize("way", WAYS)
def test_without_keys_a_call_that_was_cut_off_is_not_made_again(server: FakeServer, way: str) -> None:
    server.fail(CODES.UNAVAILABLE)
    with asking(way, server.address, idempotency_keys=False) as ask:
        with pytest.raises(UnavailableError):
            ask(ORDER)
        server.fail(CODES.RESOURCE_EXHAUSTED, retry_delay_seconds=0.001)
        assert ask(ORDER).trades, "a refusal was no decision"
    assert [one.idempotency_key for one in server.orders] == [""]


@pytest.mark.parametrize("way", WAYS)
def test_a_refusal_with_a_delay_is_waited_for(server: FakeServer, way: str) -> None:
    full = OverloadedError("full", CODES.RESOURCE_EXHAUSTED, retry_delay_seconds=0.01)
    refusals = iter([full, full])

    def decide(asked: pb.Order) -> pb.Decision:
        for refusal in refusals:
            raise refusal
        return decision()

    server.decide_by(decide)
    with asking(way, server.address) as ask:
        assert ask(ORDER).trades
    assert len(server.orders) == 3
    assert len({one.order_ref for one in server.orders}) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_does_not_answer_costs_no_more_than_the_deadline(server: FakeServer, way: str) -> None:
    server.hang()
    with asking(way, server.address) as ask, pytest.raises(DeadlineError, match="deadline_seconds"):
        ask(ORDER, deadline_seconds=0.1)
    server.resume()


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_not_there_is_reported_with_its_address(server: FakeServer, way: str) -> None:
    address = server.address
    server.stop()
    # Who shares a call may be told at the end of its own deadline, before the call says why it fails.
    possible = (UnavailableError, DeadlineError) if way in SHARED else UnavailableError
    with asking(way, address) as ask, pytest.raises(possible) as raised:
        ask(ORDER, deadline_seconds=0.5)
    if isinstance(raised.value, DeadlineError):
        return
    assert address in str(raised.value)
    assert "Is the server up" in str(raised.value)


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_was_killed_and_started_again_answers_the_same_call(server: FakeServer, way: str) -> None:
    with asking(way, server.address) as ask:
        ask(ORDER)
        server.hang()
        waits = threading.Event()

        def restart() -> None:
            waits.wait(ROOMY_SECONDS)
            server.stop()
            server.resume()
            server.start()

        with ThreadPoolExecutor(1) as pool:
            restarted = pool.submit(restart)
            waits.set()
            assert ask(ORDER).trades
            restarted.result()


@pytest.mark.parametrize("way", WAYS)
def test_the_next_server_answers_while_the_first_is_away_and_until_it_is_well(
    server: FakeServer, other: FakeServer, way: str
) -> None:
    other.answer("NO_TRADE")
    with asking(way, server.address, other.address) as ask:
        assert ask(ORDER).trades
        server.stop()
        assert [ask(ORDER).trades for _ in range(5)] == [False] * 5
        server.start()
        answers = (ask(ORDER).trades for _ in range(100_000))
        assert any(answers), "the first one has its orders again"


@pytest.mark.parametrize("way", WAYS)
def test_a_first_server_that_hangs_costs_half_of_the_deadline_and_then_nothing(
    server: FakeServer, other: FakeServer, way: str
) -> None:
    other.answer("NO_TRADE")
    with asking(way, server.address, other.address) as ask:
        ask(ORDER, deadline_seconds=ROOMY_SECONDS)
        server.hang()
        assert {ask(ORDER, deadline_seconds=2.0).trades for _ in range(3)} == {False}
        began = time.monotonic()
        assert {ask(ORDER, deadline_seconds=ROOMY_SECONDS).trades for _ in range(5)} == {False}
        assert time.monotonic() - began < ROOMY_SECONDS / 2, "it is not asked any more"
        server.resume()


@pytest.mark.parametrize("way", [*CALLS, *SHARED])
def test_an_order_that_only_reduces_says_so_in_the_metadata(server: FakeServer, way: str) -> None:
    with asking(way, server.address) as ask:
        ask(order(reduce_only=True))
        ask(ORDER)
    assert ["pretrade-reduce-only" in one for one in server.metadata] == [True, False]


@pytest.mark.parametrize("way", [*CALLS, *SHARED])
def test_the_trace_goes_with_the_call(server: FakeServer, way: str) -> None:
    state = trace.TraceState([("vendor", "2")])
    ids = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
    context = trace.SpanContext(*ids, False, trace.TraceFlags(1), state)
    with asking(way, server.address) as ask:
        ask(ORDER, traceparent="00-mine", tracestate="vendor=1")
        ask(ORDER)
        with pytest.raises(ValueError, match="tracestate"):
            ask(ORDER, tracestate="vendor=1")
        with trace.use_span(trace.NonRecordingSpan(context)):
            ask(ORDER)
    shown = [(one.get("traceparent"), one.get("tracestate")) for one in server.metadata]
    assert shown == [("00-mine", "vendor=1"), (None, None), (TRACE, "vendor=2")]


@pytest.mark.parametrize("way", WAYS)
def test_the_token_is_read_for_every_call(server: FakeServer, tmp_path: Path, way: str) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    with asking(way, server.address, token_file=token) as ask:
        ask(ORDER)
        token.write_text("second\n")
        ask(ORDER)
        shown = [one["authorization"] for one in server.metadata]
        assert shown == ["Bearer first", "Bearer first" if way == STREAM else "Bearer second"]
        token.unlink()
        if way != STREAM:
            with pytest.raises(CredentialsError, match="token"):
                ask(ORDER)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_is_not_sent_over_a_network_in_the_open(way: str) -> None:
    with pytest.raises(CredentialsError, match="without TLS"), asking(way, "192.0.2.1:7001", token="secret"):
        pass


def test_the_environment_names_what_is_not_given(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    monkeypatch.setenv("PRETRADE_CLIENT_TOKEN", "from-outside")
    with asking(CALLS[0], server.address) as ask:
        ask(ORDER)
    with asking(CALLS[0], server.address, token="given") as ask:
        ask(ORDER)
    assert [one["authorization"] for one in server.metadata] == ["Bearer from-outside", "Bearer given"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_is_a_positive_number(server: FakeServer, seconds: float) -> None:
    with pytest.raises(ValueError, match="deadline_seconds"), asking(CALLS[0], server.address) as ask:
        ask(ORDER, deadline_seconds=seconds)


def test_an_orders_own_timeout_bounds_its_call(server: FakeServer) -> None:
    server.hang()
    hasty = order().message()
    hasty.timeout.FromMilliseconds(50)
    with asking(CALLS[0], server.address) as ask, pytest.raises(DeadlineError):
        ask(hasty)
    assert hasty == order().message() or not hasty.idempotency_key, "the callers message is left as it is"
    server.resume()


def test_a_side_that_is_none_is_refused_at_once() -> None:
    with asking(CALLS[0], "127.0.0.1:1") as ask, pytest.raises(ValueError, match="'buy' or 'sell'"):
        ask(order(side="hold"))


def test_an_explanation_is_there_when_it_was_asked_for(server: FakeServer) -> None:
    with Client.connect(server.address) as client:
        assert client.decide(ORDER).explanation is None
        explained = client.decide(ORDER, explain=True).explanation
    assert explained is not None
    assert explained.status == pb.EXPLANATION_STATUS_NO_MODEL


def decide_batch(way: str, address: str, orders: list[Order], **options: Any) -> list[Decision | CallError]:
    if way == CALLS[0]:
        with Client.connect(address) as client:
            return client.decide_batch(orders, **options)

    async def ask() -> list[Decision | CallError]:
        async with AsyncClient.connect(address) as client:
            return await client.decide_batch(orders, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize("way", CALLS)
def test_a_batch_has_a_result_for_each_order_in_their_order(server: FakeServer, way: str) -> None:
    orders = [order(order_ref=f"{number}", quantity=0.0 if number == 1 else 1.0) for number in range(3)]
    first, second, third = decide_batch(way, server.address, orders)
    assert isinstance(first, Decision)
    assert isinstance(third, Decision)
    assert (first.order_ref, third.order_ref) == ("0", "2")
    assert isinstance(second, InvalidOrderError)
    assert (second.field, second.reason) == ("quantity", "INVALID_QUANTITY")


@pytest.mark.parametrize("way", CALLS)
def test_more_orders_than_a_call_may_have_go_in_several(server: FakeServer, way: str) -> None:
    results = decide_batch(way, server.address, [ORDER] * 1_030, deadline_seconds=ROOMY_SECONDS)
    assert sum(isinstance(one, Decision) for one in results) == 1_030
    assert len(server.metadata) == 2
    assert decide_batch(way, server.address, []) == []


@pytest.mark.parametrize("way", CALLS)
def test_orders_of_a_batch_that_were_refused_for_the_moment_are_asked_for_again(server: FakeServer, way: str) -> None:
    full = OverloadedError("full", CODES.RESOURCE_EXHAUSTED, retry_delay_seconds=0.01)
    refused: set[str] = set()

    def decide(asked: pb.Order) -> pb.Decision:
        if asked.order_ref == "b" and asked.order_ref not in refused:
            refused.add(asked.order_ref)
            raise full
        return decision()

    server.decide_by(decide)
    orders = [order(order_ref=ref) for ref in "abc"]
    results = decide_batch(way, server.address, orders, deadline_seconds=ROOMY_SECONDS)
    assert [one.order_ref for one in results if isinstance(one, Decision)] == ["a", "b", "c"]
    assert [one.order_ref for one in server.orders] == ["a", "b", "c", "b"]


def test_a_batch_whose_second_call_fails_keeps_what_the_first_one_had() -> None:
    asking_with = Asking(["a:1"], ClientCredentials())
    batch = Batch(asking_with, [ORDER] * 1_025)
    call = asking_with.policy.begin(1.0, repeatable=True)
    request = batch.request()
    batch.take(pb.DecideBatchResponse(results=[pb.OrderResult(decision=decision()) for _ in request.orders]), call)
    batch.request()
    lost = UnavailableError("gone", CODES.UNAVAILABLE)
    batch.failed(lost)
    assert batch.results[-1] is lost
    assert sum(isinstance(one, Decision) for one in batch.results) == 1_024
    assert batch.ended


def test_an_error_of_an_order_names_code_reason_and_field() -> None:
    found = error_of_order(pb.OrderError(code=3, reason="INVALID_QUANTITY", field="quantity", message="must be > 0"))
    assert str(found) == "INVALID_ARGUMENT (INVALID_QUANTITY): must be > 0."


def test_a_client_that_was_closed_says_so(server: FakeServer) -> None:
    client = Client.connect(server.address)
    client.decide(ORDER)
    client.close()
    with pytest.raises(ClosedError, match="the client was closed"):
        client.decide(ORDER)
    with pytest.raises(ClosedError, match="the client was closed"):
        client.shared().decide(ORDER)


async def test_an_asyncio_client_that_was_closed_says_so(server: FakeServer) -> None:
    client = AsyncClient.connect(server.address)
    stream = client.stream()
    await client.decide(ORDER)
    await stream.close()
    with pytest.raises(ClosedError, match="the stream was closed"):
        await stream.decide(ORDER)
    await client.close()
    with pytest.raises(ClosedError, match="the client was closed"):
        await client.decide(ORDER)


def test_the_child_of_a_fork_is_told_to_connect_anew(server: FakeServer) -> None:
    asking_with = Asking([server.address], ClientCredentials())
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, asking_with.why_not.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"forked" in os.read(reading, 1_000)
    os.close(reading)
    os.close(writing)
    assert not asking_with.why_not


def test_each_server_says_how_it_is(server: FakeServer, other: FakeServer) -> None:
    other.is_healthy = False
    with FakeServer() as gone:
        nowhere = gone.address
    addresses = [server.address, other.address, nowhere]
    expected = dict(zip(addresses, ["SERVING", "NOT_SERVING", "UNREACHABLE"], strict=True))
    with Client.connect(*addresses) as client:
        assert client.health() == expected

    async def ask() -> object:
        async with AsyncClient.connect(*addresses) as client:
            return await client.health()

    assert asyncio.run(ask()) == expected


def test_many_threads_share_one_client(server: FakeServer) -> None:
    with Client.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client, ThreadPoolExecutor(16) as pool:
        refs = [f"{number}" for number in range(200)]
        found = list(pool.map(lambda ref: client.decide(order(order_ref=ref)).order_ref, refs))
    assert found == refs
