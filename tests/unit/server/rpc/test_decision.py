"""How the orders of calls, batches and streams are taken up, and who waits when there are too many."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import pytest
from support.request_path import PATIENT, RequestPath, order, request_path
from support.waiting import until

from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import admission
from server.errors import OverloadedError
from server.rpc.call_context import CallContexts


async def test_an_order_without_a_deadline_waits_for_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 2.0
        p.gate.open = asyncio.Semaphore(0)
        tasks = [asyncio.create_task(p.decide(order("first")))]
        await until(lambda: p.admission.in_flight == 1)
        tasks.append(asyncio.create_task(p.decide(order("waits"))))
        await until(lambda: p.admission.waiting == 1)
        tasks.append(asyncio.create_task(p.decide(order("with a deadline"), timeout_seconds=60.0)))
        await until(lambda: p.admission.in_flight == 2)
        own = order("with a deadline of its own")
        own.timeout.FromSeconds(60)
        reducing = order("reduces", reduce_only=True)
        for message, timeout_seconds in ((order("late"), 60.0), (own, None), (reducing, None)):
            with pytest.raises(OverloadedError):
                await p.decide(message, timeout_seconds)
        assert p.admission.waiting == 1
        for _ in tasks:
            p.gate.open.release()
        decisions = await asyncio.gather(*tasks)
    assert [decision.order_ref for decision in decisions] == ["first", "waits", "with a deadline"]


def plain_calls(p: RequestPath, orders: int) -> tuple[list[bytes], list[float | None]]:
    """The requests of calls with a plain order each, and until when their callers wait: for a minute."""
    requests = [pb.DecideRequest(order=order(f"{number}")).SerializeToString() for number in range(orders)]
    return requests, [p.clock() + 60.0 for _ in requests]


async def test_calls_that_come_together_are_begun_together_but_for_those_with_something_of_their_own(
    tmp_path: Path,
) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        if p.servicer._reader.plain(pb.DecideRequest(order=order("one")).SerializeToString()) is None:
            pytest.skip("nothing is read at once where nothing is compiled")
        p.servicer._orders._contexts = CallContexts(one_in=3)
        requests, deadlines = plain_calls(p, 8)
        timed, keyed, reducing = order("timed"), order("keyed", idempotency_key="k"), order("r", reduce_only=True)
        timed.timeout.FromSeconds(60)
        for place, one_order in enumerate((timed, keyed), start=2):
            requests[place] = pb.DecideRequest(order=one_order).SerializeToString()
        requests[0] = b"no message"
        deadlines[1] = p.clock()
        requests[4] = pb.DecideRequest(order=reducing).SerializeToString()
        deadlines[5] = None
        begun = p.servicer.begin_together(requests, deadlines, p.clock())
        assert [one is not None for one in begun] == [False] * 4 + [True] * 4
        assert p.admission.in_flight == 4
        for one in begun[4:]:
            assert one is not None
            reply = p.servicer.reply(await one[1])
            assert pb.DecideResponse.FromString(reply.wire).decision.order_ref == one[0].order_ref
            p.servicer.sent(reply)
        assert p.metrics.alone["trace"] == 1, "the third that was begun is chosen to be traced"
        assert p.admission.in_flight == 0


async def test_calls_that_come_together_wait_no_longer_than_each_may(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        requests, deadlines = plain_calls(p, 3)
        deadlines[0], deadlines[2] = p.clock() + 2.0, None
        for one, seconds in zip(
            p.servicer.begin_together(requests, deadlines, p.clock()), (2.0, 10.0, 10.0), strict=True
        ):
            if one is None:
                pytest.skip("nothing is read at once where nothing is compiled")
            decision = pb.DecideResponse.FromString(p.servicer.reply(await one[1]).wire).decision
            assert decision.budget.allowed_us == pytest.approx(seconds * 1e6, rel=0.01), "the server's cap is ten"


@pytest.mark.parametrize(("limit", "are_begun"), [(8.0, True), (6.0, False)], ids=["places for all", "for fewer"])
async def test_calls_without_a_deadline_that_come_together_leave_their_places_to_those_that_cannot_wait(
    tmp_path: Path, limit: float, are_begun: bool
) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = limit  # three quarters of it are for orders that can wait
        requests, deadlines = plain_calls(p, 6)
        deadlines[1] = deadlines[4] = None
        begun = p.servicer.begin_together(requests, deadlines, p.clock())
        if begun[0] is None:
            pytest.skip("nothing is read at once where nothing is compiled")
        assert [one is not None for one in begun] == [True, are_begun, True, True, are_begun, True]
        for one in begun:
            if one is not None:
                p.servicer.sent(p.servicer.reply(await one[1]))


async def test_where_not_all_calls_that_come_together_find_a_place_none_is_begun(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 4.0
        requests, deadlines = plain_calls(p, 5)
        assert p.servicer.begin_together(requests, deadlines, p.clock()) == [None] * 5
        assert (p.admission.in_flight, p.admission.shed) == (0, 0)


@pytest.mark.parametrize(("orders", "weight"), [(1, 1), (3, 3), (200, 200), (300, 256)])
async def test_a_batch_weighs_as_much_as_its_orders_that_are_decided_at_once(
    tmp_path: Path, orders: int, weight: int
) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        call = p.call()
        assert call.orders == 1
        reply = await p.servicer.DecideBatch(
            pb.DecideBatchRequest(orders=[order(f"{number}") for number in range(orders)]), call
        )
        p.servicer.sent(reply)
        assert call.orders == weight


def batch_of(p: RequestPath, orders: int) -> asyncio.Task[Any]:
    """A call with so many orders."""
    request = pb.DecideBatchRequest(orders=[order(f"{number}") for number in range(orders)])
    return asyncio.create_task(p.servicer.DecideBatch(request, p.call(60.0)))


def refs(reply: Any) -> list[str]:
    """Of the decisions in the reply to a batch."""
    return [result.decision.order_ref for result in pb.DecideBatchResponse.FromString(reply.wire).results]


async def test_the_next_orders_of_a_batch_begin_while_those_before_them_wait(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.gate.open = asyncio.Semaphore(0)
        call = batch_of(p, 200)
        await until(lambda: p.gate.asked == 200)
        assert p.admission.in_flight == 200
        for _ in range(200):
            p.gate.open.release()
        reply = await call
        p.servicer.sent(reply)
    assert refs(reply) == [f"{number}" for number in range(200)]


async def test_where_places_are_few_the_next_orders_of_a_batch_wait_for_those_before_them(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 200.0  # of which 135 are for orders that can wait, and 90 for others of their call
        p.gate.open = asyncio.Semaphore(0)
        call = batch_of(p, 192)
        for begun, some in ((135, 135), (192, 57)):
            await until(lambda begun=begun: p.gate.asked == begun)  # type: ignore[misc]
            assert p.admission.in_flight == some
            for _ in range(some):
                p.gate.open.release()
        reply = await call
        p.servicer.sent(reply)
        assert p.admission.shed == 0
    assert refs(reply) == [f"{number}" for number in range(192)]


async def test_a_batch_that_finds_fewer_places_is_decided_piece_by_piece(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 20.0
        calls = [batch_of(p, 100) for _ in range(3)]
        for call in calls:
            reply = await call
            p.servicer.sent(reply)
            assert refs(reply) == [f"{number}" for number in range(100)]
        assert (p.admission.shed, p.admission.waiting, p.admission.in_flight) == (0, 0, 0)


async def test_a_batch_without_a_place_for_any_of_its_orders_is_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 0.01)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 1.0
        p.gate.open = asyncio.Semaphore(0)
        first = batch_of(p, 1)
        await until(lambda: p.gate.asked == 1)
        with pytest.raises(OverloadedError) as caught:
            await batch_of(p, 100)
        assert caught.value.retry_after_seconds
        assert p.admission.shed == 100
        p.gate.open.release()
        p.servicer.sent(await first)


def mixed_batch_of(p: RequestPath, orders: int, reducing: Collection[int]) -> asyncio.Task[Any]:
    """A call with so many orders, of which those at some places can only reduce an exposure."""
    mixed = [order(f"{number}", reduce_only=number in reducing) for number in range(orders)]
    return asyncio.create_task(p.servicer.DecideBatch(pb.DecideBatchRequest(orders=mixed), p.call(60.0)))


@pytest.mark.parametrize("reducing", [(0,), (3,), (6,), (1, 5)])
async def test_orders_of_a_batch_that_only_reduce_do_not_wait_with_the_others_of_which_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reducing: tuple[int, ...]
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 20.0  # two for those that reduce, and 13 for those that wait
        p.gate.open = asyncio.Semaphore(0)
        first = batch_of(p, 18)
        await until(lambda: p.gate.asked == 13)
        second = mixed_batch_of(p, 7, reducing)
        await until(lambda: p.gate.asked == 13 + len(reducing))
        await until(lambda: p.admission.waiting == 1)
        for _ in range(100):
            p.gate.open.release()
        for call in (first, second):
            p.servicer.sent(await call)
        assert (p.admission.shed, p.admission.in_flight, p.admission.waiting) == (0, 0, 0)
    assert refs(await second) == [f"{number}" for number in range(7)]


async def test_a_batch_that_waits_may_have_more_orders_that_only_reduce_than_one_slice(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 60.0
        p.gate.open = asyncio.Semaphore(0)
        first = batch_of(p, 54)
        await until(lambda: p.gate.asked == 40)
        second = mixed_batch_of(p, 700, (0, 255, 256, 300, 699))
        await until(lambda: p.gate.asked == 42)
        for _ in range(1_000):
            p.gate.open.release()
        for call in (first, second):
            p.servicer.sent(await call)
        assert (p.admission.shed, p.admission.in_flight) == (0, 0)
    assert refs(await second) == [f"{number}" for number in range(700)]


async def test_a_batch_that_has_waited_long_enough_keeps_its_orders_that_only_reduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 0.01)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 2.0
        p.gate.open = asyncio.Semaphore(0)
        first = asyncio.create_task(p.decide(order("first"), timeout_seconds=60.0))
        other = asyncio.create_task(p.decide(order("other"), timeout_seconds=60.0))
        await until(lambda: p.gate.asked == 2)
        p.admission._limit = 3.0  # all places of ordinary orders are taken
        second = mixed_batch_of(p, 4, (2,))
        await until(lambda: p.admission.shed == 3)
        for _ in range(3):
            p.gate.open.release()
        await asyncio.gather(first, other)
        p.servicer.sent(await second)
        results = pb.DecideBatchResponse.FromString((await second).wire).results
    assert [result.HasField("decision") for result in results] == [False, False, True, False]
    assert {result.error.reason for result in results if result.HasField("error")} == {"TOO_MANY_IN_FLIGHT"}


async def test_orders_that_only_reduce_have_their_places_where_nobody_else_may_even_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._settings = p.admission._settings.model_copy(update={"max_in_flight": 20})
        p.admission._limit = 20.0  # two for those that reduce
        p.gate.open = asyncio.Semaphore(0)
        others = [asyncio.create_task(p.decide(order(f"{number}"), timeout_seconds=60.0)) for number in range(18)]
        await until(lambda: p.gate.asked == 18)
        waiting = [asyncio.create_task(p.decide(order(f"waits-{number}"))) for number in range(2)]
        await until(lambda: p.admission.waiting == 2)
        first, second = mixed_batch_of(p, 2, (0,)), mixed_batch_of(p, 300, (299,))
        await until(lambda: p.gate.asked == 20)
        for _ in range(400):
            p.gate.open.release()
        replies = [await first, await second]
        for reply in replies:
            p.servicer.sent(reply)
        await asyncio.gather(*others, *waiting)
    decided = [pb.DecideBatchResponse.FromString(reply.wire).results for reply in replies]
    assert [result.HasField("decision") for result in decided[0]] == [True, False]
    assert [result.HasField("decision") for result in decided[1]][-1], "of another slice"


async def test_orders_that_only_reduce_do_not_wait_for_those_of_their_batch_that_found_the_last_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 20.0  # two for those that reduce, and 13 for those that wait
        p.gate.open = asyncio.Semaphore(0)
        first = batch_of(p, 10)
        await until(lambda: p.gate.asked == 10)
        asked: list[str] = []
        answer = p.gate.answer

        async def noted(case: Case) -> Answer | None:
            asked.append(case.order.order_ref)
            return await answer(case)

        monkeypatch.setattr(p.gate, "answer", noted)
        second = mixed_batch_of(p, 12, (11,))
        await until(lambda: p.gate.asked == 13)
        assert asked == ["11", "0", "1"]
        for _ in range(100):
            p.gate.open.release()
        for call in (first, second):
            p.servicer.sent(await call)
        assert p.admission.shed == 0
    assert refs(await second) == [f"{number}" for number in range(12)]


async def test_a_batch_takes_up_no_more_orders_that_only_reduce_at_a_time_than_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    # So many orders can take longer than the others' ten seconds where the machine has much other work.
    async with request_path(tmp_path, PATIENT.model_copy(update={"cap_seconds": 120.0})) as p:
        p.admission._limit = 512.0
        p.gate.open = asyncio.Semaphore(0)
        others = [batch_of(p, 256), batch_of(p, 89)]
        await until(lambda: p.admission.in_flight == 345)
        second = mixed_batch_of(p, 1_024, [place for place in range(1_024) if place % 2])
        await until(lambda: p.admission.in_flight == 473)
        for _ in range(3_000):
            p.gate.open.release()
        for call in (*others, second):
            p.servicer.sent(await call)
        assert (p.admission.shed, p.admission.in_flight) == (0, 0)
    assert refs(await second) == [f"{number}" for number in range(1_024)]


async def test_a_caller_that_leaves_while_its_batch_waits_leaves_nothing_under_way(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 20.0
        p.gate.open = asyncio.Semaphore(0)
        first = batch_of(p, 13)
        await until(lambda: p.gate.asked == 13)
        second = mixed_batch_of(p, 7, (3,))
        await until(lambda: p.gate.asked == 14)
        second.cancel()
        await until(lambda: p.admission.in_flight == 13)
        for _ in range(13):
            p.gate.open.release()
        p.servicer.sent(await first)
        assert (p.admission.in_flight, p.metrics.cancelled) == (0, 1)


async def test_another_call_has_its_turn_before_a_batch_is_taken_up_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        taken_up: list[str] = []
        answer = p.gate.answer

        async def noted(case: Case) -> Answer | None:
            taken_up.append(case.order.order_ref)
            return await answer(case)

        monkeypatch.setattr(p.gate, "answer", noted)
        batch, unary = batch_of(p, 320), asyncio.create_task(p.decide(order("unary")))
        p.servicer.sent(await batch)
        await unary
    assert taken_up.index("unary") <= 256


async def test_orders_of_a_stream_that_come_together_are_taken_up_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    async with request_path(tmp_path, PATIENT) as p:
        take_over = p.dataplane._take_over

        def noted(cases: Any) -> None:
            together.append(len(cases))
            take_over(cases)

        monkeypatch.setattr(p.dataplane, "_take_over", noted)
        answers = p.stream(*(order(f"{number}") for number in range(50)))
        found = {pb.DecideStreamResponse.FromString((await anext(answers)).wire).result.order_ref for _ in range(50)}
        await answers.aclose()
    assert together == [50]
    assert found == {f"{number}" for number in range(50)}


async def results_of(answers: Any, orders: int) -> list[pb.OrderResult]:
    """So many results of a stream, which then ends."""
    async with contextlib.aclosing(answers):
        return [pb.DecideStreamResponse.FromString((await anext(answers)).wire).result for _ in range(orders)]


@pytest.mark.parametrize("own_seconds", [None, 60], ids=["the server's cap", "a timeout of its own"])
async def test_a_stream_without_places_is_read_as_fast_as_it_is_decided_and_refused_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_seconds: int | None
) -> None:
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 60.0)
    orders = [order(f"{number}") for number in range(12)]
    for each in orders:
        if own_seconds is not None:
            each.timeout.FromSeconds(own_seconds)
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 5.0  # of which three are for orders that can wait
        p.gate.open = asyncio.Semaphore(0)
        found = asyncio.create_task(results_of(p.stream(*orders), len(orders)))
        for begun in range(3, 13, 3):
            await until(lambda begun=begun: p.gate.asked == begun)  # type: ignore[misc]
            assert p.admission.in_flight == 3
            for _ in range(3):
                p.gate.open.release()
        assert [result.HasField("decision") for result in await found] == [True] * 12
        assert p.admission.shed == 0


async def test_an_order_of_a_stream_waits_for_a_place_for_half_of_its_time(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 2.0
        p.gate.open = asyncio.Semaphore(0)
        hurried = order("hurried")
        hurried.timeout.FromMilliseconds(20)
        answers = p.stream(order("first"), order("second"), hurried)
        first = asyncio.create_task(results_of(answers, 1))
        (refused,) = await first
        assert (refused.order_ref, p.admission.shed) == ("hurried", 1)
        assert p.gate.asked == 2


async def test_an_order_of_a_stream_that_reduces_waits_for_no_place(tmp_path: Path) -> None:
    async with request_path(tmp_path, PATIENT) as p:
        p.admission._limit = 11.0
        p.gate.open = asyncio.Semaphore(0)
        ordinary = [asyncio.create_task(p.decide(order(f"{number}"), timeout_seconds=60.0)) for number in range(10)]
        await until(lambda: p.gate.asked == 10)
        assert p.admission.must_wait
        found = asyncio.create_task(results_of(p.stream(order("reduces", reduce_only=True)), 1))
        await until(lambda: p.gate.asked == 11)
        for _ in range(11):
            p.gate.open.release()
        assert (await found)[0].HasField("decision")
        await asyncio.gather(*ordinary)


async def test_a_stream_reads_an_order_when_there_is_room_for_it(tmp_path: Path) -> None:
    read: list[str] = []

    async def orders() -> AsyncIterator[pb.Order]:
        for name in ("one", "two"):
            read.append(name)
            yield order(name)

    async with request_path(tmp_path, PATIENT, max_in_flight=1) as p:
        p.gate.open = asyncio.Semaphore(0)
        answers: Any = p.servicer.DecideStream(orders(), p.call())
        found = asyncio.create_task(results_of(answers, 2))
        await until(lambda: p.gate.asked == 1)
        assert read == ["one"]
        p.gate.open.release()
        await until(lambda: p.gate.asked == 2)
        p.gate.open.release()
        assert [result.order_ref for result in await found] == ["one", "two"]


async def test_what_ends_the_orders_of_a_stream_is_said_after_the_answers_that_are_due(tmp_path: Path) -> None:
    async def orders() -> AsyncIterator[pb.Order]:
        yield order("one")
        yield order("two")
        raise OverloadedError("TOO_MANY", "no more")

    async with request_path(tmp_path, PATIENT) as p:
        answers: Any = p.servicer.DecideStream(orders(), p.call())
        found = [pb.DecideStreamResponse.FromString((await anext(answers)).wire).result.order_ref for _ in range(2)]
        with pytest.raises(OverloadedError):
            await anext(answers)
    assert found == ["one", "two"]
