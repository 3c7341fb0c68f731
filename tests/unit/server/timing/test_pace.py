"""What nobody waits for works a tenth of the time."""

from __future__ import annotations

import pytest

from server.timing.pace import Pace


def rests_after(*steps: float) -> list[float]:
    now, rests = 100.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds

    pace = Pace(lambda: now, sleep)
    for took in steps:
        now += took
        pace.rest()
    return rests


def test_work_in_steps_is_done_in_a_tenth_of_the_time() -> None:
    assert rests_after(0.01, 0.02, 0.0, 3.0) == pytest.approx([0.09, 0.18, 0.0, 2.0])


def test_what_takes_long_is_done_before_it_is_wanted_again() -> None:
    assert len(rests_after(*[0.5] * 120)) == 16, "of 2.5 s with the step before each; then it goes on without"
