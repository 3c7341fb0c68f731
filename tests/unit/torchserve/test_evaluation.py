"""Figures are those of the textbook, and their intervals are as wide as blocks of time make them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, roc_auc_score

from feature_cache.features import N_FEATURES
from torchserve.dataset import Samples
from torchserve.evaluation import (
    Blocks,
    BootstrapSettings,
    Decided,
    class_balance,
    precision_by_coverage,
    reliability,
    top_share,
)


def samples_of(eligible: NDArray[np.bool_], markout: NDArray[np.float64] | None = None, step_ms: int = 200) -> Samples:
    n = len(eligible)
    return Samples(
        rows=np.zeros((n, N_FEATURES), np.float32),
        eligible=eligible,
        markout_bps=np.where(eligible, 1.0, -2.0) if markout is None else markout,
        time_ns=np.arange(n, dtype=np.int64) * step_ms * 1_000_000,
        sell=np.arange(n) % 2 == 1,
        instrument=(np.arange(n) % 2).astype(np.int16),
        instruments=("A.SIM", "B.SIM"),
        source="test",
    )


def test_figures_are_those_of_the_textbook() -> None:
    eligible = np.array([True, False, True, False, True])
    score = np.array([0.9, 0.8, 0.45, 0.2, 0.2], np.float32)
    samples = samples_of(eligible, np.array([3.0, -2.0, 1.0, -4.0, 0.5]))
    figures = Blocks(samples, BootstrapSettings(resamples=0)).figures(Decided(score >= 0.4, score))
    assert figures.precision.value == pytest.approx(2 / 3)
    assert figures.coverage.value == pytest.approx(3 / 5)
    assert figures.recall.value == pytest.approx(2 / 3)
    assert figures.auc.value == pytest.approx(roc_auc_score(eligible, score))
    assert figures.brier.value == pytest.approx(brier_score_loss(eligible, score))
    # Bins 9, 8, 4, 2 with one, one, one and two samples.
    assert figures.ece.value == pytest.approx((0.1 + 0.8 + 0.55 + 2 * 0.3) / 5, abs=1e-6)
    assert figures.markout_traded_bps.value == pytest.approx(2 / 3)
    assert figures.markout_refused_bps.value == pytest.approx(-3.5 / 2)
    assert figures.markout_difference_bps.value == pytest.approx(2 / 3 + 3.5 / 2)
    # The two refused orders lost 4 bps and gained 0.5: 3.5 over five orders, and refusing one may cost 1.75.
    assert figures.saved_bps.value == pytest.approx(3.5 / 5)
    assert figures.break_even_bps.value == pytest.approx(3.5 / 2)
    assert figures.precision.low is figures.precision.high is None


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=4, max_size=60))
def test_the_area_under_the_curve_counts_ties_half(drawn: list[tuple[int, bool]]) -> None:
    eligible = np.array([label for _, label in drawn])
    score = np.array([value / 6 for value, _ in drawn], np.float32)
    auc = Blocks(samples_of(eligible), BootstrapSettings(resamples=0)).figures(Decided(score > 0.5, score)).auc
    if eligible.all() or not eligible.any():
        assert auc.value is None
    else:
        assert auc.value == pytest.approx(roc_auc_score(eligible, score))


def test_what_is_not_defined_is_none() -> None:
    nothing = Decided(np.zeros(50, np.bool_))
    figures = Blocks(samples_of(np.arange(50) % 3 == 0), BootstrapSettings(resamples=20)).figures(nothing)
    assert figures.precision.value is figures.auc.value is figures.markout_traded_bps.value is None
    assert figures.coverage == (0.0, 0.0, 0.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        # Spells of ten seconds that are all eligible or not: what neighbours share.
        eligible = np.repeat(random.random(60) < 0.7, 50)
        rate = Blocks(samples_of(eligible), BootstrapSettings(resamples=200, seed=trial)).base_rate()
        assert rate.low is not None
        assert rate.high is not None
        covered += rate.low <= 0.7 <= rate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_of_dependent_samples_are_wider_than_those_of_independent_ones() -> None:
    random = np.random.default_rng(1)
    spells = np.repeat(random.random(60) < 0.7, 50)

    def width(eligible: NDArray[np.bool_]) -> float:
        rate = Blocks(samples_of(eligible), BootstrapSettings()).base_rate()
        assert rate.low is not None
        assert rate.high is not None
        return rate.high - rate.low

    assert width(spells) > 3 * width(random.permutation(spells))


def test_what_refusing_saves_is_nothing_where_everything_is_traded() -> None:
    random = np.random.default_rng(4)
    markout = random.normal(size=2_000)
    blocks = Blocks(samples_of(markout >= -1, markout), BootstrapSettings())
    always = blocks.figures(Decided(np.ones(2_000, np.bool_)))
    assert always.saved_bps == (0.0, 0.0, 0.0)
    assert always.break_even_bps.value is None
    foretold = blocks.figures(Decided(markout >= 0))
    assert foretold.saved_bps.low is not None
    assert foretold.saved_bps.value == pytest.approx(np.maximum(-markout, 0).mean())
    assert foretold.saved_bps.low > 0.3


def test_the_difference_of_two_deciders_is_of_the_same_drawings() -> None:
    random = np.random.default_rng(2)
    eligible = np.repeat(random.random(40) < 0.6, 50)
    blocks = Blocks(samples_of(eligible), BootstrapSettings())
    trade = random.random(len(eligible)) < 0.5
    assert blocks.precision_difference(trade, trade) == (0.0, 0.0, 0.0)
    better = blocks.precision_difference(trade & (eligible | (random.random(len(eligible)) < 0.5)), trade)
    assert better.value is not None
    assert better.low is not None
    assert 0 < better.low < better.value


def test_reliability_and_coverage_account_for_every_sample() -> None:
    random = np.random.default_rng(3)
    score = random.random(1_000).astype(np.float32)
    eligible = random.random(1_000) < score
    bins = reliability(score, eligible)
    assert sum(one.samples for one in bins) == 1_000
    assert all(abs(one.mean_score - one.eligible) < 0.2 for one in bins)
    curve = precision_by_coverage(score, eligible)
    assert curve[-1] == (1.0, float(eligible.mean()))
    assert curve[0][1] > 0.9
    assert [x for x, _ in curve] == sorted(x for x, _ in curve)


def test_equal_scores_pass_together_in_the_curve() -> None:
    curve = precision_by_coverage(np.full(100, 0.5, np.float32), np.arange(100) < 60)
    assert curve == [(1.0, 0.6)]


def test_the_top_share_is_the_best_ranked() -> None:
    score = np.array([0.1, 0.9, 0.5, 0.9], np.float32)
    assert top_share(score, 0.5).tolist() == [False, True, False, True]
    assert not top_share(score, 0.0).any()
    same = np.flatnonzero(top_share(np.full(10_000, 0.5, np.float32), 0.3))
    assert len(same) == 3_000
    assert same.mean() == pytest.approx(5_000, rel=0.05), "of equal scores not the earliest ones"
    assert top_share(score, 1.0).all()


def test_class_balance_is_given_by_instrument_and_side() -> None:
    eligible = np.array([True, False, True, True])
    assert class_balance(samples_of(eligible)) == {
        "all": (4, 0.75),
        "A.SIM": (2, 1.0),
        "B.SIM": (2, 0.5),
        "buys": (2, 1.0),
        "sells": (2, 0.5),
    }
