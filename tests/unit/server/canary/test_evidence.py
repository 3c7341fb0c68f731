"""What a canary is judged by: good ones are proven, each kind of bad one is found, and noise does not roll one back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from server.canary.evidence import Evidence, FirstAttempt, ScoredPair, Side, Verdict
from server.canary.settings import CanarySettings
from server.inference.outcome import Outcome

SETTINGS = CanarySettings(min_orders=20, min_pairs=50)
THRESHOLD = 0.6


def pair(champion: float, canary: float) -> ScoredPair:
    return ScoredPair(canary, THRESHOLD, champion, THRESHOLD)


def attempt(answered: bool) -> FirstAttempt:
    return FirstAttempt(0.001 if answered else math.inf, 0.02)


class World:
    """Orders, batches and pairs of a champion and of a canary that differs from it as the test says."""

    def __init__(self, seed: int, settings: CanarySettings = SETTINGS, processes: int = 1) -> None:
        self.random = np.random.default_rng(seed)
        self.evidence = Evidence(settings, processes)
        self.canary_score: Callable[[float], float] = self._much_the_same
        self.canary_failure_share = self.champion_failure_share = 0.01
        self.canary_extra_seconds = 0.0
        self.outcomes = True

    @property
    def verdict(self) -> Verdict:
        return self.evidence.verdict

    def _much_the_same(self, champion: float) -> float:
        return min(1.0, max(0.0, champion + float(self.random.normal(0, 0.05))))

    def go_on(self, rows: int) -> int | None:
        """Rows until it is WORSE; None when it never is."""
        for row in range(rows):
            self._batch(Side.CHAMPION, self.champion_failure_share, 0.0)
            self._batch(Side.CANARY, self.canary_failure_share, self.canary_extra_seconds)
            self.evidence.observe_order(Side.CHAMPION, attempt(self.random.random() > self.champion_failure_share))
            self.evidence.observe_order(Side.CANARY, attempt(self.random.random() > self.canary_failure_share))
            champion = float(self.random.beta(6, 4))
            scored = pair(champion, self.canary_score(champion))
            self.evidence.observe_pair(scored)
            if self.outcomes:
                self.evidence.observe_outcome(scored, bool(self.random.random() < champion))
            if self.evidence.verdict is Verdict.WORSE:
                return row + 1
        return None

    def _batch(self, side: Side, failure_share: float, extra_seconds: float) -> None:
        failed = self.random.random() < failure_share
        seconds = float(self.random.exponential(0.003)) + extra_seconds
        self.evidence.observe_batch(side, Outcome.MODEL_ERROR if failed else Outcome.SUCCESS, seconds)

    def guilty(self) -> set[str]:
        return {name for name, check in self.evidence.checks.items() if check.verdict is Verdict.WORSE}


def test_nothing_is_said_without_evidence() -> None:
    evidence = Evidence(SETTINGS)
    assert evidence.verdict is Verdict.NO_EVIDENCE
    assert "fallback (0 of " in evidence.reason


def test_a_canary_as_good_as_the_champion_is_proven_so() -> None:
    world = World(1)
    assert world.go_on(1_000) is None
    verdicts = [world.verdict]
    world.evidence.restart()
    verdicts.append(world.verdict)
    assert verdicts == [Verdict.BETTER_OR_EQUAL, Verdict.NO_EVIDENCE], "every step wants evidence of its own"


def test_inverted_scores_are_found_in_a_few_dozen_rows_even_where_all_are_on_one_side_of_the_threshold() -> None:
    world = World(2)
    world.outcomes = False
    world.canary_score = lambda champion: 1.0 - champion
    found = world.go_on(500)
    assert found is not None
    assert found <= 100
    hidden = Evidence(SETTINGS)
    random = np.random.default_rng(3)
    for _ in range(100):
        champion = float(random.uniform(0.4, 0.5))
        hidden.observe_pair(pair(champion, 0.9 - champion))
    assert hidden.checks["disagreement"].verdict is not Verdict.WORSE
    assert hidden.checks["rank"].verdict is Verdict.WORSE


def test_twenty_milliseconds_more_are_found_in_a_few_dozen_batches() -> None:
    world = World(4)
    world.canary_extra_seconds = 0.02
    found = world.go_on(500)
    assert found is not None
    assert found <= 60
    assert world.guilty() == {"slow"}


def test_a_machine_that_is_slow_for_both_rolls_nothing_back() -> None:
    world = World(5, CanarySettings(slow_seconds=0.001, min_orders=20, min_pairs=50))
    assert world.go_on(2_000) is None


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_canary_that_fails_is_found(share: float) -> None:
    world = World(6)
    world.canary_failure_share = share
    found = world.go_on(1_000)
    assert found is not None
    assert world.guilty() & {"errors", "fallback"}


def test_a_canary_that_fails_when_the_champion_fails_is_no_worse() -> None:
    evidence = Evidence(SETTINGS)
    for number in range(1_000):
        outcome = Outcome.TRANSPORT if number % 3 else Outcome.SUCCESS
        evidence.observe_batch(Side.CHAMPION, outcome, 0.001)
        evidence.observe_batch(Side.CANARY, outcome, 0.001)
    assert evidence.checks["errors"].verdict is Verdict.BETTER_OR_EQUAL


def test_a_canary_that_leaves_its_orders_to_the_champion_is_found_with_and_without_orders_to_compare_it_with() -> None:
    for champion_orders in (True, False):
        evidence = Evidence(SETTINGS)
        for _ in range(100):
            if champion_orders:
                evidence.observe_order(Side.CHAMPION, attempt(True))
            evidence.observe_order(Side.CANARY, attempt(False))
        assert evidence.verdict is Verdict.WORSE
        assert evidence.reason.startswith("fallback: another replica answered 100.0% of its orders and 0.0% of")


def test_orders_that_a_stalled_machine_leaves_unanswered_on_both_sides_speak_against_nobody() -> None:
    evidence = Evidence(SETTINGS)
    for number in range(1_000):
        answered = number % 100 >= 30
        evidence.observe_order(Side.CANARY, attempt(answered))
        evidence.observe_order(Side.CHAMPION, attempt(answered))
    assert evidence.checks["fallback"].verdict is Verdict.BETTER_OR_EQUAL


@pytest.mark.parametrize("impatient", Side)
def test_what_one_sides_callers_allow_less_than_the_others_speaks_against_nobody(impatient: Side) -> None:
    evidence, random = Evidence(SETTINGS), np.random.default_rng(3)
    for _ in range(1_000):
        for side in Side:
            allowed = 0.005 if side is impatient else 0.02
            seconds = float(random.uniform(0.001, 0.009))  # either model takes as long
            evidence.observe_order(side, FirstAttempt(seconds if seconds <= allowed else math.inf, allowed))
    check = evidence.checks["fallback"]
    assert check.canary == pytest.approx(check.champion, abs=0.05)
    assert check.verdict is not Verdict.WORSE


def test_overload_and_what_we_gave_up_ourselves_are_nobodys_fault() -> None:
    evidence = Evidence(SETTINGS)
    for _ in range(100):
        evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, 0.001)
        evidence.observe_batch(Side.CANARY, Outcome.OVERLOAD, 0.001)
        evidence.observe_batch(Side.CANARY, Outcome.IGNORED, 0.001)
    assert evidence.checks["errors"].samples == 0


def test_a_canary_that_trades_what_turns_out_badly_is_found_by_its_outcomes() -> None:
    world = World(7, CanarySettings(min_orders=20, min_pairs=50, max_disagreement=0.99, max_score_shift=0.99))
    world.canary_score = lambda champion: 0.9 + champion / 100  # ordered alike, and far too sure
    assert world.go_on(3_000) is not None
    assert world.guilty() <= {"brier", "bad_trades"}


def test_outcomes_are_waited_for_where_they_are_wanted() -> None:
    world = World(8, CanarySettings(min_orders=20, min_pairs=50, min_outcomes=100))
    world.outcomes = False
    world.go_on(1_000)
    verdicts = [world.verdict]
    assert "brier" in world.evidence.reason
    world.outcomes = True
    world.go_on(2_000)
    verdicts.append(world.verdict)
    assert verdicts == [Verdict.NO_EVIDENCE, Verdict.BETTER_OR_EQUAL]


def test_canaries_at_their_tolerance_are_rarely_rolled_back() -> None:
    """At the boundary of three checks at once, with a promise of 0.2 that is then easy to hold against."""
    settings = CanarySettings(
        min_orders=20, min_pairs=50, max_fallback_share=0.05, max_error_excess=0.05, false_rollback_probability=0.2
    )
    runs, rolled_back = 60, 0
    for seed in range(runs):
        world = World(100 + seed, settings)
        world.outcomes = False
        world.canary_failure_share, world.champion_failure_share = 0.05, 0.0
        rolled_back += world.go_on(400) is not None
    assert rolled_back <= 0.2 * runs


def test_more_processes_make_each_of_them_slower_to_condemn() -> None:
    alone, among_four = World(9), World(9, processes=4)
    for world in (alone, among_four):
        world.canary_extra_seconds = 0.02
    assert (alone.go_on(500) or 0) <= (among_four.go_on(500) or 0)


def test_each_check_says_in_a_sentence_what_came_out_and_what_that_says() -> None:
    evidence = Evidence(CanarySettings(min_orders=100, min_pairs=500, min_outcomes=0))
    said = {name: str(check) for name, check in evidence.checks.items()}
    assert said["rank"] == "nothing to compare yet (0 of 250 samples)"
    assert said["brier"] == "nothing to compare yet (0 samples)"
    for check in evidence.checks.values():
        check.observe(0.0, 0.0)
    for name, check in evidence.checks.items():
        assert "1 " in str(check), name
        assert str(check).endswith(("samples)", "samples), but it may still be chance")), name
    assert "too early to say (1 of 100 samples)" in str(evidence.checks["errors"])
    assert str(evidence.checks["brier"]).endswith("no objection (1 samples)")


def test_enough_samples_without_proof_are_not_called_too_few() -> None:
    evidence = Evidence(CanarySettings(min_orders=10))
    check = evidence.checks["errors"]
    for number in range(11):
        check.observe(float(number % 2), 0.0 if number % 3 else 1.0)
    assert check.verdict is Verdict.NO_EVIDENCE
    assert str(check).endswith("enough samples (11 of 10 samples), but it may still be chance")
