"""Training is honest about time, repeatable, and says what it reached."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_cache.features import INDEX
from torchserve.dataset import Samples, SamplesError
from torchserve.handler import calibrated
from torchserve.label import Label
from torchserve.training import (
    KINDS,
    TrainedModel,
    TrainingSettings,
    calibrate,
    fit,
    fit_platt,
    measure,
    split_by_time,
    train,
)


@given(st.lists(st.integers(0, 400), min_size=2, max_size=300), st.floats(0.2, 0.6), st.floats(0.1, 0.3))
def test_no_label_of_a_part_reaches_into_the_next(
    seconds: list[int], train_fraction: float, calibration_fraction: float
) -> None:
    time_ns = np.sort(np.array(seconds, dtype=np.int64)) * 1_000_000_000
    settings = TrainingSettings(train_fraction=train_fraction, calibration_fraction=calibration_fraction)
    try:
        parts = split_by_time(time_ns, settings)
    except SamplesError:
        return
    for earlier, later in itertools.pairwise(parts):
        assert time_ns[earlier].max() + 2 * settings.label.span_ns < time_ns[later].min()


def test_the_parts_of_a_session_are_in_order_and_hold_almost_all_of_it(samples: Samples) -> None:
    parts = split_by_time(samples.time_ns, TrainingSettings())
    for earlier, later in itertools.pairwise(parts):
        assert earlier.max() < later.min()
    assert sum(map(len, parts)) > 0.8 * len(samples.rows)


@pytest.mark.parametrize("name", KINDS)
def test_learning_stops_where_samples_that_fit_nothing_say(
    name: str, samples: Samples, settings: TrainingSettings
) -> None:
    most = settings.model_copy(update={"trees": 400, "epochs": 60})
    # Labels that mean nothing: whatever is learnt from them is wrong elsewhere.
    shuffled = np.random.default_rng(1).permutation(samples.eligible)
    stopped = train(name, replace(samples, eligible=shuffled), most)
    assert 1 <= stopped.rounds < {"champion": 200, "challenger": 30}[name]
    assert stopped.metrics["test"].auc < 0.6


@pytest.mark.parametrize("name", KINDS)
def test_the_same_samples_and_seed_give_the_same_model(
    name: str, samples: Samples, settings: TrainingSettings, models: dict[str, TrainedModel]
) -> None:
    torch.manual_seed(99)  # whatever else the process has drawn does not matter
    assert train(name, samples, settings) == models[name]
    other = train(name, samples, settings.model_copy(update={"seed": settings.seed + 1}))
    assert other.weights != models[name].weights


@pytest.mark.parametrize("name", KINDS)
def test_the_test_part_teaches_nothing(
    name: str, samples: Samples, settings: TrainingSettings, models: dict[str, TrainedModel]
) -> None:
    rows, eligible = samples.rows.copy(), samples.eligible.copy()
    test = split_by_time(samples.time_ns, settings).test
    rows[test] = 0
    eligible[test[::2]] = ~eligible[test[::2]]
    changed = train(name, replace(samples, rows=rows, eligible=eligible), settings)
    model = models[name]
    assert (changed.weights, changed.slope, changed.threshold) == (model.weights, model.slope, model.threshold)
    assert changed.metrics["threshold"] == model.metrics["threshold"]
    assert changed.metrics["test"] != model.metrics["test"]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_learns_something_from_twenty_minutes_of_a_slow_market(
    name: str, models: dict[str, TrainedModel]
) -> None:
    # A session as short as this shows a ranking, and no calibration.
    assert models[name].metrics["test"].auc > 0.55


def test_training_leaves_torch_as_it_was(samples: Samples, settings: TrainingSettings) -> None:
    state = torch.random.get_rng_state()
    train("challenger", samples, settings)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_too_short_a_session_is_refused(samples: Samples, settings: TrainingSettings) -> None:
    few = samples.take(np.arange(40))
    with pytest.raises(SamplesError, match="part is empty: 40 samples"):
        train("champion", few, settings)


def test_a_session_without_samples_is_refused(samples: Samples, settings: TrainingSettings) -> None:
    none = samples.take(np.arange(0))
    with pytest.raises(SamplesError, match="0 samples"):
        train("champion", none, settings)


def test_a_part_with_one_label_is_refused(samples: Samples, settings: TrainingSettings) -> None:
    with pytest.raises(SamplesError, match="same label"):
        train("champion", replace(samples, eligible=np.ones_like(samples.eligible)), settings)


def test_a_feature_that_is_never_defined_is_bearable(samples: Samples, settings: TrainingSettings) -> None:
    rows = samples.rows.copy()
    rows[:, 3] = np.nan
    network = train("challenger", replace(samples, rows=rows), settings).network
    assert network is not None
    assert (network["median"][3], network["scale"][3]) == (0.0, 1.0)


def test_calibration_finds_the_curve_the_labels_were_drawn_from() -> None:
    generator = np.random.default_rng(3)
    margin = generator.normal(size=200_000).astype(np.float32)
    eligible = generator.random(200_000) < 1 / (1 + np.exp(-(1.7 * margin - 0.4)))
    slope, intercept = fit_platt(margin, eligible)
    assert slope == pytest.approx(1.7, abs=0.05)
    assert intercept == pytest.approx(-0.4, abs=0.05)


def test_a_model_that_ranks_the_wrong_way_round_scores_the_base_rate() -> None:
    margin = np.linspace(-1, 1, 1_000, dtype=np.float32)
    slope, intercept = fit_platt(margin, margin < 0.5)
    assert slope == 0
    assert 1 / (1 + np.exp(-intercept)) == pytest.approx(0.75, abs=0.01)


def test_a_model_that_knows_nothing_trades_nothing(samples: Samples) -> None:
    learnt = samples.rows[:, 2]
    eligible = learnt > np.quantile(learnt, 0.04)

    def wrong_way_round(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return -rows[:, 2]

    settings = TrainingSettings(label=samples.label)
    split = split_by_time(samples.time_ns, settings)
    slope, intercept, cut = calibrate(wrong_way_round, replace(samples, eligible=eligible), split, settings)
    scores = calibrated(wrong_way_round(samples.rows), slope, intercept)
    assert (slope, cut.reached, cut.traded) == (0, False, 0)
    assert scores.max() < np.float32(cut.threshold) == cut.threshold <= 1, (
        "the base rate is what the target would allow"
    )
    assert not measure(scores, samples, cut.threshold, 0.95).coverage


def test_samples_of_another_label_are_refused(samples: Samples, settings: TrainingSettings) -> None:
    other = settings.model_copy(update={"label": Label(horizon_seconds=1.0)})
    with pytest.raises(SamplesError, match="not 'side-signed mid markout over the next 1 s"):
        train("champion", samples, other)


def test_the_champion_looks_at_few_features_and_each_only_helps_or_only_harms(
    samples: Samples, settings: TrainingSettings
) -> None:
    split = split_by_time(samples.time_ns, settings)
    directions = settings.monotone.directions
    model = fit("monotone", samples, split, settings)
    rows = samples.rows[split.test][:200]
    seen = [INDEX[name] for name in directions]
    blind = np.full_like(rows, np.nan)
    blind[:, seen] = rows[:, seen]
    np.testing.assert_array_equal(model.scores(blind), model.scores(rows))
    assert len(np.unique(model.scores(rows))) > 5
    for name, direction in directions.items():
        more = rows.copy()
        more[:, INDEX[name]] += direction * np.abs(rows[:, INDEX[name]]) + direction
        known = ~np.isnan(rows[:, INDEX[name]])
        assert (model.scores(more)[known] >= model.scores(rows)[known]).all(), name


def test_labels_that_the_margins_separate_give_a_finite_curve() -> None:
    margin = np.linspace(-1, 1, 20, dtype=np.float32)
    slope, intercept = fit_platt(margin, margin > 0)
    highest = 1 / (1 + np.exp(-(slope * 1 + intercept)))
    assert 0.9 < highest < 0.999


def test_metrics_are_those_of_the_textbook(samples: Samples) -> None:
    scores = np.array([0.9, 0.6, 0.4, 0.1], dtype=np.float32)
    eligible = np.array([True, False, True, False])
    samples = replace(samples.take(np.arange(0, 160, 40)), eligible=eligible)
    metrics = measure(scores, samples, 0.6, 0.95)
    assert (metrics.samples, metrics.base_rate, metrics.auc) == (4, 0.5, 0.75)
    assert metrics.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert metrics.brier_base_rate == 0.25
    assert (metrics.precision, metrics.coverage, metrics.traded) == (0.5, 0.5, 2)
    assert metrics.precision_low is not None
    assert metrics.precision_high is not None
    assert 0 < metrics.precision_low < 0.5 < metrics.precision_high < 1
    nothing = measure(scores, samples, 0.95, 0.95)
    assert nothing.precision is nothing.precision_low is None
    assert nothing.traded_independent == 0
