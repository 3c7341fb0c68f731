"""When a caller on grpc.aio stops waiting, also when the wall clock steps."""

from __future__ import annotations

import pytest

from server.timing.call_deadlines import CallDeadlines


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
def deadlines(clocks: Clocks) -> CallDeadlines:
    return CallDeadlines(lambda: clocks.monotonic, clocks.wall)


def test_what_the_transport_says_is_believed(clocks: Clocks, deadlines: CallDeadlines) -> None:
    for said in (None, 0.0, 0.02, 31_536_000.0):
        clocks.monotonic += 3_600.0
        assert deadlines.deadline(said) == (None if said is None else clocks.monotonic + said)


def test_a_call_that_a_step_made_look_expired_gets_the_cap(clocks: Clocks, deadlines: CallDeadlines) -> None:
    clocks.step = 3_600.0
    assert deadlines.deadline(0.02) == clocks.monotonic + 0.02
    assert deadlines.deadline(0.0) is None
    clocks.monotonic += 0.2
    assert deadlines.deadline(0.0) is None


def test_after_a_step_expired_calls_are_soon_refused_again(clocks: Clocks, deadlines: CallDeadlines) -> None:
    clocks.step = -3_600.0
    assert deadlines.deadline(0.0) is None
    clocks.monotonic += 0.3
    assert deadlines.deadline(0.0) == clocks.monotonic


def test_a_clock_that_is_slewed_has_not_stepped(clocks: Clocks, deadlines: CallDeadlines) -> None:
    for _ in range(100):
        clocks.monotonic += 0.01
        clocks.step += 0.000_005
        assert deadlines.deadline(0.0) == clocks.monotonic
