"""What is left of a caller's deadline when the wall clock steps."""

from __future__ import annotations

import pytest

from server.timing.remaining import RemainingTime


class Clocks:
    """A monotonic clock and a wall clock that can be moved apart."""

    def __init__(self) -> None:
        self.monotonic = 100.0
        self.step = 0.0

    def wall(self) -> float:
        return 1_700_000_000.0 + self.monotonic + self.step


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def remaining_time(clocks: Clocks) -> RemainingTime:
    return RemainingTime(lambda: clocks.monotonic, clocks.wall)


def test_what_the_transport_says_is_believed(clocks: Clocks, remaining_time: RemainingTime) -> None:
    for said in (None, 0.0, 0.02, 31_536_000.0):
        clocks.monotonic += 3_600.0
        assert remaining_time.corrected(said) == said


def test_a_call_that_a_step_made_look_expired_gets_the_cap(clocks: Clocks, remaining_time: RemainingTime) -> None:
    clocks.step = 3_600.0
    assert remaining_time.corrected(0.02) == 0.02
    assert remaining_time.corrected(0.0) is None
    clocks.monotonic += 0.2
    assert remaining_time.corrected(0.0) is None


def test_after_a_step_expired_calls_are_soon_refused_again(clocks: Clocks, remaining_time: RemainingTime) -> None:
    clocks.step = -3_600.0
    assert remaining_time.corrected(0.0) is None
    clocks.monotonic += 0.3
    assert remaining_time.corrected(0.0) == 0.0


def test_a_clock_that_is_slewed_has_not_stepped(clocks: Clocks, remaining_time: RemainingTime) -> None:
    for _ in range(100):
        clocks.monotonic += 0.01
        clocks.step += 0.000_005
        assert remaining_time.corrected(0.0) == 0.0
