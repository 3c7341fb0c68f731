"""The phases of the benchmark: everything that is wanted is measured, once, beside what it is held against."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.benchmark.targets import TARGETS
from local.bench.phases import BEFORE, Phase, phases, phases_against


def measured(found: list[Phase]) -> list[tuple[str, str]]:
    """Servers and loads; those that a phase does not have are no loads of it."""
    pairs = []
    for phase in found:
        for load in (*phase.plan.closed, *phase.plan.opened):
            servers = load.servers or tuple(phase.servers)
            assert set(servers) <= set(phase.servers)
            pairs += [(server, load.name) for server in servers]
        pairs += [(server, "CPU") for server in phase.costs]
    return pairs


@pytest.mark.parametrize("quick", [False, True])
def test_every_target_is_measured_and_nothing_twice(quick: bool) -> None:
    pairs = measured(phases(quick=quick, rounds=None, seconds=None, deadline_seconds=0.2))
    assert {(target.server, target.load) for target in TARGETS} <= set(pairs)
    assert len(set(pairs)) == len(pairs)


def test_medians_are_of_five_rounds_unless_it_is_to_be_quick() -> None:
    full = phases(quick=False, rounds=None, seconds=None, deadline_seconds=0.2)
    (quick,) = phases(quick=True, rounds=None, seconds=None, deadline_seconds=0.2)
    assert {phase.plan.rounds for phase in full} == {5}
    assert (quick.plan.rounds, len(full)) == (1, 4)
    (short,) = phases(quick=True, rounds=2, seconds=0.1, deadline_seconds=0.2)
    assert (short.plan.rounds, short.plan.seconds, short.cost_seconds) == (2, 0.1, 0.5)


def test_calling_takes_six_and_a_half_of_the_ten_minutes_and_the_rest_is_for_four_starts() -> None:
    planned = 0.0
    for phase in phases(quick=False, rounds=None, seconds=None, deadline_seconds=0.2):
        plan = phase.plan
        for loads, seconds in ((plan.closed, plan.seconds), (plan.opened, plan.open_seconds)):
            planned += sum(plan.rounds * seconds * len(load.servers or phase.servers) for load in loads)
        planned += phase.cost_seconds * len(phase.costs)
    assert planned <= 390


@pytest.mark.parametrize("quick", [False, True])
def test_an_older_commit_is_called_in_the_same_rounds(quick: bool) -> None:
    lengths: Any = {"quick": quick, "rounds": None, "seconds": None, "deadline_seconds": 0.2}
    usual, against = measured(phases(**lengths)), measured(phases_against(**lengths))
    for today, before in BEFORE.items():
        loads = {load for server, load in usual if server == today and "%" not in load}
        assert loads == {load for server, load in against if server == today}
        assert loads == {load for server, load in against if server == before}
