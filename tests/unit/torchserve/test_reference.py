"""What drift is measured against says of how many samples it was made, and what those are worth."""

from __future__ import annotations

import numpy as np
import pytest

from feature_cache import features
from torchserve.dataset import STEP_NS, Samples
from torchserve.reference import SCORE, correlation_steps, reference_histogram
from torchserve.training import TrainedModel, TrainingSettings, split_by_time


@pytest.mark.parametrize("name", ["champion", "challenger"])
def test_every_histogram_counts_the_samples_that_it_was_made_of(
    name: str, models: dict[str, TrainedModel], samples: Samples, settings: TrainingSettings
) -> None:
    split = split_by_time(samples.time_ns, settings)
    for of, histogram in models[name].reference.items():
        made_of = split.calibration if of == SCORE else split.train
        (part,) = histogram.instruments.values()
        assert part.samples == len(made_of), of
        assert part.independent <= len(made_of) / 2, "a sell repeats the buy of its instant"
        assert part.independent == pytest.approx(len(made_of) / 2 * STEP_NS / 1e9 / histogram.correlation_seconds)


def test_values_that_repeat_each_other_are_worth_less() -> None:
    n = 2_000
    random = np.random.default_rng(5)
    samples = Samples(
        rows=np.zeros((n, features.N_FEATURES), np.float32),
        eligible=np.ones(n, np.bool_),
        markout_bps=np.zeros(n),
        time_ns=np.arange(n, dtype=np.int64) * STEP_NS,
        sell=np.zeros(n, np.bool_),
        instrument=np.zeros(n, np.int16),
        instruments=("A.SIM",),
        source="test",
    )
    fresh = reference_histogram(random.normal(size=n), samples).instruments["A.SIM"]
    repeated = reference_histogram(np.repeat(random.normal(size=n // 10), 10), samples).instruments["A.SIM"]
    assert fresh.samples == repeated.samples == n
    assert fresh.independent > 0.8 * n
    assert repeated.independent < n / 5
    assert correlation_steps(np.arange(n) % 2) == 1.0
