"""The capacity model against the measurement that is kept with it: what it foretold, and what came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from loadtest.costs import Costs
from local.capacity_fit import Batches, Point, check

KEPT: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[3] / "loadtest" / "results" / "capacity.json").read_text()
)
COSTS: Final = Costs.model_validate(KEPT["costs"])
TOLERANCES: Final = {"rows of a batch": 0.25, "server cores": 0.25, "event loop": 0.35, "p50 ms": 0.35}
"""As `docs/capacity.md` says; the p99 of a busy machine is not foretold so closely."""


def held_out() -> list[Point]:
    points = [KEPT["points"][number] for number in KEPT["held_out"]]
    return [
        Point(**{**one, "replica": Batches(**one["replica"]), "journal": Batches(**one["journal"])}) for one in points
    ]


@pytest.mark.parametrize("point", held_out(), ids=lambda point: f"{point.rate:.0f}/s")
def test_a_rate_that_the_costs_were_not_taken_from_is_foretold(point: Point) -> None:
    checked = check(COSTS, point, KEPT["machine"]["cores"])
    for what, tolerance in TOLERANCES.items():
        assert checked["model"][what] == pytest.approx(checked["measured"][what], rel=tolerance), what
    assert checked["measured"]["p99 ms"] / 2 < checked["model"]["p99 ms"] < 2 * checked["measured"]["p99 ms"]


def test_the_costs_that_plans_are_made_of_are_the_measured_ones() -> None:
    for name, section in Costs.read().model_dump().items():
        assert section == pytest.approx(KEPT["costs"][name], rel=1e-3)
