"""The pauses between attempts."""

from __future__ import annotations

import pytest

from feature_cache.backoff import Backoff

UNCHANGED = (1.0, 1.0)


def test_each_pause_is_twice_the_last_up_to_the_longest() -> None:
    backoff = Backoff(0.5, 3.0, spread=UNCHANGED)
    assert [backoff.next_pause() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_it_begins_again_with_the_first_pause_after_a_reset() -> None:
    backoff = Backoff(0.5, 3.0, spread=UNCHANGED)
    backoff.next_pause()
    backoff.next_pause()
    backoff.reset()
    assert backoff.next_pause() == 0.5


def test_the_first_pause_is_no_longer_than_the_longest() -> None:
    assert Backoff(10.0, 0.75, spread=UNCHANGED).next_pause() == 0.75


@pytest.mark.parametrize(
    ("spread", "uniform", "pause"),
    [((0.5, 1.0), 0.0, 1.0), ((0.5, 1.0), 0.5, 1.5), ((0.75, 1.25), 0.5, 2.0), ((1.0, 0.8), 0.0, 2.0)],
)
def test_a_pause_is_multiplied_by_a_random_factor_within_the_spread(
    spread: tuple[float, float], uniform: float, pause: float
) -> None:
    assert Backoff(2.0, 8.0, spread=spread, uniform=lambda: uniform).next_pause() == pytest.approx(pause)


def test_the_random_factor_does_not_change_how_fast_the_pauses_grow() -> None:
    backoff = Backoff(1.0, 8.0, spread=(0.5, 1.0), uniform=lambda: 0.0)
    assert [backoff.next_pause() for _ in range(4)] == [0.5, 1.0, 2.0, 4.0]


def test_the_next_pause_is_known_beforehand_without_its_random_factor() -> None:
    backoff = Backoff(1.0, 8.0)
    backoff.next_pause()
    assert backoff.seconds == 2.0
