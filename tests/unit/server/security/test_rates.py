"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.security.rates import Rates


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(10.0, 0.5, clock)
    assert [rates.take("a") for _ in range(7)] == [True] * 5 + [False] * 2
    assert rates.take("b"), "a bucket of its own"
    clock.now += 0.1
    assert [rates.take("a"), rates.take("a")] == [True, False]
    clock.now += 60
    assert [rates.take("a") for _ in range(6)] == [True] * 5 + [False]


def test_each_name_has_the_rate_that_it_is_given() -> None:
    clock = Clock()
    rates = Rates(1.0, 2.0, clock)
    assert [sum(rates.take(name, rate) for _ in range(100)) for name, rate in (("desk", 20.0), ("trial", 1.0))] == [
        40,
        2,
    ]
    clock.now += 1.0
    assert [sum(rates.take(name, rate) for _ in range(100)) for name, rate in (("desk", 20.0), ("trial", 1.0))] == [
        20,
        1,
    ]
    assert rates.take("slow", 0.1), "one at least, however low the rate"
    assert not rates.take("slow", 0.1)


def test_looking_takes_nothing() -> None:
    rates = Rates(1.0, 2.0, Clock())
    assert all(rates.has("a") for _ in range(10))
    assert rates.take("a")
    assert rates.take("a")
    assert not rates.has("a")


def test_names_are_forgotten_the_oldest_first() -> None:
    rates = Rates(1.0, 1.0, Clock())
    assert rates.take("oldest")
    assert not rates.take("oldest")
    for number in range(10_000):
        rates.take(f"{number}")
    assert rates.take("oldest"), "forgotten, with a full bucket"
    assert not rates.take("9999")


@given(
    per_second=st.floats(0.5, 1e4),
    burst_seconds=st.floats(0, 5),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=200),
)
def test_nobody_gets_more_than_burst_and_rate(per_second: float, burst_seconds: float, gaps: list[float]) -> None:
    clock = Clock()
    rates = Rates(per_second, burst_seconds, clock)
    taken = 0
    for gap in gaps:
        clock.now += gap
        could = rates.has("a")
        assert rates.take("a") == could
        taken += could
    assert taken <= max(1.0, burst_seconds * per_second) + per_second * (clock.now - 1_000.0) + 1e-6 * len(gaps) + 1
