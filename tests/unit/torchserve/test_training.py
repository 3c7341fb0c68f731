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

from torchserve.dataset import LABEL_HORIZON_NS, Samples, SamplesError
from torchserve.fitting import Labelled
from torchserve.handler import calibrated
from torchserve.training import (
    KINDS,
    TrainedModel,
    TrainingSettings,
    calibrate,
    choose_threshold,
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
        assert time_ns[earlier].max() + LABEL_HORIZON_NS + 5_000_000_000 < time_ns[later].min()


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
    assert changed.metrics["calibration"] == model.metrics["calibration"]
    assert changed.metrics["test"] != model.metrics["test"]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_learns_what_the_simulator_hides(name: str, models: dict[str, TrainedModel]) -> None:
    test = models[name].metrics["test"]
    assert test.auc > 0.6
    assert test.brier < test.brier_base_rate


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


def test_a_model_that_knows_nothing_trades_nothing() -> None:
    def wrong_way_round(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return -rows[:, 0]

    rows = np.linspace(-1, 1, 1_000, dtype=np.float32)[:, None]
    slope, intercept, threshold, reached = calibrate(
        wrong_way_round, Labelled(rows, rows[:, 0] > -0.9), TrainingSettings()
    )
    scores = calibrated(wrong_way_round(rows), slope, intercept)
    assert (slope, reached) == (0, False)
    assert scores.max() < np.float32(threshold) == threshold <= 1, "the base rate is 0.95, which the target would allow"
    assert not measure(scores, rows[:, 0] > 0, threshold).coverage


def test_labels_that_the_margins_separate_give_a_finite_curve() -> None:
    margin = np.linspace(-1, 1, 20, dtype=np.float32)
    slope, intercept = fit_platt(margin, margin > 0)
    highest = 1 / (1 + np.exp(-(slope * 1 + intercept)))
    assert 0.9 < highest < 0.999


def test_the_threshold_is_the_lowest_that_reaches_the_target() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=np.float32)
    eligible = np.array([True, False, True, True, True, False])
    # Precision by cut: 1, 1/2, 2/3, 3/4, 4/5, 2/3.
    settings = TrainingSettings(target_precision=0.75, minimum_coverage=0.1)
    assert choose_threshold(scores, eligible, settings) == (0.5, True)


def test_without_the_target_the_most_precise_threshold_with_enough_coverage_is_taken() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], dtype=np.float32)
    eligible = np.array([True, False, True, True, True, False])
    settings = TrainingSettings(target_precision=0.95, minimum_coverage=0.4)
    assert choose_threshold(scores, eligible, settings) == (0.5, False)


def test_equal_scores_are_never_cut_apart() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.5], dtype=np.float32)
    eligible = np.array([False, True, True, False])
    settings = TrainingSettings(target_precision=0.6, minimum_coverage=0.1)
    threshold, reached = choose_threshold(scores, eligible, settings)
    assert (threshold, reached) == (0.5, False)
    assert measure(scores, eligible, threshold).precision == 0.5


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=5, max_size=60))
def test_a_threshold_delivers_on_its_own_samples_what_it_claims(drawn: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in drawn], dtype=np.float32)
    eligible = np.array([label for _, label in drawn])
    settings = TrainingSettings(target_precision=0.7, minimum_coverage=0.2)
    threshold, reached = choose_threshold(scores, eligible, settings)
    trade = scores >= np.float32(threshold)
    assert trade.mean() >= 0.2
    assert reached == (eligible[trade].mean() >= 0.7)
    for other in scores:
        cut = scores >= other
        if cut.mean() >= 0.2 and not reached:
            assert eligible[cut].mean() <= eligible[trade].mean()


def test_metrics_are_those_of_the_textbook() -> None:
    scores = np.array([0.9, 0.6, 0.4, 0.1], dtype=np.float32)
    eligible = np.array([True, False, True, False])
    metrics = measure(scores, eligible, 0.6)
    assert (metrics.samples, metrics.base_rate, metrics.auc) == (4, 0.5, 0.75)
    assert metrics.brier == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert metrics.brier_base_rate == 0.25
    assert (metrics.precision, metrics.coverage) == (0.5, 0.5)
    assert measure(scores, eligible, 0.95).precision is None
