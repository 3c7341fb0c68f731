"""Who is admitted, and how the limit follows latency."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Clock

from server.decision.admission import Admission, AdmissionSettings
from server.errors import DrainingError, OverloadedError

TARGET = 0.015


def new_admission(
    max_in_flight: int = 100, min_in_flight: int = 4, reserved_share: float = 0
) -> tuple[Admission, Clock]:
    clock = Clock()
    settings = AdmissionSettings(
        max_in_flight=max_in_flight,
        min_in_flight=min_in_flight,
        target_seconds=TARGET,
        reserved_share=reserved_share,
    )
    return Admission(settings, clock), clock


def pass_window(admission: Admission, clock: Clock, seconds: float | None) -> None:
    """A window of calls that all took so long, or were all dropped."""
    for _ in range(20):
        clock.now += 0.01
        if seconds is None:
            admission.dropped(0.025)
        else:
            admission.answered(seconds)


def test_calls_beyond_the_limit_are_shed_and_counted() -> None:
    admission, _ = new_admission(max_in_flight=2, min_in_flight=1)
    with admission.admit(False), admission.admit(False):
        with pytest.raises(OverloadedError) as caught:
            admission.admit(False)
        assert caught.value.reason == "TOO_MANY_IN_FLIGHT"
        assert (admission.in_flight, admission.shed) == (2, 1)
    assert admission.in_flight == 0
    with admission.admit(False):
        assert admission.in_flight == 1


def test_a_call_that_fails_gives_its_place_back() -> None:
    admission, _ = new_admission(max_in_flight=1, min_in_flight=1)
    with pytest.raises(ZeroDivisionError), admission.admit(False):
        raise ZeroDivisionError
    assert admission.in_flight == 0


def test_a_draining_server_admits_nothing_new_and_lets_the_rest_finish() -> None:
    admission, _ = new_admission()
    with admission.admit(False):
        admission.draining = True
        with pytest.raises(DrainingError):
            admission.admit(True)
        assert (admission.in_flight, admission.shed) == (1, 0)
    assert admission.in_flight == 0


def test_the_reserved_lane_is_for_orders_that_only_reduce() -> None:
    admission, _ = new_admission(max_in_flight=10, reserved_share=0.2)
    for _ in range(8):
        admission.admit(False)
    with pytest.raises(OverloadedError):
        admission.admit(False)
    admission.admit(True)
    admission.admit(True)
    with pytest.raises(OverloadedError):
        admission.admit(True)
    assert (admission.in_flight, admission.shed) == (10, 2)


def test_even_a_limit_of_one_admits_an_ordinary_order() -> None:
    admission, _ = new_admission(max_in_flight=1, min_in_flight=1, reserved_share=0.9)
    with admission.admit(False):
        assert admission.in_flight == 1


def test_the_limit_starts_at_its_maximum_and_stays_there_while_calls_are_quick() -> None:
    admission, clock = new_admission()
    assert admission.limit == 100
    pass_window(admission, clock, TARGET)
    assert admission.limit == 100


def test_slow_calls_lower_the_limit_in_proportion_but_never_by_more_than_a_third() -> None:
    admission, clock = new_admission()
    pass_window(admission, clock, TARGET * 1.25)
    assert admission.limit == 80
    pass_window(admission, clock, TARGET * 100)
    assert admission.limit == 56
    pass_window(admission, clock, None)
    assert admission.limit == 39


def test_one_call_in_ten_may_be_slow() -> None:
    admission, clock = new_admission()
    for number in range(20):
        clock.now += 0.01
        admission.answered(1.0 if number in (3, 4) else 0.001)
    assert admission.limit == 100
    for number in range(20):
        clock.now += 0.01
        admission.answered(1.0 if number in (3, 4, 5) else 0.001)
    assert admission.limit == 70


def test_quick_calls_raise_the_limit_again_by_its_root() -> None:
    admission, clock = new_admission()
    for _ in range(10):
        pass_window(admission, clock, None)
    assert admission.limit == 4
    pass_window(admission, clock, 0.001)
    assert admission.limit == 6
    windows = 0
    while admission.limit < 100:
        pass_window(admission, clock, 0.001)
        windows += 1
    assert windows < 20


def test_a_window_needs_time_and_calls() -> None:
    admission, clock = new_admission()
    for _ in range(1_000):
        admission.answered(1.0)
    assert admission.limit == 100, "no time has passed"
    clock.now += 0.2
    admission.answered(1.0)
    assert admission.limit == 70
    clock.now += 10
    for _ in range(19):
        admission.answered(1.0)
    assert admission.limit == 70, "too few calls"


def test_a_call_granted_hardly_any_time_says_nothing() -> None:
    admission, clock = new_admission()
    for _ in range(100):
        clock.now += 0.01
        admission.dropped(TARGET / 4)
    assert admission.limit == 100


@given(
    bounds=st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted),
    windows=st.lists(st.one_of(st.none(), st.floats(0, 10)), max_size=40),
)
def test_the_limit_keeps_its_bounds(bounds: list[int], windows: list[float | None]) -> None:
    admission, clock = new_admission(max_in_flight=bounds[1], min_in_flight=bounds[0])
    for seconds in windows:
        before = admission.limit
        pass_window(admission, clock, seconds)
        assert bounds[0] <= admission.limit <= bounds[1]
        if seconds is not None and seconds <= TARGET:
            assert admission.limit >= before
        else:
            assert admission.limit <= before
