"""A threshold is one that is sure to be as precise as wanted, and samples count for what they are worth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest  # type: ignore[import-untyped]

from feature_cache.features import N_FEATURES
from torchserve.dataset import STEP_NS, Samples
from torchserve.label import Label
from torchserve.threshold import Cut, choose_threshold, independent, needed, wilson

LABEL = Label(horizon_seconds=1.0)


def samples_of(
    eligible: NDArray[np.bool_], time_ns: NDArray[np.int64], instrument: NDArray[np.int16] | None = None
) -> Samples:
    n = len(eligible)
    return Samples(
        rows=np.zeros((n, N_FEATURES), np.float32),
        eligible=eligible,
        markout_bps=np.where(eligible, 1.0, -2.0),
        time_ns=time_ns,
        sell=np.zeros(n, np.bool_),
        instrument=np.zeros(n, np.int16) if instrument is None else instrument,
        instruments=("A.SIM", "B.SIM"),
        source="test",
        label=LABEL,
    )


def apart(eligible: NDArray[np.bool_]) -> Samples:
    """Samples so far apart that they share nothing."""
    return samples_of(eligible, np.arange(len(eligible), dtype=np.int64) * 100 * LABEL.span_ns)


def chosen(scores: NDArray[np.float32], samples: Samples, target: float, coverage: float = 0.05) -> Cut:
    return choose_threshold(scores, samples, target_precision=target, minimum_coverage=coverage, confidence=0.95)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (9, 10), (10, 10), (930, 1000)])
def test_the_interval_is_that_of_the_textbook(right: int, n: int) -> None:
    low, high = wilson(right / n, n, 0.95)
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert float(low) == pytest.approx(expected.low, abs=1e-12)
    assert float(high) == pytest.approx(expected.high, abs=1e-12)


def test_as_many_as_are_needed_make_an_interval_that_narrow() -> None:
    low, high = wilson(0.95, needed(0.95, 0.02, 0.95), 0.95)
    assert (high - low) / 2 == pytest.approx(0.02, rel=0.02)


def test_samples_that_share_their_outcome_count_once() -> None:
    random = np.random.default_rng(1)
    n = 4_000
    everything = np.ones(n, np.bool_)
    alone = independent(apart(random.random(n) < 0.7), everything)
    # Five samples a second on each of two instruments: a label of a second is a pair of an instrument and a second.
    time_ns = np.repeat(np.arange(n // 2, dtype=np.int64) * STEP_NS, 2)
    instrument = np.tile(np.array([0, 1], np.int16), n // 2)
    shared = np.repeat(random.random(n // 5) < 0.7, 5)
    by_instrument = np.empty(n, np.bool_)
    by_instrument[0::2], by_instrument[1::2] = shared[: n // 2], shared[n // 2 :]
    by_second = independent(samples_of(by_instrument, time_ns, instrument), everything)
    # The instruments move together as well.
    together = independent(samples_of(np.repeat(shared[: n // 2], 2), time_ns, instrument), everything)
    # And what goes well lasts for ten seconds.
    lasting = np.repeat(random.random(n // 100) < 0.7, 100)
    assert alone == pytest.approx(n, rel=0.1)
    assert by_second == pytest.approx(n / 5, rel=0.15)
    assert together == pytest.approx(n / 10, rel=0.2)
    assert independent(samples_of(lasting, time_ns, instrument), everything) < n / 15
    assert independent(apart(everything), np.zeros(n, np.bool_)) == 0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_worth_equals_a_slow_direct_computation(drawn: list[tuple[int, bool, bool]]) -> None:
    time_ns = np.array([seconds for seconds, _, _ in drawn], np.int64) * LABEL.span_ns
    eligible = np.array([label for _, label, _ in drawn])
    instrument = np.array([second for _, _, second in drawn], np.int16)
    p, n = eligible.mean(), len(drawn)
    spans = {
        span: [one for (seconds, one, _) in drawn if seconds // 2 == span] for span in {s // 2 for s, _, _ in drawn}
    }
    spread = sum((sum(ones) - p * len(ones)) ** 2 for ones in spans.values())
    distinct = len(set(zip(time_ns.tolist(), instrument.tolist(), strict=True)))
    expected = distinct if p in (0, 1) else min(distinct, p * (1 - p) * n * n / max(spread, 1e-12))
    found = independent(samples_of(eligible, time_ns, instrument), np.ones(n, np.bool_))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_threshold_is_the_lowest_that_is_sure_to_reach_the_target() -> None:
    random = np.random.default_rng(2)
    scores = random.random(4_000).astype(np.float32)
    samples = apart(random.random(4_000) < 0.6 + 0.4 * scores)
    cut = chosen(scores, samples, 0.85)
    assert cut.reached
    trade = scores >= np.float32(cut.threshold)
    assert (trade.mean(), samples.eligible[trade].mean()) == (cut.coverage, cut.precision)
    assert cut.traded == trade.sum()
    assert cut.low == pytest.approx(float(wilson(cut.precision, cut.independent, 0.95)[0]))
    # The precision of all above s is 0.8 + 0.2 s: 0.85 at s = 0.25. To be sure takes a little more.
    assert 0.25 < cut.threshold < 0.5
    assert cut.precision > 0.85


def test_without_the_target_the_surest_threshold_with_enough_coverage_is_taken() -> None:
    scores = np.linspace(1, 0, 400, dtype=np.float32)
    samples = apart(np.random.default_rng(3).random(400) < np.array([0.9, 0.8, 0.6, 0.5]).repeat(100))
    cut = chosen(scores, samples, 0.95, coverage=0.2)
    assert not cut.reached
    assert cut.coverage >= 0.2
    for share in (0.2, 0.25, 0.5, 1.0):
        trade = scores >= np.quantile(scores, 1 - share)
        low, _ = wilson(samples.eligible[trade].mean(), independent(samples, trade), 0.95)
        assert low <= cut.low + 0.01


def test_equal_scores_are_never_cut_apart() -> None:
    cut = chosen(np.array([0.9, 0.5, 0.5, 0.5], np.float32), apart(np.array([False, True, True, False])), 0.3, 0.3)
    assert (cut.threshold, cut.coverage, cut.precision) == (0.5, 1.0, 0.5)


def precise_enough(random: np.random.Generator, lasts: int) -> bool | None:
    """Whether a chosen threshold is in truth as precise as it is sure to be; None where none was chosen.

    The samples are a market's, ten minutes of one instrument. Whether the market is kind to orders lasts, so the first
    samples say much of the next.
    """
    n = 3_000
    kind = np.repeat(random.random(n // lasts + 1), lasts)[:n]
    scores = random.random(n).astype(np.float32)

    def share(score: NDArray[np.float64]) -> NDArray[np.float64]:
        return 0.8 + 0.18 * score

    samples = samples_of(kind < share(scores.astype(np.float64)), np.arange(n, dtype=np.int64) * STEP_NS)
    cut = chosen(scores, samples, 0.95)
    return share(np.array([(1 + cut.threshold) / 2]))[0] >= 0.95 if cut.reached else None


@pytest.mark.parametrize("lasts", [1, 5, 25])
def test_a_threshold_is_as_precise_as_it_is_sure_to_be(lasts: int) -> None:
    random = np.random.default_rng(lasts)
    trials = [precise_enough(random, lasts) for _ in range(300)]
    # Looking at forty cuts adds a little to the 2.5 % of one.
    assert sum(one is False for one in trials) / len(trials) <= 0.05
    if lasts == 1:
        assert sum(one is not None for one in trials) > 30, "there is something to be found"


def naive(random: np.random.Generator) -> bool | None:
    """The same for the lowest of all cuts whose precision itself reaches the target."""
    n = 3_000
    scores = random.random(n).astype(np.float32)
    eligible = np.repeat(random.random(n // 25), 25) < 0.8 + 0.18 * scores
    order = np.argsort(-scores)
    precision = np.cumsum(eligible[order]) / np.arange(1, n + 1)
    reaching = np.flatnonzero((precision >= 0.95) & (np.arange(1, n + 1) >= 0.05 * n))
    return bool(0.8 + 0.18 * (1 + scores[order[reaching[-1]]]) / 2 >= 0.95) if len(reaching) else None


def test_a_cut_by_precision_alone_is_wrong_more_often_than_not() -> None:
    trials = [naive(np.random.default_rng(seed)) for seed in range(200)]
    assert sum(one is False for one in trials) / len(trials) > 0.3


def test_wider_cuts_are_worth_more_samples() -> None:
    random = np.random.default_rng(4)
    samples = apart(random.random(500) < 0.8)
    worth = [independent(samples, np.arange(500) < n) for n in (10, 50, 200, 500)]
    assert all(before < after for before, after in itertools.pairwise(worth))
