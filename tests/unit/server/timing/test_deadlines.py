"""Deadlines of many futures on one timer, on the event loop's own clock."""

from __future__ import annotations

import asyncio

from server.timing.deadlines import Deadlines


def clock() -> float:
    return asyncio.get_running_loop().time()


async def test_each_future_is_resolved_at_its_own_deadline_whatever_the_order_they_came_in() -> None:
    deadlines = Deadlines(clock)
    started = clock()
    ended: dict[str, float] = {}
    futures: dict[str, asyncio.Future[str]] = {}
    for name, after in (("second", 0.02), ("first", 0.01), ("third", 0.03)):
        futures[name] = asyncio.get_running_loop().create_future()
        deadlines.watch(futures[name], started + after, late="late")
        futures[name].add_done_callback(lambda _, name=name: ended.setdefault(name, clock()))  # type: ignore[misc]
    assert await asyncio.gather(*futures.values()) == ["late"] * 3
    assert list(ended) == ["first", "second", "third"]
    assert all(ended[name] >= started + after for name, after in (("first", 0.01), ("second", 0.02), ("third", 0.03)))
    assert len(deadlines) == 0


async def test_a_future_that_is_done_keeps_its_result_and_is_forgotten() -> None:
    deadlines = Deadlines(clock)
    answered, cancelled, last = (asyncio.get_running_loop().create_future() for _ in range(3))
    for future in (answered, cancelled):
        deadlines.watch(future, clock() + 0.005, late="late")
    deadlines.watch(last, clock() + 0.01, late="late")
    answered.set_result("in time")
    cancelled.cancel()
    assert await last == "late"
    assert answered.result() == "in time"
    assert cancelled.cancelled()
    assert len(deadlines) == 0


async def test_a_deadline_that_has_passed_ends_the_waiting_at_once() -> None:
    deadlines = Deadlines(clock)
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    deadlines.watch(future, clock() - 1.0, late=False)
    assert await future is False


async def test_futures_that_were_answered_do_not_pile_up_before_far_deadlines() -> None:
    deadlines = Deadlines(clock)
    waiting: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    deadlines.watch(waiting, clock() + 3_600.0, late=False)
    for _ in range(20_000):
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        deadlines.watch(future, clock() + 3_600.0, late=False)
        future.set_result(True)
    assert len(deadlines) <= 2_048
    assert not waiting.done()
    waiting.cancel()


async def test_what_is_done_is_let_go_when_the_next_one_is_watched() -> None:
    deadlines = Deadlines(clock)
    far = clock() + 3_600.0
    futures: list[asyncio.Future[bool]] = [asyncio.get_running_loop().create_future() for _ in range(100)]
    for number, future in enumerate(futures):
        deadlines.watch(future, far + number, late=False)
    for future in futures:
        future.set_result(True)
    assert len(deadlines) == 100
    last: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    deadlines.watch(last, far, late=False)
    assert len(deadlines) == 1
    last.cancel()
