"""A canary's evidence over time: a bounded number of looks, evenly spread however long it takes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from support.cases import Clock

from server.canary.evidence import Evidence
from server.canary.history import MOST, EvidenceHistory
from server.canary.pairing import Side
from server.canary.settings import CanarySettings
from server.inference.outcome import Outcome


@pytest.fixture
def evidence() -> Evidence:
    return Evidence(CanarySettings(), Clock())


def batches(evidence: Evidence, outcome: Outcome) -> None:
    evidence.observe_batch(Side.CANARY, outcome, 0.001)
    evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, 0.001)


def test_each_look_has_what_every_check_said_then(evidence: Evidence) -> None:
    history = EvidenceHistory()
    history.look(evidence, 0.05, 1)
    batches(evidence, Outcome.TRANSPORT)
    batches(evidence, Outcome.SUCCESS)
    history.look(evidence, 0.25, 2)
    assert (history.at_ns, history.weight) == ([1, 2], [0.05, 0.25])
    assert history.checks.keys() == evidence.checks.keys()
    errors = history.checks["errors"]
    assert errors.samples == [0, 2]
    assert (errors.canary[1], errors.champion[1]) == (0.5, 0.0)
    assert math.isnan(errors.canary[0])


@pytest.mark.parametrize("looks", [1, MOST - 1, MOST, MOST + 1, 2 * MOST + 1, 5_000])
def test_however_long_it_takes_the_looks_are_few_and_evenly_spread(evidence: Evidence, looks: int) -> None:
    history = EvidenceHistory()
    for second in range(looks):
        history.look(evidence, 0.05, second)
    assert min(looks, MOST // 2) <= len(history.at_ns) <= MOST
    assert history.at_ns[0] == 0, "its beginning stays"
    assert len({after - before for before, after in pairwise(history.at_ns)}) <= 1
    assert looks - 1 - history.at_ns[-1] <= looks / (MOST / 2), "the newest look is as near as the others are apart"
    assert {len(one.samples) for one in history.checks.values()} == {len(history.at_ns)}
