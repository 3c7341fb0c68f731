"""A promise is used as a future is, and those that end together tell their callers in one turn."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.decision.promise import Promise, Promises

DECIDED: Any = object()


class Told:
    """What was told, in its order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.promises: Promises[Any] = Promises(lambda ended: self.events.append([one.case for one in ended]))

    def promise(self, name: Any) -> Promise[Any]:
        made: Promise[Any] = Promise(self.promises)
        made.case = name
        return made


async def test_those_that_end_in_one_turn_are_told_together_and_before_their_callers_go_on() -> None:
    told = Told()
    first, second = told.promise("first"), told.promise("second")

    async def wait() -> None:
        told.events.append(await first)

    waiting = asyncio.create_task(wait())
    second.add_done_callback(told.events.append)
    await asyncio.sleep(0)
    first.set_result(DECIDED)
    second.set_exception(ValueError("none"))
    assert told.events == [], "nothing is called while they end"
    assert first.done()
    assert second.done()
    await waiting
    assert told.events == [["first", "second"], second, DECIDED]
    with pytest.raises(ValueError, match="none"):
        await second
    assert isinstance(second.exception(), ValueError)
    assert first.exception() is None


async def test_many_decisions_are_told_as_if_each_had_come_by_itself() -> None:
    told, other = Told(), object()
    awaited, called, alone = told.promise("awaited"), told.promise("called"), told.promise("alone")

    async def wait() -> None:
        told.events.append(await awaited)

    waiting = asyncio.create_task(wait())
    called.add_done_callback(told.events.append)
    called.add_done_callback(lambda _: told.events.append("called again"))
    await asyncio.sleep(0)
    told.promises.decided([awaited, called], [DECIDED, other])  # type: ignore[list-item]
    alone.set_result(DECIDED)
    assert told.events == [], "nothing is called while they end"
    await waiting
    assert told.events == [["awaited", "called", "alone"], called, "called again", DECIDED]
    assert (awaited.result(), called.result()) == (DECIDED, other)
    with pytest.raises(asyncio.InvalidStateError):
        told.promises.decided([called], [DECIDED])


async def test_one_that_has_ended_is_awaited_at_once_and_calls_in_the_next_turn() -> None:
    told = Told()
    ended = told.promise("ended")
    ended.set_result(DECIDED)
    ended.add_done_callback(told.events.append)
    assert await ended is DECIDED
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told.events == [["ended"], ended]


async def test_it_ends_once() -> None:
    told = Told()
    promise = told.promise("one")
    for open_yet in (promise.result, promise.exception):
        with pytest.raises(asyncio.InvalidStateError):
            open_yet()
    assert promise.cancel()
    assert promise.cancelled()
    assert not promise.cancel()
    with pytest.raises(asyncio.InvalidStateError):
        promise.set_result(DECIDED)
    for ended in (promise.result, promise.exception):
        with pytest.raises(asyncio.CancelledError):
            ended()


async def test_a_caller_that_is_cancelled_leaves_the_promise_to_be_given_up() -> None:
    promise = Told().promise("one")

    async def wait() -> None:
        await promise

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    assert not promise.done()
    promise.set_result(DECIDED)
    assert promise.result() is DECIDED


async def test_a_bug_of_one_callback_keeps_nothing_from_the_others() -> None:
    told, seen = Told(), []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, what: seen.append(what["exception"]))
    broken, other = told.promise("broken"), told.promise("other")
    broken.add_done_callback(lambda _: 1 / 0)
    other.add_done_callback(told.events.append)
    broken.set_result(DECIDED)
    other.set_result(DECIDED)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told.events[-1] is other
    assert [type(one) for one in seen] == [ZeroDivisionError]
