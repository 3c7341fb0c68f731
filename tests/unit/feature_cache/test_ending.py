"""Tasks end, also those that lose a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest
from support.virtual_time import VirtualTimeLoop

from feature_cache.ending import end

Test = Callable[[], Coroutine[None, None, None]]


def in_virtual_time(test: Test) -> Callable[[], None]:
    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test())

    return run


@in_virtual_time
async def test_tasks_end_and_one_that_has_ended_stays_as_it_was() -> None:
    async def fails() -> None:
        raise OSError("before")

    failed, waiting = asyncio.create_task(fails()), asyncio.create_task(asyncio.sleep(3_600))
    await asyncio.sleep(0)
    await end([failed, waiting])
    await end([])
    assert waiting.cancelled()
    with pytest.raises(OSError, match="before"):
        failed.result()


@in_virtual_time
async def test_a_task_has_its_time_to_end_in_good_order() -> None:
    async def takes_leave() -> str:
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(9)
            said.append("goodbye")
        return ""

    said: list[str] = []
    task = asyncio.create_task(takes_leave())
    await asyncio.sleep(1)
    await end([task])
    assert (said, task.cancelled()) == (["goodbye"], True)


@in_virtual_time
async def test_a_task_that_loses_a_cancellation_ends_as_well() -> None:
    """As a loop that consumes for ever does when it is cancelled while a lost connection ends its tasks."""

    async def lost() -> None:
        raise OSError("the connection is lost")

    async def closes_slowly() -> None:
        try:
            await asyncio.sleep(3_600)
        finally:
            await asyncio.sleep(2)

    async def for_ever() -> None:
        while len(rounds) < 3:  # for this test's sake
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(closes_slowly())
                    tasks.create_task(lost())
            except* OSError:
                rounds.append(1)
            await asyncio.sleep(3_600)

    rounds: list[int] = []
    task = asyncio.create_task(for_ever())
    await asyncio.sleep(1)
    await end([task])
    assert task.cancelled()
