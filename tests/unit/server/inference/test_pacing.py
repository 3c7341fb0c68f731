"""Slots and rows follow from how a replica answers, in virtual time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest

from server.inference.pacing import RowLimit, SlotSearch

MOST = 4
ROWS = 32


def drive(
    search: SlotSearch,
    batch_seconds: Callable[[int], float],
    seconds: float,
    *,
    began: float = 0.0,
    others_wait: bool = True,
) -> list[int]:
    """Flies batches for so long, as many at once as there are slots; returns the slots at each landing.

    Args:
        search: Says how many.
        batch_seconds: Time of a batch that leaves beside so many, itself included.
        seconds: How long.
        began: Instant of the beginning.
        others_wait: Whether rows wait for a slot at every landing.
    """
    noise = random.Random(7)
    landings: list[float] = []
    seen = []
    now = began
    while now < began + seconds:
        while len(landings) < search.limit:
            heapq.heappush(landings, now + batch_seconds(len(landings) + 1) * noise.uniform(0.9, 1.1))
        now = heapq.heappop(landings)
        search.landed(ROWS, others_wait, now)
        seen.append(search.limit)
    return seen


def test_a_replica_that_scores_batches_side_by_side_gets_all_the_slots_there_may_be() -> None:
    search = SlotSearch(2, MOST, 0.0)
    drive(search, lambda at_once: 0.005, 60.0)
    late = drive(search, lambda at_once: 0.005, 60.0, began=60.0)
    assert sorted(late)[len(late) // 2] == MOST
    assert max(late) == MOST


def test_a_replica_that_scores_one_batch_after_the_other_gets_one() -> None:
    search = SlotSearch(2, MOST, 0.0)
    drive(search, lambda at_once: 0.005 * at_once, 60.0)
    late = drive(search, lambda at_once: 0.005 * at_once, 60.0, began=60.0)
    assert sorted(late)[len(late) // 2] == 1
    assert min(late) == 1


def test_a_replica_that_changes_is_found_out() -> None:
    search = SlotSearch(2, MOST, 0.0)
    drive(search, lambda at_once: 0.005 * at_once, 60.0)
    drive(search, lambda at_once: 0.005, 120.0, began=60.0)
    late = drive(search, lambda at_once: 0.005, 30.0, began=180.0)
    assert sorted(late)[len(late) // 2] == MOST


def test_without_rows_that_wait_the_number_to_start_with_holds() -> None:
    search = SlotSearch(2, MOST, 0.0)
    assert set(drive(search, lambda at_once: 0.005 * at_once, 60.0, others_wait=False)) == {2}
    drive(search, lambda at_once: 0.005 * at_once, 60.0, began=60.0)
    assert drive(search, lambda at_once: 0.005, 5.0, began=120.0, others_wait=False)[-1] == 2


@pytest.mark.parametrize("most", [1, 2])
def test_a_fixed_number_stays(most: int) -> None:
    search = SlotSearch(2, most, 0.0)
    assert set(drive(search, lambda at_once: 0.005, 60.0)) == {2}


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
