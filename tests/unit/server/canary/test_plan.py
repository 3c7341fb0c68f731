"""A canary's share of the flows, and its way from step to step."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from server.canary.plan import Canary
from server.canary.settings import CanarySettings, check_steps

STEPS = (0.01, 0.05, 0.25, 0.5, 1.0)
FLOWS = [(f"S{number % 7}.SIM", f"strategy-{number}") for number in range(20_000)]


def canary(canary_id: str = "one") -> Canary:
    return Canary.start(canary_id, "ab" * 8, "cd" * 8, STEPS, "ann", "better", now=100.0)


def taken(one: Canary) -> set[tuple[str, str]]:
    return {flow for flow in FLOWS if one.takes(*flow)}


def test_a_canary_takes_its_share_of_the_flows() -> None:
    one = canary()
    for share in STEPS:
        assert one.weight == share
        assert len(taken(one)) / len(FLOWS) == pytest.approx(share, rel=0.2)
        one = one.advanced(now=200.0)


def test_a_flow_that_came_to_the_canary_stays_while_its_weight_grows() -> None:
    one, before = canary(), set[tuple[str, str]]()
    for _ in STEPS:
        assert before <= taken(one)
        before, one = taken(one), one.advanced(now=200.0)


def test_another_canary_begins_with_other_flows() -> None:
    one, two = (taken(canary(name).weighted(0.25, held=True, now=0.0)) for name in ("one", "two"))
    assert len(one & two) / len(one) == pytest.approx(0.25, abs=0.05)


def test_a_canary_of_a_part_of_the_orders_takes_its_share_of_that_part_alone() -> None:
    held = Canary.start("one", "ab" * 8, "cd" * 8, (0.25, 1.0), "ann", "better", 100.0, "S[12].SIM", "strategy-1*")
    assert held.is_partial
    assert not canary().is_partial
    covered = {flow for flow in FLOWS if flow[0] in ("S1.SIM", "S2.SIM") and flow[1].startswith("strategy-1")}
    assert {flow for flow in FLOWS if held.covers(*flow)} == covered
    assert taken(held) < covered
    assert len(taken(held)) / len(covered) == pytest.approx(0.25, rel=0.2)
    assert taken(held.advanced(now=200.0)) == covered
    with pytest.raises(ValidationError):
        Canary.start("one", "ab" * 8, "cd" * 8, (1.0,), "ann", "better", 100.0, strategy="x" * 65)


def test_a_canary_without_weight_takes_nothing() -> None:
    assert not taken(canary().ended("rolled_back", "slow", now=150.0))


def test_the_last_step_is_all_flows_and_then_promotion() -> None:
    one = canary()
    for _ in range(10):
        one = one.advanced(now=200.0)
    assert one.at_last_step
    assert one.weight == 1.0
    promoted = one.ended("promoted", "proven", now=300.0)
    assert (promoted.step, promoted.weight, promoted.running, promoted.ended_at) == (len(STEPS), 0.0, False, 300.0)


def test_an_operators_weight_sets_the_step_it_goes_on_from() -> None:
    one = canary().weighted(0.3, held=True, now=150.0)
    assert (one.weight, one.step, one.held) == (0.3, 2, True)
    assert one.weighted(0.3, held=False, now=151.0).advanced(now=152.0).weight == 0.5


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (0.5,),
        (0.5, 0.5, 1.0),
        (0.5, 0.1, 1.0),
        (0.0, 1.0),
        (0.1, 1.5),
        (math.nan, 1.0),
        (0.1, math.nan, 1.0),
        (-math.inf, 1.0),
        (math.nan,),
    ],
)
def test_steps_that_do_not_increase_to_one_are_refused(steps: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        CanarySettings(steps=steps)
    with pytest.raises(ValueError, match="increase from above 0 to 1"):
        check_steps(steps)
    with pytest.raises(ValidationError):
        canary().model_validate(canary().model_dump() | {"steps": steps})


@pytest.mark.parametrize("field", ["weight", "started_at", "step_started_at", "ended_at"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_canary_of_the_control_state_with_a_number_that_is_none_is_refused(field: str, value: str) -> None:
    document = json.loads(canary().model_dump_json()) | {field: float(value)}
    with pytest.raises(ValidationError):
        Canary.model_validate_json(json.dumps(document))
