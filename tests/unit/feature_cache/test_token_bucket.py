"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from feature_cache.token_bucket import TokenBucket, TokenBuckets


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(10.0, 0.5, clock)
    assert [buckets.take("a") for _ in range(7)] == [True] * 5 + [False] * 2
    assert buckets.take("b"), "a bucket of its own"
    clock.now += 0.1
    assert [buckets.take("a"), buckets.take("a")] == [True, False]
    clock.now += 60
    assert [buckets.take("a") for _ in range(6)] == [True] * 5 + [False]


def test_a_bucket_of_less_than_one_a_second_holds_one() -> None:
    bucket = TokenBucket(1.0)
    assert bucket.is_full(0.0)
    assert [bucket.take(now, 0.1) for now in (0.0, 9.0, 10.0)] == [True, False, True]
    assert not bucket.is_full(19.0)
    assert bucket.is_full(20.0)


def test_an_empty_bucket_fills_at_a_rate_that_changes() -> None:
    bucket = TokenBucket(1.0)
    assert sum(bucket.take(0.0, 2.0) for _ in range(5)) == 2
    assert not bucket.has(0.0, 10.0), "a higher rate fills it faster, but not at once"
    assert sum(bucket.take(0.5, 10.0) for _ in range(20)) == 5


def test_each_name_has_the_rate_that_it_is_given() -> None:
    clock = Clock()
    buckets = TokenBuckets(1.0, 2.0, clock)
    assert [sum(buckets.take(name, rate) for _ in range(100)) for name, rate in (("desk", 20.0), ("trial", 1.0))] == [
        40,
        2,
    ]
    clock.now += 1.0
    assert [sum(buckets.take(name, rate) for _ in range(100)) for name, rate in (("desk", 20.0), ("trial", 1.0))] == [
        20,
        1,
    ]
    assert buckets.take("slow", 0.1), "one at least, however low the rate"
    assert not buckets.take("slow", 0.1)


def test_looking_takes_nothing() -> None:
    buckets = TokenBuckets(1.0, 2.0, Clock())
    assert all(buckets.has("a") for _ in range(10))
    assert buckets.take("a")
    assert buckets.take("a")
    assert not buckets.has("a")


def test_names_are_forgotten_the_oldest_first() -> None:
    buckets = TokenBuckets(1.0, 1.0, Clock())
    assert buckets.take("oldest")
    assert not buckets.take("oldest")
    for number in range(10_000):
        buckets.take(f"{number}")
    assert buckets.take("oldest"), "forgotten, with a full bucket"
    assert not buckets.take("9999")


def test_a_name_with_a_full_bucket_is_forgotten_for_a_new_one() -> None:
    clock = Clock()
    buckets = TokenBuckets(10.0, 1.0, clock)
    for number in range(1_000):
        assert buckets.take(f"{number}")
        clock.now += 0.1
    assert len(buckets) <= 2


def test_no_more_names_are_remembered_than_the_bound() -> None:
    buckets = TokenBuckets(1.0, 1.0, Clock())
    for number in range(20_000):
        assert buckets.take(f"{number}")
    assert len(buckets) == 10_000


@given(
    burst_seconds=st.floats(0, 5),
    steps=st.lists(st.tuples(st.floats(0, 2), st.floats(0.5, 1e4)), min_size=1, max_size=200),
)
def test_a_rate_that_changes_never_lets_more_pass_than_the_highest_would(
    burst_seconds: float, steps: list[tuple[float, float]]
) -> None:
    bucket = TokenBucket(burst_seconds)
    highest = max(rate for _, rate in steps)
    now, taken = 0.0, 0
    for gap, rate in steps:
        now += gap
        taken += bucket.take(now, rate)
    assert taken <= max(1.0, burst_seconds * highest) + highest * now + 1e-6 * len(steps) + 1


@given(
    per_second=st.floats(0.5, 1e4),
    burst_seconds=st.floats(0, 5),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_nobody_gets_more_than_burst_and_rate(per_second: float, burst_seconds: float, gaps: list[float]) -> None:
    clock = Clock()
    buckets = TokenBuckets(per_second, burst_seconds, clock)
    taken = 0
    for gap in gaps:
        clock.now += gap
        could = buckets.has("a")
        assert buckets.take("a") == could
        taken += could
    assert taken <= max(1.0, burst_seconds * per_second) + per_second * (clock.now - 1_000.0) + 1e-6 * len(gaps) + 1


def test_without_a_limit_of_names_only_a_full_bucket_is_forgotten() -> None:
    now = 0.0
    buckets = TokenBuckets(1.0, 1.0, lambda: now, most_names=None)
    assert buckets.take("mine")
    assert all(buckets.take(f"invented-{number}") for number in range(10_001))
    assert not buckets.take("mine")
    now = 1.0
    assert buckets.take("mine")
    assert buckets.take("another")
    assert len(buckets) == 2
