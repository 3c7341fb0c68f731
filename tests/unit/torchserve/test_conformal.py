"""A band keeps its error on scores that it has not seen, also where samples share a label."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier  # type: ignore[import-untyped]
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from feature_cache.features import N_FEATURES
from torchserve.conformal import aimed_at, conformal_band, split_conformal
from torchserve.dataset import Samples
from torchserve.label import Label
from torchserve.threshold import wilson

LABEL = Label(horizon_seconds=1.0)


class ScoresAsTheyAre(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier whose only feature is the probability of the second class."""

    classes_ = np.array([0, 1])
    is_fitted_ = True

    def fit(self, rows: NDArray[np.float64], labels: NDArray[np.int64]) -> ScoresAsTheyAre:
        return self

    def predict_proba(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.column_stack([1 - rows[:, 0], rows[:, 0]])

    def predict(self, rows: NDArray[np.float64]) -> NDArray[np.int64]:
        return (rows[:, 0] >= 0.5).astype(np.int64)


def drawn(seed: int, n: int, repeated: int = 1) -> tuple[NDArray[np.float32], Samples]:
    """Scores and labels; so many in a row share a label, a horizon and nearly a score."""
    random = np.random.default_rng(seed)
    eligible = np.repeat(random.random(n) < 0.7, repeated)
    base = np.repeat(random.normal(size=n), repeated) + np.where(eligible, 1.0, 0.0)
    scores = 1 / (1 + np.exp(-(base + 0.01 * random.normal(size=len(base)))))
    return scores.astype(np.float32), Samples(
        rows=np.zeros((len(base), N_FEATURES), np.float32),
        eligible=eligible,
        markout_bps=np.where(eligible, 1.0, -2.0),
        time_ns=np.arange(len(base), dtype=np.int64) // repeated * 10 * LABEL.span_ns,
        sell=np.zeros(len(base), np.bool_),
        instrument=np.zeros(len(base), np.int16),
        instruments=("A.SIM",),
        source="test",
        label=LABEL,
    )


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.floats(0, 1, width=32),
    st.sampled_from([0.05, 0.1, 0.2, 0.5]),
)
def test_what_exceeds_the_quantile_is_what_the_p_value_of_the_book_refuses(
    calibrating: list[float], later: float, error: float
) -> None:
    """Vovk, Gammerman, Shafer (2005): a label is refused when (#{i: a_i >= a} + 1) / (n + 1) <= error."""
    at_least = sum(one >= later for one in calibrating)
    refused = (at_least + 1) / (len(calibrating) + 1) <= error + 1e-12
    assert (later > split_conformal(np.array(calibrating), error)) == refused


@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels:UserWarning")
@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.2, 0.4])
def test_the_quantile_is_that_of_mapie(error: float) -> None:
    """By class, as here: it is calibrated with samples of one class alone. Its LAC score of a label is 1 - P(label)."""
    scores, samples = drawn(3, 500)
    rows = scores[~samples.eligible].astype(np.float64)[:, None]
    mapie = SplitConformalClassifier(
        ScoresAsTheyAre(), confidence_level=1 - error, conformity_score="lac", prefit=True, random_state=1
    )
    mapie.conformalize(rows, np.zeros(len(rows), np.int64))
    later = np.linspace(0, 1, 2_001)[:, None]
    _, sets = mapie.predict_set(later)
    # What MAPIE's set leaves out is surely eligible, for ours as well.
    assert ((later[:, 0] > split_conformal(rows[:, 0], error)) == ~sets[:, 0, 0]).all()


def test_the_error_aimed_at_is_the_largest_whose_interval_ends_at_the_wanted_one() -> None:
    aim = aimed_at(0.1, 150, 0.95)
    assert 0.04 < aim < 0.1
    assert float(wilson(aim, 150, 0.95)[1]) == pytest.approx(0.1, abs=1e-9)
    assert aimed_at(0.1, 1e9, 0.95) == pytest.approx(0.1, abs=1e-4)
    assert aimed_at(0.1, 20, 0.95) == pytest.approx(0.0, abs=1e-9), "20 are too few to be sure of anything"


@pytest.mark.parametrize("repeated", [1, 10])
def test_the_error_is_kept_whatever_samples_share(repeated: int) -> None:
    later, labels = drawn(10_000, 20_000)
    kept = []
    for seed in range(60):
        scores, samples = drawn(seed, 300, repeated)
        band = conformal_band(scores, samples, 0.7, error=0.2, confidence=0.95)
        errors = (later > band.high)[~labels.eligible].mean()
        others = (later < band.low)[labels.eligible].mean()
        kept.append(errors <= 0.2 and others <= 0.2)
        assert 60 < band.independent[0] < 130, "90 of 300 are not eligible, however often each is repeated"
    assert np.mean(kept) >= 0.9


def test_a_band_begins_no_higher_than_the_threshold_and_says_what_it_is() -> None:
    scores, samples = drawn(1, 2_000)
    band = conformal_band(scores, samples, 0.01, error=0.1, confidence=0.95)
    assert band.low == 0.01
    assert band.holds(np.array([0.01, band.high], np.float32)).all()
    assert not band.holds(np.array([0.009, np.nextafter(np.float32(band.high), np.float32(2))], np.float32)).any()
    assert band.described["high"] == band.high


def test_of_too_few_samples_every_score_is_uncertain() -> None:
    scores, samples = drawn(1, 12)
    band = conformal_band(scores, samples, 0.7, error=0.1, confidence=0.95)
    assert (band.high, band.described["high"]) == (math.inf, None)
    only = samples.take(np.flatnonzero(samples.eligible))
    assert conformal_band(scores[samples.eligible], only, 0.7, confidence=0.95).high == math.inf
