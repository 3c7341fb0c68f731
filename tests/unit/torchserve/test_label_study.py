"""Labels are compared in one walk forward, and a label is chosen by nothing that it is judged by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from feature_cache.sources.simulator import simulate
from torchserve.dataset import Market, Samples
from torchserve.evaluation import BootstrapSettings
from torchserve.label import Label
from torchserve.label_study import WIDEST, Studied, study
from torchserve.training import TrainingSettings
from torchserve.walk_forward import WalkForwardSettings

WALK = WalkForwardSettings(blocks=2, bootstrap=BootstrapSettings(resamples=20))
TRAINING = TrainingSettings(trees=20, embargo_seconds=1.0)
LABELS = tuple(
    Label(horizon_seconds=horizon, delay_seconds=delay, worst_markout_bps=-0.2)
    for delay in (0.0, 0.2)
    for horizon in (1.0, 2.0)
)


class Turned(Market):
    """A market whose labels are turned round from a time on."""

    def __init__(self, market: Market, from_ns: int) -> None:
        self._market, self._from_ns = market, from_ns

    def samples(self, label: Label) -> Samples:
        samples = self._market.samples(label)
        late = samples.time_ns >= self._from_ns
        return replace(samples, eligible=np.where(late, ~samples.eligible, samples.eligible))


@pytest.fixture(scope="module")
def market() -> Market:
    return Market(simulate(7, ["BTCUSDT.SIM"], duration_seconds=260), "simulated")


@pytest.fixture(scope="module")
def studied(market: Market) -> list[Studied]:
    return study(market, TRAINING, WALK, LABELS)


def row(one: Studied) -> tuple[Any, ...]:
    return one.figures.precision, one.figures.coverage, one.traded, one.independent


@pytest.mark.long
def test_every_label_has_its_row_and_every_delay_its_choice(studied: list[Studied]) -> None:
    rows = [(horizon, delay) for delay in (0.0, 0.2) for horizon in ("1", "2", WIDEST)]
    assert [(one.horizon, one.delay_seconds) for one in studied] == rows
    for one in studied:
        assert 0 <= one.independent <= one.traded
    # A longer horizon lets more go wrong.
    assert studied[0].base_rate > studied[1].base_rate
    # What is chosen in every block is one of the labels.
    assert row(studied[2]) in [row(one) for one in studied[:2]] or studied[2].traded > 0


def test_the_last_block_has_no_say_in_what_is_chosen(market: Market, studied: list[Studied]) -> None:
    times = market.samples(LABELS[-1]).time_ns
    last = int(times.min()) + round(0.7 * int(times.max() - times.min())) + 1_000_000_000
    turned = study(Turned(market, last), TRAINING, WALK, LABELS)
    for before, after in zip(studied, turned, strict=True):
        assert (after.traded, after.blocks_reached) == (before.traded, before.blocks_reached)
        assert after.base_rate < before.base_rate
