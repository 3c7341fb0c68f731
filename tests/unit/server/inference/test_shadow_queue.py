"""Shadow rows gather in blocks, in virtual time."""

from __future__ import annotations

import asyncio
import math

from server.inference.rows import Row
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


async def test_rows_that_are_given_up_leave_no_timer() -> None:
    b = Bench()
    b.add(2)
    assert len(b.queue.clear()) == 2
    await asyncio.sleep(1)
    assert (len(b.queue), b.released) == (0, 0)
