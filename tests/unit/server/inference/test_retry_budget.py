from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Clock

from server.inference.retry_budget import RetryBudget, RetrySettings


def granted(budget: RetryBudget, tries: int) -> int:
    return sum(budget.try_take() for _ in range(tries))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_without_traffic_one_retry_a_second_is_granted(clock: Clock) -> None:
    assert granted(RetryBudget(RetrySettings(), clock), 100) == 10


def test_a_share_of_recent_attempts_comes_on_top(clock: Clock) -> None:
    budget = RetryBudget(RetrySettings(), clock)
    for _ in range(1_000):
        budget.count_attempts()
    assert granted(budget, 1_000) == 110


def test_attempts_and_retries_older_than_ten_seconds_do_not_count(clock: Clock) -> None:
    budget = RetryBudget(RetrySettings(), clock)
    for _ in range(1_000):
        budget.count_attempts()
    clock.now += 9
    assert granted(budget, 1_000) == 110
    clock.now += 1
    assert granted(budget, 1_000) == 0, "the attempts are forgotten, the retries are not"
    clock.now += 9
    assert granted(budget, 1_000) == 10


def test_nothing_is_granted_when_nothing_is_allowed(clock: Clock) -> None:
    budget = RetryBudget(RetrySettings(share=0, per_second=0), clock)
    budget.count_attempts()
    assert granted(budget, 10) == 0


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50), st.integers(0, 50)), max_size=40),
    share=st.floats(0, 1),
    per_second=st.floats(0, 5),
)
def test_retries_never_exceed_their_share(steps: list[tuple[float, int, int]], share: float, per_second: float) -> None:
    clock = Clock()
    budget = RetryBudget(RetrySettings(share=share, per_second=per_second), clock)
    attempts: list[float] = []
    retries: list[float] = []
    for pause, tried, wanted in steps:
        clock.now += pause
        for _ in range(tried):
            budget.count_attempts()
            attempts.append(clock.now)
        retries += [clock.now] * granted(budget, wanted)
        recent = [sum(int(at) > int(clock.now) - 10 for at in instants) for instants in (attempts, retries)]
        if retries and retries[-1] == clock.now:
            assert recent[1] <= share * recent[0] + 10 * per_second + 1e-9
