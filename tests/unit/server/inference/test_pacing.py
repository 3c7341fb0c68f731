"""When a batch leaves, and how many rows it may have, in virtual time."""

from __future__ import annotations

import random

from server.inference.pacing import Departure, RowLimit


def test_half_of_the_orders_under_way_are_awaited_but_no_more_than_32() -> None:
    under_way = 0
    departure = Departure(lambda: under_way)
    awaited = {}
    for under_way in (0, 1, 2, 16, 64, 1_000):
        awaited[under_way] = departure.awaited
    assert awaited == {0: 0, 1: 0.5, 2: 1, 16: 8, 64: 32, 1_000: 32}


def test_rows_that_do_not_come_are_awaited_less_and_those_that_do_more() -> None:
    departure = Departure(lambda: 64)
    for _ in range(5):
        departure.waited_in_vain()
        departure.left(1)
    assert departure.awaited == 1
    for rows in (1, 2, 2, 4, 8, 16, 32):
        departure.left(rows)
    assert departure.awaited == 32
    departure.left(1_000)
    assert departure.awaited == 32, "never more than half"


def test_single_rows_of_a_replica_that_gets_few_of_the_orders_are_not_made_to_wait_again_and_again() -> None:
    departure = Departure(lambda: 64)
    waits = 0
    for _ in range(1_000):
        if departure.awaited > 1:
            waits += 1
            departure.waited_in_vain()
        departure.left(1)
    assert waits == 5


def test_a_batch_gets_the_rows_that_fit_into_the_wanted_time() -> None:
    limit = RowLimit(256, 0.010)
    noise = random.Random(7)
    for _ in range(500):
        rows = noise.randint(1, limit.limit)
        limit.landed(rows, (0.002 + 0.0001 * rows) * noise.uniform(0.95, 1.05))
    assert 70 <= limit.limit <= 90  # 80 rows take 10 ms


def test_a_model_that_is_no_slower_with_more_rows_takes_all() -> None:
    limit = RowLimit(256, 0.010)
    for rows in range(500):
        limit.landed(1 + rows % 256, 0.002)
        assert limit.limit == 256


def test_a_model_that_takes_long_for_one_row_is_not_blamed_for_the_others() -> None:
    limit = RowLimit(256, 0.010)
    for rows in range(500):
        limit.landed(1 + rows % 256, 0.030 + 0.00002 * (1 + rows % 256))
        assert limit.limit >= 128


def test_batches_of_one_size_say_nothing_about_rows() -> None:
    limit = RowLimit(256, 0.010)
    for _ in range(100):
        limit.landed(1, 1.0)
    assert limit.limit == 256


def test_a_few_dozen_rows_fit_into_any_batch() -> None:
    limit = RowLimit(256, 0.010)
    for rows in range(100):
        limit.landed(1 + rows % 64, 0.001 * (1 + rows % 64))
    assert limit.limit == 32
