"""The micro-batcher on a real event loop, in virtual time, with a model server whose answers the test gives."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.batcher_bench import MODEL, ONE_SLOT, Bench, Call, bench, payload, scored, settle

from server.inference.batcher import BatcherSettings
from server.inference.outcome import Outcome
from server.inference.rows import Lane, Result, Scored


async def test_rows_gather_while_the_slot_is_taken_and_each_caller_gets_its_own_answer() -> None:
    async with bench() as b:
        first = b.submit(1)
        (call,) = await b.calls(1)
        later = [b.submit(number) for number in (2, 3, 4)]
        assert len(await b.calls(1)) == 1, "no second batch before a slot is free"
        call.answer_each_its_own()
        assert await first == scored(1)
        _, second = await b.calls(2)
        assert second.rows == [payload(number) for number in (2, 3, 4)]
        second.answer_each_its_own()
        assert await asyncio.gather(*later) == [scored(2), scored(3), scored(4)]
        assert b.server.outcomes == [Outcome.SUCCESS] * 2
        assert (b.batcher.batches, b.batcher.rows, b.batcher.queued) == (2, 4, 0)


async def test_rows_of_one_turn_of_the_event_loop_leave_together_and_at_once() -> None:
    async with bench() as b:
        started = b.loop.time()
        rows = [b.submit(number) for number in (1, 2, 3)]
        (call,) = await b.calls(1)
        assert b.loop.time() == started, "no timer"
        assert len(call.rows) == 3
        call.answer_each_its_own()
        await asyncio.gather(*rows)


async def test_rows_are_waited_for_until_half_as_many_are_here_as_orders_are_under_way() -> None:
    async with bench(BatcherSettings()) as b:
        b.under_way = 8
        started = b.loop.time()
        for number in range(3):
            b.submit(number)
        await b.calls(0)
        await asyncio.sleep(0.002)
        b.submit(3)
        (call,) = await b.calls(1)
        assert len(call.rows) == 4
        assert b.loop.time() - started == pytest.approx(0.002)


async def test_no_more_rows_are_waited_for_than_make_a_full_batch_worth_its_call() -> None:
    async with bench(BatcherSettings()) as b:
        b.under_way = 1_000
        for number in range(31):
            b.submit(number)
        await b.calls(0)
        b.submit(31)
        (call,) = await b.calls(1)
        assert len(call.rows) == 32


async def test_an_order_that_is_alone_in_the_server_waits_for_nothing() -> None:
    async with bench(BatcherSettings()) as b:
        for under_way in (1, 2):
            b.under_way = under_way
            b.submit(under_way)
            calls = await b.calls(under_way)
            calls[-1].answer_each_its_own()
            await settle()


async def test_a_row_waits_for_others_four_milliseconds_at_most_and_less_when_they_do_not_come() -> None:
    async with bench(BatcherSettings()) as b:
        b.under_way = 16
        for number in range(6):
            b.submit(number)
            if number < 3:  # eight rows are waited for, four, and two
                await asyncio.sleep(0.0035)
                await b.calls(number)
                await asyncio.sleep(0.001)
            (*_, alone) = await b.calls(number + 1)
            alone.answer_each_its_own()
            await settle()
        # Rows that came together show that others are about to come again.
        for number in range(8):
            b.submit(number)
        (*_, many) = await b.calls(7)
        many.answer_each_its_own()
        await settle()
        b.submit(0)
        await b.calls(7)
        b.submit(1)
        await b.calls(8)


async def test_the_time_that_rows_have_waited_for_a_slot_counts() -> None:
    async with bench(BatcherSettings()) as b:
        b.submit(0)
        (first,) = await b.calls(1)
        b.under_way = 16
        b.submit(1)
        await asyncio.sleep(0.005)
        first.answer_each_its_own()
        assert (await b.calls(2))[1].rows == [payload(1)]


async def test_a_row_that_would_be_late_is_not_made_to_wait() -> None:
    async with bench(BatcherSettings()) as b:
        b.under_way = 16
        b.submit(1, timeout_seconds=0.002)
        await b.calls(1)
    async with bench(BatcherSettings()) as b:
        b.under_way = 16
        b.submit(1)
        await b.calls(0)
        b.submit(2, timeout_seconds=0.002)
        (call,) = await b.calls(1)
        assert len(call.rows) == 2


async def test_closing_while_rows_wait_for_others_answers_them() -> None:
    async with bench(BatcherSettings()) as b:
        b.under_way = 16
        row = b.submit(1)
        await b.calls(0)
        await b.batcher.close()
        assert row.result() is Outcome.OVERLOAD
        await asyncio.sleep(0.01)
        await b.calls(0)


async def test_as_many_batches_fly_as_there_are_slots() -> None:
    async with bench(BatcherSettings(slots=2, max_rows=2)) as b:
        for number in range(5):
            b.submit(number)
        calls = await b.calls(2)
        assert [len(call.rows) for call in calls] == [2, 2]
        assert b.batcher.queued == 1


async def test_the_earliest_deadline_goes_first() -> None:
    async with bench() as b:
        b.submit(0)
        (call,) = await b.calls(1)
        for number, timeout_seconds in enumerate((0.040, 0.020, 0.030, 0.010, 0.035, 0.025), start=1):
            b.submit(number, timeout_seconds)
        call.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(number) for number in (4, 2, 6, 3)]


async def test_rows_with_equal_deadlines_go_in_order_of_arrival() -> None:
    async with bench() as b:
        b.submit(0)
        (call,) = await b.calls(1)
        for number in (3, 1, 2):
            b.submit(number)
        call.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(3), payload(1), payload(2)]


async def test_a_row_is_answered_at_its_deadline_at_the_latest() -> None:
    async with bench() as b:
        started = b.loop.time()
        row = b.submit(1, 0.006)
        assert await row is Outcome.TIMEOUT
        assert b.loop.time() - started == pytest.approx(0.006)
        assert b.server.outcomes == [], "its batch goes on"
        b.server.calls[0].answer_each_its_own()
        await settle()
        assert b.server.outcomes == [Outcome.SUCCESS]
        assert b.batcher.rows == 0, "nobody waited for that score"


async def test_of_rows_that_come_together_each_is_answered_at_its_own_deadline() -> None:
    async with bench() as b:
        started = b.loop.time()
        rows = b.submit_together(0.008, 0.006, 0.02, 0.007)
        ended: dict[asyncio.Future[Result], float] = {}
        for row in rows:
            row.add_done_callback(lambda row: ended.setdefault(row, b.loop.time() - started))
        rows[3].cancel()
        (call,) = await b.calls(1)
        assert call.rows == [payload(2), payload(1), payload(3)], "the earliest deadline goes first"
        await asyncio.sleep(0.009)
        call.answer_each_its_own()
        assert [await row for row in rows[:3]] == [Outcome.TIMEOUT, Outcome.TIMEOUT, scored(3)]
        assert ended[rows[0]] == pytest.approx(0.008)
        assert ended[rows[1]] == pytest.approx(0.006)
        assert len(b.batcher._deadlines) == 1, "all of them are one entry of the heap"


async def test_of_rows_that_come_together_those_that_find_the_queue_full_are_refused() -> None:
    async with bench(ONE_SLOT.model_copy(update={"max_queued_rows": 2})) as b:
        rows = b.submit_together(0.05, 0.05, 0.05)
        assert rows[2].result() is Outcome.OVERLOAD
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        assert [await row for row in rows[:2]] == [scored(1), scored(2)]


async def test_a_row_that_cannot_make_it_any_more_is_not_sent() -> None:
    async with bench() as b:
        b.submit(1)
        (call,) = await b.calls(1)
        hopeless, fine = b.submit(2, 0.0055), b.submit(3)
        await asyncio.sleep(0.005)
        call.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(3)]
        assert await hopeless is Outcome.TIMEOUT
        second.answer_each_its_own()
        assert await fine == scored(3)


async def test_a_cancelled_row_leaves_the_queue() -> None:
    async with bench() as b:
        b.submit(1)
        (call,) = await b.calls(1)
        gone, stays = b.submit(2), b.submit(3)
        gone.cancel()
        call.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(3)]
        second.answer_each_its_own()
        assert await stays == scored(3)


@settings(max_examples=75)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 12), st.one_of(st.none(), st.integers(0, 20))),
        min_size=1,
        max_size=30,
    ),
    poison=st.sets(st.integers(0, 29), max_size=5),
    slots=st.integers(1, 3),
    answer_every=st.integers(1, 4),
    under_way=st.sampled_from((0, 6, 64)),
)
@pytest.mark.fault("E5", "Any number of callers leave a micro-batch", "Every other caller gets its own answer.")
async def test_any_subset_may_cancel_at_any_moment_and_every_other_gets_its_own_answer(
    rows: list[tuple[int, int | None]], poison: set[int], slots: int, answer_every: int, under_way: int
) -> None:
    """`rows` holds (step of arrival, steps until cancelled or None) for each caller; on some the model fails."""
    patient = BatcherSettings(slots=slots, max_rows=3, max_in_flight=8, min_patience_seconds=9, max_patience_seconds=9)
    async with bench(patient) as b:
        b.under_way = under_way
        waiting: dict[int, asyncio.Future[Result]] = {}
        answered = 0
        for step in range(33):
            for number, (arrives, leaves_after) in enumerate(rows):
                if arrives == step:
                    waiting[number] = b.submit(number, timeout_seconds=10)
                if leaves_after is not None and arrives + leaves_after == step:
                    waiting[number].cancel()
            await asyncio.sleep(0)
            if step % answer_every == 0 and answered < len(b.server.calls):
                fail_if_poisoned(b.server.calls[answered], poison)
                answered += 1
        await asyncio.sleep(0.005)  # rows that wait for others leave
        while answered < len(b.server.calls):
            fail_if_poisoned(b.server.calls[answered], poison)
            answered += 1
            await asyncio.sleep(0.005)
        for number, (_, leaves_after) in enumerate(rows):
            expected = Outcome.MODEL_ERROR if number in poison else scored(number)
            assert (leaves_after is not None and waiting[number].cancelled()) or waiting[number].result() == expected
        assert set(b.server.outcomes) <= {Outcome.SUCCESS, Outcome.MODEL_ERROR}
        assert b.batcher.queued == 0


async def test_each_row_gets_what_the_parts_of_an_ensemble_say_of_it() -> None:
    async with bench() as b:
        b.server.has_parts = True
        rows = b.submit(128), b.submit(512)
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        results = await asyncio.gather(*rows)
        said = [one.part_scores for one in results if isinstance(one, Scored)]
        assert said == [(0.0625, 0.03125), (0.25, 0.125)]


@pytest.mark.parametrize(
    ("score", "usable"),
    [
        (0.0, True),
        (1.0, True),
        (-0.0, True),
        (1e-45, True),  # the smallest subnormal float32
        (math.nan, False),
        (math.inf, False),
        (-math.inf, False),
        (-0.1, False),
        (-1e-45, False),
        (1.0000001, False),
    ],
)
async def test_an_unusable_score_fails_its_own_row_only(score: float, usable: bool) -> None:
    async with bench() as b:
        doubtful, sound = b.submit(1), b.submit(2)
        (call,) = await b.calls(1)
        call.answer.set_result([score, 0.25])
        assert await sound == Scored(0.25, MODEL)
        result = await doubtful
        if usable:
            assert isinstance(result, Scored)
            assert result.score == float(np.float32(score))
        else:
            assert result is Outcome.BAD_ANSWER
        assert b.server.outcomes == [Outcome.SUCCESS]


async def test_a_batch_without_a_usable_score_is_a_bad_answer() -> None:
    async with bench() as b:
        b.submit(1)
        (call,) = await b.calls(1)
        call.answer.set_result([math.nan])
        await settle()
        assert b.server.outcomes == [Outcome.BAD_ANSWER]
        assert b.batcher.batches == 0


@pytest.mark.parametrize("outcome", [Outcome.OVERLOAD, Outcome.TRANSPORT, Outcome.TIMEOUT, Outcome.IGNORED])
async def test_a_batch_that_fails_gives_each_row_its_outcome(outcome: Outcome) -> None:
    async with bench() as b:
        rows = [b.submit(number) for number in range(3)]
        (call,) = await b.calls(1)
        call.fail(outcome)
        assert await asyncio.gather(*rows) == [outcome] * 3
        assert b.server.outcomes == [outcome]


def fail_if_poisoned(call: Call, poison: set[int], outcome: Outcome = Outcome.MODEL_ERROR) -> None:
    """Answers like a model that fails on certain rows, and with them on the whole batch."""
    if any(payload(number) in call.rows for number in poison):
        call.fail(outcome)
    else:
        call.answer_each_its_own()


async def answer_all(b: Bench, poison: set[int], outcome: Outcome = Outcome.MODEL_ERROR) -> None:
    """Answers calls until none is left, each after a tenth of a millisecond."""
    answered = 0
    await settle()
    while answered < len(b.server.calls):
        await asyncio.sleep(0.0001)
        fail_if_poisoned(b.server.calls[answered], poison, outcome)
        answered += 1
        await settle()


@settings(max_examples=100)
@given(
    poisoned=st.lists(st.booleans(), min_size=2, max_size=40),
    split_parts=st.integers(2, 16),
    slots=st.integers(1, 3),
    outcome=st.sampled_from((Outcome.MODEL_ERROR, Outcome.BAD_ANSWER)),
)
async def test_poison_rows_fail_and_take_no_mate_outside_their_part_with_them(
    poisoned: list[bool], split_parts: int, slots: int, outcome: Outcome
) -> None:
    poison = {number for number, is_poison in enumerate(poisoned) if is_poison}
    async with bench(BatcherSettings(max_rows=64, slots=slots, split_parts=split_parts)) as b:
        rows = [b.submit(number, 0.1) for number in range(len(poisoned))]
        await answer_all(b, poison, outcome)
        results = [row.result() for row in rows]
        failed = {number for number, result in enumerate(results) if result is outcome}
        assert poison <= failed
        assert all(results[number] == scored(number) for number in range(len(poisoned)) if number not in failed)
        if len(poisoned) <= split_parts:
            assert failed == poison
        largest_part = -(-len(poisoned) // split_parts)
        assert len(failed) <= len(poison) * largest_part
        assert len(b.server.calls) <= 1 + split_parts
        assert b.server.outcomes == [outcome if len(failed) == len(rows) else Outcome.SUCCESS], "one batch, one report"
        assert b.batcher.splits == (1 if poison else 0)
        assert b.batcher.queued == 0


async def test_a_split_sends_only_the_rows_that_can_still_be_answered() -> None:
    async with bench(BatcherSettings(slots=1, split_parts=3)) as b:
        rows = [b.submit(number, 0.0065 if number == 1 else 0.05) for number in range(4)]
        (call,) = await b.calls(1)
        rows[2].cancel()
        await asyncio.sleep(0.006)
        call.fail(Outcome.MODEL_ERROR)
        _, part = await b.calls(2)
        assert part.rows == [payload(0)]
        assert await rows[1] is Outcome.TIMEOUT
        part.answer_each_its_own()
        *_, part = await b.calls(3)
        assert part.rows == [payload(3)]
        part.fail(Outcome.MODEL_ERROR)
        assert await rows[0] == scored(0)
        assert await rows[3] is Outcome.MODEL_ERROR
        assert b.server.outcomes == [Outcome.SUCCESS]


async def test_a_split_that_nobody_waits_for_counts_as_the_failure_it_was() -> None:
    async with bench() as b:
        rows = [b.submit(number, 0.0065) for number in range(2)]
        (call,) = await b.calls(1)
        await asyncio.sleep(0.006)
        call.fail(Outcome.MODEL_ERROR)
        assert await asyncio.gather(*rows) == [Outcome.TIMEOUT] * 2
        assert len(b.server.calls) == 1
        assert b.server.outcomes == [Outcome.MODEL_ERROR]


async def test_the_parts_of_a_split_leave_before_the_rows_that_came_later() -> None:
    async with bench(BatcherSettings(slots=1, split_parts=2)) as b:
        b.submit(0), b.submit(1)
        (call,) = await b.calls(1)
        b.submit(2)
        assert b.batcher.expected_seconds == pytest.approx(0.0015)
        call.fail(Outcome.MODEL_ERROR)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert b.batcher.expected_seconds == pytest.approx(0.0015 + 0.001), "one part flies and one waits"
        await answer_rest(b, 1)
        assert [call.rows for call in b.server.calls[1:]] == [[payload(0)], [payload(1)], [payload(2)]]


async def answer_rest(b: Bench, answered: int) -> None:
    await settle()
    while answered < len(b.server.calls):
        b.server.calls[answered].answer_each_its_own()
        answered += 1
        await settle()


async def test_closing_amid_a_split_answers_every_row() -> None:
    async with bench(BatcherSettings(slots=1, split_parts=4)) as b:
        rows = [b.submit(number) for number in range(4)]
        (call,) = await b.calls(1)
        call.fail(Outcome.MODEL_ERROR)
        await b.calls(2)
        await b.batcher.close()
        assert [row.result() for row in rows] == [Outcome.IGNORED] + [Outcome.OVERLOAD] * 3


async def test_a_part_that_does_not_come_back_holds_up_neither_its_mates_nor_the_report() -> None:
    async with bench(BatcherSettings(slots=1, split_parts=2)) as b:
        rows = [b.submit(number, 1.0) for number in range(2)]
        (call,) = await b.calls(1)
        call.fail(Outcome.MODEL_ERROR)
        assert await rows[0] is Outcome.TIMEOUT
        assert b.batcher.abandoned == 1
        *_, part = await b.calls(3)
        part.fail(Outcome.MODEL_ERROR)
        assert await rows[1] is Outcome.MODEL_ERROR
        assert b.server.outcomes == [Outcome.MODEL_ERROR]
        b.server.calls[1].answer_each_its_own()
        await settle()
        assert (b.batcher.in_flight, len(b.server.outcomes)) == (0, 1)


async def test_shadow_rows_are_split_as_well_so_that_one_order_cannot_spoil_the_comparison() -> None:
    async with bench(BatcherSettings(max_shadow_rows=3)) as b:
        rows = [b.submit_shadow(number) for number in range(3)]
        await answer_all(b, {1})
        results = [row.result() for row in rows if row is not None]
        assert results == [scored(0), Outcome.MODEL_ERROR, scored(2)]
        assert b.server.outcomes == [Outcome.SUCCESS]


async def test_with_one_part_nothing_is_sent_again() -> None:
    async with bench(BatcherSettings(slots=1, split_parts=1)) as b:
        rows = [b.submit(number) for number in range(2)]
        (call,) = await b.calls(1)
        call.fail(Outcome.MODEL_ERROR)
        assert await asyncio.gather(*rows) == [Outcome.MODEL_ERROR] * 2
        assert len(b.server.calls) == 1


async def test_a_fault_of_ours_counts_as_a_model_error_and_frees_the_slot() -> None:
    async with bench() as b:
        row, unfit = b.submit(1), b.submit(2)
        (call,) = await b.calls(1)
        call.answer.set_result([0.5])  # one score for two rows: the parser lets no such answer through
        assert await unfit is Outcome.MODEL_ERROR
        assert isinstance(await row, Scored)
        assert b.server.outcomes == [Outcome.MODEL_ERROR]
        assert b.batcher.in_flight == 0


async def test_a_batch_that_does_not_come_back_is_abandoned_but_counts_against_the_cap() -> None:
    async with bench() as b:
        rows = []
        for number in range(ONE_SLOT.max_in_flight):
            started = b.loop.time()
            rows.append(b.submit(number, 1.0))
            assert await rows[-1] is Outcome.TIMEOUT
            assert b.loop.time() - started >= 0.01 - 1e-9
            assert b.batcher.abandoned == number + 1
        assert b.batcher.full
        assert await b.submit(9) is Outcome.OVERLOAD
        assert b.server.outcomes == [Outcome.TIMEOUT] * 3
        b.server.calls[0].answer_each_its_own()
        b.server.calls[1].fail(Outcome.TRANSPORT)
        await settle()
        assert len(b.server.outcomes) == 3, "what a given-up batch says later changes nothing"
        assert b.batcher.rows == b.batcher.batches == 0
        assert b.batcher.abandoned == 1
        row = b.submit(10)
        (*_, call) = await b.calls(4)
        call.answer_each_its_own()
        assert await row == scored(10)


async def test_patience_grows_with_a_replica_that_became_slow() -> None:
    async with bench() as b:
        gave_up_after = []
        for number in range(3):
            await b.submit(number, 1.0)
            gave_up_after.append(b.server.reports[-1][1])
        assert gave_up_after == [pytest.approx(0.010), pytest.approx(0.040), pytest.approx(0.050)]


async def test_a_replica_that_answers_what_was_given_up_is_waited_for_as_long_as_that_takes() -> None:
    async with bench() as b:

        async def given_up_after(timeout_seconds: float, takes_seconds: float) -> float | None:
            number = len(b.server.calls) + 1
            row = b.submit(number, timeout_seconds)
            (*_, call) = await b.calls(number)
            await asyncio.sleep(takes_seconds)
            given_up = b.server.reports[-1][1] if len(b.server.reports) == number else None
            call.answer_each_its_own()
            assert await row == (scored(number) if given_up is None else Outcome.TIMEOUT)
            await settle()
            return given_up

        assert await given_up_after(0.3, 0.08) == pytest.approx(0.01)
        assert await given_up_after(0.3, 0.08) is None
        assert await given_up_after(0.1, 0.15) == pytest.approx(0.1), "later nobody can use a score"
        await asyncio.sleep(1.0)
        assert await given_up_after(0.3, 0.08) == pytest.approx(0.05), "one that has not answered lately may be lost"


async def test_a_standstill_of_our_own_event_loop_is_not_the_replicas_fault() -> None:
    async with bench() as b:
        row = b.submit(1, 2.0)
        (call,) = await b.calls(1)
        b.loop.now += 0.5  # nothing ran for half a second
        await settle()
        assert b.batcher.abandoned == 0
        call.answer_each_its_own()
        assert await row == scored(1)
        assert b.server.outcomes == [Outcome.SUCCESS]


async def test_shadow_rows_leave_only_when_no_live_row_waits() -> None:
    async with bench(BatcherSettings(slots=1, shadow_linger_seconds=0.001)) as b:
        b.submit(1)
        (first,) = await b.calls(1)
        b.submit(2)
        shadow = b.submit_shadow(3)
        await asyncio.sleep(0.002)
        await b.calls(1)
        first.answer_each_its_own()
        _, second, third = await b.calls(3)
        assert second.rows == [payload(2)]
        assert third.rows == [payload(3)], "behind the live row, in a batch of its own"
        third.answer_each_its_own()
        assert shadow is not None
        assert await shadow == scored(3)


async def test_shadow_rows_take_no_slot_of_those_that_callers_wait_for() -> None:
    async with bench(BatcherSettings(slots=1, max_shadow_rows=1)) as b:
        b.submit_shadow(1)
        await b.calls(1)
        b.submit(2)
        await b.calls(2)
        b.submit_shadow(3)
        assert [call.rows for call in await b.calls(2)] == [[payload(1)], [payload(2)]], "one shadow batch at a time"
        assert b.batcher.in_flight == 2


async def test_shadow_rows_gather_before_they_leave_in_one_batch() -> None:
    async with bench(BatcherSettings(shadow_linger_seconds=0.05)) as b:
        for number in range(3):
            b.submit_shadow(number)
            await asyncio.sleep(0.01)
        await b.calls(0)
        await asyncio.sleep(0.03)
        (call,) = await b.calls(1)
        assert call.rows == [payload(0), payload(1), payload(2)]


async def test_a_full_block_of_shadow_rows_does_not_linger_and_the_rest_gathers_anew() -> None:
    async with bench(BatcherSettings(max_rows=2, max_shadow_rows=4, shadow_linger_seconds=10)) as b:
        for number in range(5):
            b.submit_shadow(number)
        (call,) = await b.calls(1)
        assert call.rows == [payload(number) for number in range(4)], "more than a batch of orders may have"
        call.answer_each_its_own()
        await b.calls(1)
        await asyncio.sleep(9.9)
        await b.calls(1)
        await asyncio.sleep(0.2)
        assert (await b.calls(2))[1].rows == [payload(4)]


async def test_where_orders_ask_lately_a_batch_of_shadow_rows_is_no_larger_than_one_of_orders() -> None:
    async with bench(BatcherSettings(max_rows=2, max_shadow_rows=4, shadow_linger_seconds=10)) as b:
        b.submit(0)
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        for number in range(3):
            b.submit_shadow(number)
        _, small = await b.calls(2)
        assert small.rows == [payload(0), payload(1)]
        small.answer_each_its_own()
        await asyncio.sleep(1.1)
        b.submit_shadow(3)
        b.submit_shadow(4)
        *_, block = await b.calls(2)
        b.submit_shadow(5)
        *_, block = await b.calls(3)
        assert block.rows == [payload(number) for number in (2, 3, 4, 5)]


async def test_a_block_of_scores_is_handed_out_over_several_turns_of_the_event_loop() -> None:
    async with bench(BatcherSettings(max_shadow_rows=1_024)) as b:
        rows = [b.submit_shadow(number) for number in range(1_024)]
        (call,) = await b.calls(1)
        call.answer_each_its_own()
        most = scored_before = 0
        while scored_before < len(rows):
            await asyncio.sleep(0)
            now = sum(row is not None and row.done() for row in rows)
            most, scored_before = max(most, now - scored_before), now
        assert most <= 64
        assert [row.result() for row in rows if row is not None] == [scored(number) for number in range(1_024)]


async def test_a_block_of_shadow_rows_has_more_time_than_a_batch_that_callers_wait_for() -> None:
    async with bench(BatcherSettings(max_shadow_rows=2)) as b:
        before = b.batcher.expected_seconds
        b.submit_shadow(1)
        b.submit_shadow(2)
        (call,) = await b.calls(1)
        await asyncio.sleep(0.4)
        assert b.batcher.abandoned == 0
        call.answer_each_its_own()
        await settle()
        assert b.batcher.expected_seconds == before, "what a block takes says nothing about an order's row"
        late = b.submit_shadow(3)
        b.submit_shadow(4)
        await asyncio.sleep(0.6)
        assert b.batcher.abandoned == 1
        assert late is not None
        assert late.result() is Outcome.TIMEOUT
        assert b.server.outcomes == [Outcome.SUCCESS, Outcome.TIMEOUT]
        assert b.server.shadows == [True, True]


async def test_shadow_rows_beyond_their_bound_are_shed() -> None:
    async with bench(BatcherSettings(slots=1, max_queued_shadow_rows=2)) as b:
        b.submit(1)
        await b.calls(1)
        queued = [b.submit_shadow(number) for number in range(5)]
        assert [row is None for row in queued] == [False, False, True, True, True]
        assert b.batcher.shed == 3


async def test_live_rows_leave_before_canary_rows_and_these_before_shadow_rows() -> None:
    async with bench(BatcherSettings(slots=1, max_rows=3, shadow_linger_seconds=0.001)) as b:
        b.submit(0)
        (first,) = await b.calls(1)
        b.submit_shadow(7)
        for number in (1, 2):
            b.submit(number, timeout_seconds=0.02, lane=Lane.CANARY)
        for number in (3, 4):
            b.submit(number, timeout_seconds=0.05)
        await asyncio.sleep(0.002)
        first.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(3), payload(4), payload(1)]
        second.answer_each_its_own()
        *_, third, fourth = await b.calls(4)
        assert third.rows == [payload(2)]
        assert fourth.rows == [payload(7)]


async def test_in_a_full_queue_a_live_row_takes_the_place_of_the_canary_row_with_the_latest_deadline() -> None:
    async with bench(BatcherSettings(slots=1, max_rows=4, max_queued_rows=3)) as b:
        b.submit(0)
        (first,) = await b.calls(1)
        early, late = b.submit(1, 0.03, Lane.CANARY), b.submit(2, 0.04, Lane.CANARY)
        b.submit(3)
        assert b.batcher.full_for(Lane.CANARY)
        assert not b.batcher.full_for(Lane.LIVE)
        assert await b.submit(4, lane=Lane.CANARY) is Outcome.OVERLOAD
        b.submit(5)
        assert await late is Outcome.OVERLOAD
        assert b.batcher.displaced == 1
        b.submit(6)
        assert await early is Outcome.OVERLOAD
        assert b.batcher.full
        assert await b.submit(7) is Outcome.OVERLOAD
        first.answer_each_its_own()
        _, second = await b.calls(2)
        assert second.rows == [payload(3), payload(5), payload(6)]


async def test_a_lane_waits_for_nothing_that_leaves_after_it() -> None:
    async with bench() as b:
        b.submit(0)
        await b.calls(1)
        for number in range(4):
            b.submit(number, lane=Lane.CANARY)
        assert b.batcher.expected_seconds_in(Lane.LIVE) == pytest.approx(0.0015)
        assert b.batcher.expected_seconds_in(Lane.CANARY) == pytest.approx(0.0025)
        for number in range(4):
            b.submit(number)
        assert b.batcher.expected_seconds_in(Lane.LIVE) == pytest.approx(0.0025)
        assert b.batcher.expected_seconds_in(Lane.CANARY) == pytest.approx(0.0035)


async def test_canary_rows_keep_their_deadlines_may_be_cancelled_and_are_answered_on_close() -> None:
    async with bench(BatcherSettings(slots=1)) as b:
        b.submit(0)
        await b.calls(1)
        late, given_up, left = (b.submit(number, 0.005 * number, Lane.CANARY) for number in (1, 2, 8))
        given_up.cancel()
        assert await late is Outcome.TIMEOUT
        await b.batcher.close()
        assert left.result() is Outcome.OVERLOAD


async def test_a_full_queue_refuses_and_drains_again() -> None:
    async with bench(BatcherSettings(slots=1, max_rows=2, max_queued_rows=2)) as b:
        b.submit(0)
        (call,) = await b.calls(1)
        queued = [b.submit(1), b.submit(2)]
        assert b.batcher.full
        assert await b.submit(3) is Outcome.OVERLOAD
        call.answer_each_its_own()
        _, second = await b.calls(2)
        second.answer_each_its_own()
        assert await asyncio.gather(*queued) == [scored(1), scored(2)]
        assert not b.batcher.full


async def test_closing_answers_every_row_wherever_it_is() -> None:
    async with bench(BatcherSettings(slots=2, max_rows=1)) as b:
        flying = b.submit(1)
        await b.calls(1)
        shadow = b.submit_shadow(2)
        # A batch whose call has not taken its first step: departed in this turn, cancelled in the same one.
        just_left, queued = b.submit(3), b.submit(4)
        await asyncio.sleep(0)
        await b.batcher.close()
        assert shadow is not None
        assert [flying.result(), just_left.result()] == [Outcome.IGNORED] * 2
        assert [queued.result(), shadow.result()] == [Outcome.OVERLOAD] * 2
        assert await b.submit(5) is Outcome.OVERLOAD
        assert b.submit_shadow(6) is None


async def test_expected_time_grows_with_the_batches_ahead() -> None:
    async with bench() as b:
        assert b.batcher.expected_seconds == pytest.approx(0.001)
        b.submit(0)
        await b.calls(1)
        assert b.batcher.expected_seconds == pytest.approx(0.0015), "half a batch is left of the one under way"
        for number in range(8):
            b.submit(number)
        assert b.batcher.expected_seconds == pytest.approx(0.0035)


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValidationError, match="slots"):
        BatcherSettings(slots=9, max_in_flight=8)
    with pytest.raises(ValidationError, match="min_patience_seconds"):
        BatcherSettings(min_patience_seconds=0.06)


async def test_a_batch_says_whether_a_caller_brought_one_of_its_rows() -> None:
    async with bench() as b:
        for brought in ((False, False), (False, True, False)):
            for number, from_caller in enumerate(brought):
                b.batcher.submit(payload(number), b.loop.time() + 0.05, from_caller=from_caller)
            (*_, call) = await b.calls(len(b.server.from_callers) + 1)
            call.answer.set_result([0.5] * len(brought))
            await settle()
        assert b.server.from_callers == [False, True]
        shadow = b.submit_shadow(1, from_caller=True)
        assert shadow is not None
        await asyncio.sleep(0.3)
        assert b.server.from_callers[-1]
        b.server.calls[-1].answer.set_result([0.5])
