"""A walk forward never knows the future, and a model is as good as what it beats."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from feature_cache.features import INDEX, N_FEATURES
from local.training.training import rules_trades
from torchserve.card import data_needed, standing, verdict
from torchserve.dataset import STEP_NS, Samples, SamplesError
from torchserve.evaluation import BootstrapSettings, Decided, Estimate
from torchserve.label import Label
from torchserve.search import search
from torchserve.threshold import independent, wilson
from torchserve.training import TrainingSettings
from torchserve.walk_forward import (
    ALWAYS,
    BASELINES,
    CHAMPION,
    LOGISTIC,
    RULES,
    RULES_FEATURES,
    Comparison,
    WalkForward,
    WalkForwardSettings,
    block_splits,
    walk_forward,
)

WALK = WalkForwardSettings(blocks=3, bootstrap=BootstrapSettings(resamples=50))
TRAINING = TrainingSettings(seed=2, trees=30, epochs=3)
SECOND = 1_000_000_000


def nothing(rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.zeros(len(rows), np.bool_)


def made_up(seed: int, *, curved: bool) -> Samples:
    """Fifteen minutes in which one feature decides: along a line, or only where it is far from zero."""
    random = np.random.default_rng(seed)
    n = 6_000
    rows = random.normal(size=(n, N_FEATURES)).astype(np.float32)
    signal = np.abs(rows[:, 0]) - 0.8 if curved else rows[:, 0]
    markout = 2 * signal + random.normal(size=n)
    return Samples(
        rows=rows,
        eligible=markout >= -1,
        markout_bps=markout.astype(np.float64),
        time_ns=np.arange(n, dtype=np.int64) * 150_000_000,
        sell=np.arange(n) % 2 == 1,
        instrument=np.zeros(n, np.int16),
        instruments=("MADE.UP",),
        source="made up",
    )


@pytest.fixture(scope="module")
def walk() -> WalkForward:
    return walk_forward(made_up(1, curved=True), ["xgboost", "torch"], TRAINING, WALK, nothing)


@given(st.integers(100, 2_000), st.integers(1, 8), st.floats(0.2, 0.8), st.floats(0, 20))
def test_all_that_a_block_is_decided_from_lies_a_gap_before_it(
    seconds: int, blocks: int, first: float, embargo: float
) -> None:
    time_ns = np.arange(0, seconds * SECOND, SECOND // 2, dtype=np.int64)
    training = TrainingSettings(embargo_seconds=embargo)
    try:
        splits = block_splits(time_ns, training, WalkForwardSettings(blocks=blocks, first_fraction=first))
    except SamplesError:
        return
    for split in splits:
        for earlier, later in itertools.pairwise(split):
            # No label of an earlier part is made of a price of a later one, and an embargo lies between.
            assert time_ns[earlier].max() + training.label.span_ns + round(embargo * SECOND) < time_ns[later].min()
    tested = np.concatenate([split.test for split in splits])
    assert (np.diff(tested) == 1).all()
    assert tested[-1] == len(time_ns) - 1


def test_labels_that_mean_nothing_are_not_foretold() -> None:
    samples = made_up(3, curved=True)
    shuffled = np.random.default_rng(4).permutation(samples.eligible)
    found = walk_forward(replace(samples, eligible=shuffled), ["xgboost", "torch"], TRAINING, WALK, nothing)
    for kind in ("xgboost", "torch"):
        auc = found.figures[kind].auc
        assert auc.value == pytest.approx(0.5, abs=0.05)


def test_what_happens_in_a_block_teaches_nothing_before_it(walk: WalkForward) -> None:
    samples = made_up(1, curved=True)
    begins = walk.by_block["xgboost"][-1].start_ns
    last = samples.time_ns >= begins
    changed = replace(samples, eligible=np.where(last, ~samples.eligible, samples.eligible))
    again = walk_forward(changed, ["xgboost", "torch"], TRAINING, WALK, nothing)
    for kind in ("xgboost", "torch", LOGISTIC):
        np.testing.assert_array_equal(again.decided[kind].score, walk.decided[kind].score)
        assert again.by_block[kind][:-1] == walk.by_block[kind][:-1]
        assert again.by_block[kind][-1] != walk.by_block[kind][-1]


def test_a_model_that_knows_a_curve_beats_every_baseline_beyond_chance(walk: WalkForward) -> None:
    comparisons = {one.baseline: one for one in walk.comparisons["xgboost"]}
    assert set(comparisons) == {*BASELINES, CHAMPION}
    assert comparisons[ALWAYS].beyond_chance
    assert comparisons[LOGISTIC].beyond_chance
    # Rules that trade nothing have no precision to beat.
    assert not comparisons[RULES].beaten
    assert not walk.beats_baselines("xgboost")


def test_a_model_does_not_beat_rules_that_know_the_answer() -> None:
    samples = made_up(1, curved=True)
    perfect = walk_forward(samples, ["xgboost"], TRAINING, WALK, lambda rows: np.abs(rows[:, 0]) > 1.5)
    random = np.random.default_rng(5)
    ignorant = walk_forward(samples, ["xgboost"], TRAINING, WALK, lambda rows: random.random(len(rows)) < 0.3)
    against_perfect, against_ignorant = (
        next(one for one in found.comparisons["xgboost"] if one.baseline == RULES) for found in (perfect, ignorant)
    )
    assert not against_perfect.beyond_chance
    assert against_ignorant.beyond_chance
    assert ignorant.beats_baselines("xgboost")


def test_a_model_that_is_better_by_chance_does_not_beat_the_baselines(walk: WalkForward) -> None:
    better = [Comparison(name, Estimate(0.04, 0.01, 0.07)) for name in BASELINES]
    assert replace(walk, comparisons={"xgboost": better}).beats_baselines("xgboost")
    perhaps = [*better[:-1], Comparison(LOGISTIC, Estimate(0.04, -0.01, 0.09))]
    assert not replace(walk, comparisons={"xgboost": perhaps}).beats_baselines("xgboost")


def test_how_a_model_stands_fits_on_a_line(walk: WalkForward) -> None:
    def said(*differences: Estimate) -> str:
        comparisons = [Comparison(name, one) for name, one in zip(BASELINES, differences, strict=True)]
        return standing(replace(walk, comparisons={"xgboost": comparisons}), "xgboost")

    sure, unsure, worse = Estimate(0.1, 0.05, 0.2), Estimate(0.1, -0.1, 0.2), Estimate(-0.1, -0.2, 0.0)
    assert said(sure, sure, sure) == "beats all baselines beyond chance"
    assert said(sure, unsure, sure) == "beats all baselines, not beyond chance the rules"
    assert said(sure, worse, unsure) == "does not beat the rules"
    assert said(worse, sure, worse) == "does not beat always trading and logistic regression"
    assert said(worse, worse, worse) == "beats none of the baselines"
    assert standing("240 s are too short", "xgboost") == "was not held against the rules"
    assert standing(walk, "xgboost", knows_something=False) == "knows nothing and trades nothing"


def test_every_figure_is_of_the_blocks_together(walk: WalkForward) -> None:
    assert walk.blocks == 3
    assert sum(block.samples for block in walk.by_block["torch"]) == len(walk.samples.rows)
    assert walk.figures[ALWAYS].precision.value == walk.base_rate.value == pytest.approx(walk.samples.eligible.mean())
    decided = walk.decided["xgboost"]
    assert walk.figures["xgboost"].precision.value == pytest.approx(walk.samples.eligible[decided.trade].mean())
    # 540 s of blocks in spans of 10 s.
    assert walk.independent_blocks == pytest.approx(54, abs=1)
    assert json.loads(json.dumps(walk.summary()))["beats_baselines"] == {"xgboost": False, "torch": False}


def test_a_verdict_says_which_baselines_and_how_surely(walk: WalkForward) -> None:
    def said(*differences: Estimate) -> str:
        comparisons = [Comparison(f"b{number}", one) for number, one in enumerate(differences)]
        return verdict(replace(walk, comparisons={"xgboost": comparisons}), "xgboost")

    sure, unsure, worse, undefined = Estimate(0.1, 0.05, 0.2), Estimate(0.1, -0.1, 0.2), Estimate(-0.1), Estimate(None)
    assert said(sure, sure).endswith("each beyond chance.")
    assert said(sure, unsure).endswith("not beyond chance: b1. Exported by force, if at all.")
    assert said(worse, sure, undefined).startswith("Does not beat b0 and b2 ")


def test_a_session_too_short_for_its_blocks_is_refused() -> None:
    with pytest.raises(SamplesError, match="too short for 3 walk-forward blocks"):
        walk_forward(made_up(1, curved=True).take(np.arange(600)), ["xgboost"], TRAINING, WALK, nothing)


def test_the_rules_of_the_baseline_are_those_of_the_fallback() -> None:
    calm = np.zeros((3, N_FEATURES), np.float32)
    calm[1, INDEX["spread_bps"]] = 50
    calm[2, INDEX["ofi_1s"]] = np.nan
    assert rules_trades()(calm).tolist() == [True, False, False]
    blind = np.full((1, N_FEATURES), np.nan, np.float32)
    blind[:, [INDEX[name] for name in RULES_FEATURES]] = 0
    assert rules_trades()(blind).all(), "they look at these five features alone"


@pytest.mark.parametrize("kind", ["xgboost", "torch"])
def test_a_search_repeats_itself_and_looks_at_nothing_that_the_walk_tests(kind: str) -> None:
    samples = made_up(6, curved=True)
    chosen = "xgboost" if kind == "xgboost" else "torch"
    found = search(chosen, samples, TRAINING, WALK, trials=3)  # type: ignore[arg-type]
    first = block_splits(samples.time_ns, TRAINING, WALK)[0].test.min()
    later = np.arange(len(samples.rows)) >= first
    changed = replace(samples, eligible=np.where(later, ~samples.eligible, samples.eligible))
    assert search(chosen, changed, TRAINING, WALK, trials=3) == found  # type: ignore[arg-type]
    untouched = "torch" if kind == "xgboost" else "xgboost"
    assert getattr(found, untouched) == getattr(TRAINING, untouched)


def market_of(hours: float, seed: int) -> tuple[Samples, NDArray[np.bool_]]:
    """Two instruments whose outcome lasts a bucket of the label, and trades of 5 % of these, 95 % of them right."""
    random = np.random.default_rng(seed)
    label = Label(horizon_seconds=1.0)
    instants = np.repeat(np.arange(round(hours * 3.6e12 / STEP_NS), dtype=np.int64) * STEP_NS, 4)
    instrument = np.tile(np.array([0, 0, 1, 1], np.int16), len(instants) // 4)
    bucket = (instants // label.span_ns) * 2 + instrument
    samples = Samples(
        rows=np.zeros((len(instants), N_FEATURES), np.float32),
        eligible=(random.random(bucket.max() + 1) < 0.95)[bucket],
        markout_bps=np.zeros(len(instants)),
        time_ns=instants,
        sell=np.tile([False, True], len(instants) // 2),
        instrument=instrument,
        instruments=("A.SIM", "B.SIM"),
        source="made up",
        label=label,
    )
    return samples, (random.random(bucket.max() + 1) < 0.05)[bucket]


def test_as_much_data_as_is_said_to_be_needed_shows_the_precision_that_closely(walk: WalkForward) -> None:
    samples, trade = market_of(1.0, seed=1)
    hour = replace(
        walk,
        samples=samples,
        decided={"xgboost": Decided(trade)},
        independent_traded={"xgboost": independent(samples, trade)},
    )
    hours = hour.hours_needed("xgboost", 0.95, 0.02, 0.05)
    assert hours is not None
    low, high = wilson(0.95, independent(*market_of(hours, seed=2)), 0.95)
    assert (high - low) / 2 == pytest.approx(0.02, rel=0.15)
    assert hour.hours_needed("xgboost", 0.95, 0.01, 0.05) == pytest.approx(4 * hours)
    said = data_needed(hour, "xgboost", TRAINING)
    assert said.startswith(f"To show a precision of 95% ± 2% at 5% coverage takes about {hours:.1f} hours of each")
    assert "all instruments and both sides together" in said, "of one of them it takes as many times longer"
    assert said.endswith("the blocks here are 60.0 minutes. `pretrade ingest --record` records more.")
    nothing_traded = replace(hour, decided={"xgboost": Decided(np.zeros_like(trade))})
    assert nothing_traded.hours_needed("xgboost", 0.95, 0.02, 0.05) is None
    assert "It trades nothing" in data_needed(nothing_traded, "xgboost", TRAINING)
