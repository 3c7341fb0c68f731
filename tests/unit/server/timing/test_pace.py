"""What nobody waits for works a tenth of the time."""

from __future__ import annotations

import pytest

from server.timing.pace import Pace


def test_work_in_steps_is_done_in_a_tenth_of_the_time() -> None:
    now, rests = 100.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        rests.append(seconds)
        now += seconds

    pace = Pace(lambda: now, sleep)
    for took in (0.01, 0.02, 0.0, 3.0):
        now += took
        pace.rest()
    assert rests == pytest.approx([0.09, 0.18, 0.0, 2.0])
