"""Shadow rows gather in blocks, in virtual time."""

from __future__ import annotations

import asyncio
import math

from server.inference.rows import Row, RowBlock
from server.inference.shadow_queue import ShadowQueue


class Bench:
    """A queue of four rows at most, and how often it said that its rows are old."""

    def __init__(self) -> None:
        self.released = 0
        self.queue = ShadowQueue(4, 0.25, self.release)

    def release(self) -> None:
        self.released += 1

    def add(self, rows: int) -> int:
        loop = asyncio.get_running_loop()
        return self.queue.add([Row(b"row", math.inf, loop.create_future()) for _ in range(rows)])


async def test_rows_are_due_when_a_block_is_full_or_the_oldest_has_waited() -> None:
    b = Bench()
    b.add(2)
    assert not b.queue.is_due(3)
    assert b.queue.is_due(2)
    await asyncio.sleep(0.24)
    assert not b.queue.is_due(3)
    b.add(1)  # the oldest counts, not the newest
    await asyncio.sleep(0.02)
    assert b.queue.is_due(4)
    assert b.released == 1


async def test_what_stays_behind_a_block_gathers_anew() -> None:
    b = Bench()
    b.add(4)
    await asyncio.sleep(0.3)
    assert len(b.queue.take(3)) == 3
    assert len(b.queue) == 1
    assert not b.queue.is_due(2)
    await asyncio.sleep(0.3)
    assert b.queue.is_due(2)
    assert len(b.queue.take(3)) == 1
    await asyncio.sleep(1)
    assert b.released == 2, "an empty queue has no timer"


async def test_too_many_rows_are_shed() -> None:
    b = Bench()
    assert b.add(6) == 4
    assert b.queue.shed == 2


class Nobody:
    """Takes the results of a block's rows, and does nothing with them."""

    missing = 3

    def is_left(self) -> bool:
        return False

    def has_left(self) -> bool:
        return False

    def is_gone(self, place: int) -> bool:
        return False

    def put_all(self, scores: object) -> None: ...

    def put(self, place: int, result: object) -> None: ...

    def put_failure(self, place: int, result: object) -> None: ...


def block_of(rows: int) -> RowBlock:
    return RowBlock([b"row"] * rows, math.inf, Nobody(), math.nan)


async def test_rows_of_a_block_leave_together_unless_they_are_too_many() -> None:
    queue = ShadowQueue(9, 0.25, lambda: None)
    three = block_of(3)
    assert queue.add([block_of(2), three, block_of(3)]) == 8
    assert [len(one) for one in queue.take(4)] == [2], "what does not fit waits for the next batch"
    assert len(queue) == 6
    assert queue.take(5)[0] is three
    assert [len(one) for one in queue.take(2)] == [1, 1], "too many for any batch: one by one"
    assert len(queue) == 1
    queue.clear()


async def test_of_a_block_as_many_rows_are_taken_as_there_is_room_for() -> None:
    queue = ShadowQueue(4, 0.25, lambda: None)
    assert queue.add([block_of(3)]) == 3
    assert queue.add([block_of(3)]) == 1
    assert (len(queue), queue.shed) == (4, 2)
    assert [len(one) for one in queue.clear()] == [3, 1]


async def test_rows_that_are_given_up_leave_no_timer() -> None:
    b = Bench()
    b.add(2)
    assert len(b.queue.clear()) == 2
    await asyncio.sleep(1)
    assert (len(b.queue), b.released) == (0, 0)
