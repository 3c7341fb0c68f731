"""Pictures of numbers: where a line ends, what a dot stands for, and when a cell is dark."""

from __future__ import annotations

import math

import pytest

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.curves import HEIGHT, SIDE, WIDTH, dots, growths, heat


def points(line: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in line.split())]


def test_a_line_ends_where_nothing_was_known_and_both_have_one_scale() -> None:
    history = pb.CanaryHistory(at_ns=[0, 10**9, 2 * 10**9, 4 * 10**9])
    history.checks.add(
        name="errors", samples=[0, 1, 0, 2], canary=[math.nan, 0.4, math.nan, 0.2], champion=[0.0, 0.0, 0.1, 0.1]
    )
    growth = growths(history)["errors"]
    assert (growth.low, growth.high, growth.seconds) == (0.0, 0.4, 4.0)
    assert [len(points(line)) for line in growth.canary] == [1, 1]
    (champion,) = map(points, growth.champion)
    assert champion[0] == (0.0, HEIGHT - 2), "the smallest of both is at the lower edge"
    assert champion[-1][0] == WIDTH
    assert points(growth.canary[0])[0] == (WIDTH / 4, 2.0), "the largest at the upper one"


def test_what_was_never_known_has_no_line_and_what_never_changed_a_level_one() -> None:
    history = pb.CanaryHistory(at_ns=[7])
    history.checks.add(name="rank", samples=[0], canary=[math.nan], champion=[math.nan])
    history.checks.add(name="slow", samples=[1], canary=[0.0], champion=[0.0])
    found = growths(history)
    assert (found["rank"].canary, found["rank"].champion) == ((), ())
    assert points(found["slow"].canary[0]) == [(0.0, HEIGHT / 2)]
    assert not growths(pb.CanaryHistory())


def test_a_calibrated_bin_is_on_the_diagonal_and_its_area_is_its_samples() -> None:
    most, few = dots([pb.ReliabilityBin(samples=400, mean_score=0.9, eligible=0.9), pb.ReliabilityBin(samples=100)])
    assert most.x == pytest.approx(SIDE - most.y)
    assert most.radius == pytest.approx(2 * few.radius)
    assert dots([pb.ReliabilityBin(samples=1), pb.ReliabilityBin(samples=10**6)])[0].radius > 2, "it can be seen"
    assert dots([]) == []


@pytest.mark.parametrize(
    ("psi", "limit", "shade"),
    [(0.0, 0.2, 1), (0.05, 0.2, 2), (0.1, 0.2, 3), (0.2, 0.2, 4), (0.4, 0.2, 5), (0.8, 0.2, 6), (9.0, None, 0)],
)
def test_a_cell_is_as_dark_as_its_index_is_many_limits(psi: float, limit: float | None, shade: int) -> None:
    assert heat(psi, pb.FeatureDrift(limit=limit)) == shade
