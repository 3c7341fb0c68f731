"""The rows of a block go to the model server and come back as one, and one by one where anything else happens."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from support.batcher_bench import ONE_SLOT, Bench, bench, payload, scored

from fallback.block import Block, Scores
from fallback.budget import Budget
from server.inference.batcher import BatcherSettings
from server.inference.outcome import Outcome
from server.inference.rows import Lane, Result, RowBlock

WIDE = ONE_SLOT.model_copy(update={"max_rows": 8})


class Orders(Block):
    """A block of orders of which nothing matters but who waits, and what each gets."""

    def __init__(self, orders: int) -> None:
        unused: list[Any] = [None] * orders
        super().__init__(unused, unused, Budget(0.0, 1.0))
        self.gone: set[int] = set()
        self.failed: dict[int, Result] = {}
        self.ends = 0

    def complete(self) -> None:
        self.ends += 1

    def is_left(self) -> bool:
        return not self.missing or len(self.gone) == len(self)

    def is_gone(self, place: int) -> bool:
        return place in self.gone

    def put_failure(self, place: int, result: Any) -> None:
        self.failed[place] = result
        self.put(place, result)


def submit(b: Bench, first: int, orders: int, timeout_seconds: float = 0.05, lane: Lane = Lane.LIVE) -> Orders:
    """A block whose rows are numbered from `first`."""
    block, now = Orders(orders), b.loop.time()
    rows = [payload(number) for number in range(first, first + orders)]
    b.batcher.submit_block(RowBlock(rows, now + timeout_seconds, block, now), lane)
    return block


async def test_blocks_leave_together_and_each_gets_its_scores_as_one() -> None:
    async with bench(WIDE) as b:
        b.server.has_parts = True
        row, three, two = b.submit(1), submit(b, 2, 3), submit(b, 5, 2)
        assert b.batcher.queued == 6
        (call,) = await b.calls(1)
        assert call.rows == [payload(number) for number in range(1, 7)]
        call.answer_each_its_own()
        await row
        for block, first in ((three, 2), (two, 5)):
            assert (block.ends, block.missing, block.failed) == (1, 0, {})
            assert isinstance(block.results, Scores)
            assert block.results.batch_rows == 6
            assert list(block.results) == [scored(first + place) for place in range(len(block))]
            indexes = [one.batch_index for one in block.results]
            assert [call.rows[index] for index in indexes] == [payload(first + n) for n in range(len(block))]
            assert indexes[0] == block.results.first_index
            assert block.results[1].part_scores == (scored(first + 1).score / 2, scored(first + 1).score / 4)
        assert b.batcher.rows == 6


async def test_a_score_that_cannot_be_used_fails_its_own_order_only() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 3)
        (call,) = await b.calls(1)
        call.answer.set_result([0.25, math.nan, 0.75])
        await b.calls(1)
        assert block.failed == {1: Outcome.BAD_ANSWER}
        assert [one if isinstance(one, Outcome) else one.score for one in block.results] == [
            0.25,
            Outcome.BAD_ANSWER,
            0.75,
        ]
        assert (block.ends, b.server.outcomes) == (1, [Outcome.SUCCESS])


@pytest.mark.parametrize("when", ["queued", "under way"])
async def test_an_order_whose_caller_has_gone_takes_nothing_from_the_others(when: str) -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 3)
        if when == "under way":
            await b.calls(1)
        block.gone.add(1)
        (call,) = await b.calls(1)
        assert call.rows == [payload(number) for number in ((1, 3) if when == "queued" else (1, 2, 3))]
        call.answer_each_its_own()
        await b.calls(1)
        assert [block.results[place] for place in (0, 2)] == [scored(1), scored(3)]
        assert (block.results[1], block.failed) == (None, {})


async def test_a_block_that_does_not_fit_waits_for_the_next_batch() -> None:
    async with bench(WIDE) as b:
        first, second = submit(b, 1, 5), submit(b, 6, 5)
        (call,) = await b.calls(1)
        assert len(call.rows) == 5
        call.answer_each_its_own()
        _, call = await b.calls(2)
        assert call.rows == [payload(number) for number in range(6, 11)]
        call.answer_each_its_own()
        await b.calls(2)
        assert (first.ends, second.ends) == (1, 1)


async def test_a_block_that_is_larger_than_any_batch_leaves_in_several() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 10)
        (call,) = await b.calls(1)
        assert len(call.rows) == 8
        call.answer_each_its_own()
        _, call = await b.calls(2)
        assert (len(call.rows), block.missing) == (2, 2)
        call.answer_each_its_own()
        await b.calls(2)
        assert [block.results[place] for place in range(10)] == [scored(number) for number in range(1, 11)]


async def test_all_of_a_block_are_answered_at_its_deadline_also_those_that_wait_one_by_one() -> None:
    async with bench(WIDE) as b:
        large = submit(b, 1, 10, 0.008)
        await b.calls(1)
        small = submit(b, 11, 2, 0.006)
        await asyncio.sleep(0.0065)
        assert small.failed == dict.fromkeys(range(2), Outcome.TIMEOUT)
        await asyncio.sleep(0.002)
        assert large.failed == dict.fromkeys(range(10), Outcome.TIMEOUT)
        assert (large.ends, small.ends) == (1, 1)


async def test_a_batch_that_fails_as_a_whole_is_sent_again_in_parts_of_which_each_gets_its_own() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 3, 0.5)
        (call,) = await b.calls(1)
        call.fail(Outcome.MODEL_ERROR)
        for number, poison in ((2, False), (3, True), (4, False)):
            call = (await b.calls(number))[-1]
            assert len(call.rows) == 1
            if poison:
                call.fail(Outcome.MODEL_ERROR)
            else:
                call.answer_each_its_own()
        await b.calls(4)
        assert block.failed == {1: Outcome.MODEL_ERROR}
        assert [block.results[place] for place in (0, 2)] == [scored(1), scored(3)]


async def test_in_a_full_queue_and_at_the_end_every_order_of_a_block_hears_so() -> None:
    async with bench(WIDE.model_copy(update={"max_queued_rows": 2})) as b:
        block = submit(b, 1, 3)
        assert block.failed == {2: Outcome.OVERLOAD}, "two find a place, one by one"
    assert block.failed == dict.fromkeys(range(3), Outcome.OVERLOAD)
    async with bench(WIDE) as b:
        submit(b, 1, 3)
        waiting = submit(b, 4, 8)
        await b.calls(1)
    assert waiting.failed == dict.fromkeys(range(8), Outcome.OVERLOAD)


async def test_a_batch_that_is_given_up_fails_all_orders_of_its_blocks_once() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 3, 0.5)
        (call,) = await b.calls(1)
        await asyncio.sleep(0.06)
        assert block.failed == dict.fromkeys(range(3), Outcome.TIMEOUT)
        call.answer_each_its_own()
        await b.calls(1)
        assert block.ends == 1


async def test_a_block_of_one_order_that_fails_is_not_sent_again_and_its_order_hears_so_at_once() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 1, 0.5)
        (call,) = await b.calls(1)
        call.fail(Outcome.MODEL_ERROR)
        await b.calls(1)
        assert block.failed == {0: Outcome.MODEL_ERROR}


@pytest.mark.parametrize("score", [0.5, math.nan])
async def test_an_answer_that_nobody_of_a_block_waits_for_any_more_is_judged_for_what_it_is(
    score: float,
) -> None:
    async with bench(WIDE) as b:
        submit(b, 1, 2, 0.005)
        (call,) = await b.calls(1)
        await asyncio.sleep(0.006)
        call.answer.set_result([score, score])
        await b.calls(1)
        assert b.server.outcomes == [Outcome.BAD_ANSWER if math.isnan(score) else Outcome.SUCCESS]


async def test_a_block_that_finds_a_replica_stuck_hears_so_at_once() -> None:
    async with bench(WIDE.model_copy(update={"max_in_flight": 1})) as b:
        submit(b, 1, 2, 0.5)
        await b.calls(1)
        await asyncio.sleep(0.06)
        assert b.batcher.stuck, "the batch was given up, and its call has not ended"
        block = submit(b, 3, 3, 0.5)
        assert block.failed == dict.fromkeys(range(3), Outcome.OVERLOAD)


async def test_a_batch_that_fails_when_the_orders_of_a_block_were_answered_is_not_sent_again_for_them() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 3, 0.005)
        (call,) = await b.calls(1)
        await asyncio.sleep(0.006)
        assert block.failed == dict.fromkeys(range(3), Outcome.TIMEOUT)
        call.fail(Outcome.MODEL_ERROR)
        await b.calls(1)
        assert (block.ends, block.missing, b.batcher.queued, b.batcher.splits) == (1, 0, 0, 0)


async def test_orders_that_have_their_scores_are_not_failed_when_their_time_is_up() -> None:
    async with bench(WIDE) as b:
        block = submit(b, 1, 10, 0.03)
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        await b.calls(2)
        await asyncio.sleep(0.04)
        assert block.failed == dict.fromkeys((8, 9), Outcome.TIMEOUT)
        assert (block.ends, block.missing) == (1, 0)


async def test_a_scored_block_whose_callers_still_wait_for_the_audit_takes_no_second_result() -> None:
    class Patient(Orders):
        """Its callers wait on when the scores are there."""

        def is_left(self) -> bool:
            return False

    async with bench(WIDE) as b:
        block, now = Patient(2), b.loop.time()
        b.batcher.submit_block(RowBlock([payload(1), payload(2)], now + 0.01, block, now))
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        await b.calls(1)
        await asyncio.sleep(0.02)
        assert (block.ends, block.missing, block.failed) == (1, 0, {})


async def test_a_canarys_block_that_gives_its_places_up_is_counted_by_its_rows() -> None:
    async with bench(BatcherSettings(slots=1, max_rows=4, max_queued_rows=3)) as b:
        b.submit(0)
        (first,) = await b.calls(1)
        displaced = submit(b, 1, 3, lane=Lane.CANARY)
        assert b.batcher.full_for(Lane.CANARY)
        b.submit(4)
        assert displaced.failed == dict.fromkeys(range(3), Outcome.OVERLOAD)
        assert b.batcher.displaced == 3
        late = submit(b, 5, 3, lane=Lane.CANARY)
        assert b.batcher.queued == 3, "two of its rows find a place, as rows of the canary"
        assert (late.missing, b.batcher.full, b.batcher.full_for(Lane.CANARY)) == (2, False, True)
        first.answer_each_its_own()
