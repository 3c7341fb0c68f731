"""What a canary is judged by: good ones are proven, each kind of bad one is found, and noise does not roll one back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.cases import Clock

from server.canary.evidence import INDEPENDENT_SECONDS, Evidence, FirstAttempt, ScoredPair, Verdict
from server.canary.pairing import Side
from server.canary.settings import CanarySettings
from server.inference.outcome import Outcome

SETTINGS = CanarySettings(min_orders=20, min_pairs=50, min_outcomes=50)
THRESHOLD = 0.6
NAME = "BTCUSDT.SIM"


def pair(champion: float, canary: float) -> ScoredPair:
    return ScoredPair(canary, THRESHOLD, champion, THRESHOLD)


def attempt(answered: bool) -> FirstAttempt:
    return FirstAttempt(0.001 if answered else math.inf, 0.02)


class Judge:
    """Evidence, and the clock by which it gathers."""

    def __init__(self, settings: CanarySettings = SETTINGS, processes: int = 1, **label: Any) -> None:
        self.clock = Clock()
        self.evidence = Evidence(settings, self.clock, processes, **label)

    def go_by(self, seconds: float = INDEPENDENT_SECONDS) -> None:
        """So much time passes, by default as much as one observation takes."""
        self.clock.now += seconds
        self.evidence.settle()


class World(Judge):
    """Orders, batches and pairs of a champion and of a canary that differs from it as the test says."""

    def __init__(self, seed: int, settings: CanarySettings = SETTINGS, processes: int = 1) -> None:
        super().__init__(settings, processes)
        self.random = np.random.default_rng(seed)
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
            self.evidence.observe_pair(NAME, scored)
            if self.outcomes:
                self.evidence.observe_outcome(NAME, scored, bool(self.random.random() < champion))
            self.go_by()
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
    evidence = Judge().evidence
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
    hidden = Judge()
    random = np.random.default_rng(3)
    for _ in range(100):
        champion = float(random.uniform(0.4, 0.5))
        hidden.evidence.observe_pair(NAME, pair(champion, 0.9 - champion))
        hidden.go_by()
    assert not hidden.evidence.checks["disagreement"].beyond
    assert hidden.evidence.checks["rank"].verdict is Verdict.WORSE


def test_twenty_milliseconds_more_are_found_in_a_few_dozen_batches() -> None:
    world = World(4)
    world.canary_extra_seconds = 0.02
    found = world.go_on(500)
    assert found is not None
    assert found <= 60
    assert world.guilty() == {"slow"}


def test_how_long_large_batches_of_shadow_rows_take_is_held_against_nobody() -> None:
    world = World(6)
    for _ in range(500):
        world.evidence.observe_batch(Side.CANARY, Outcome.SUCCESS, math.nan)  # it scores what the champion decides
        world.evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, 0.003)
    slow, errors = world.evidence.checks["slow"], world.evidence.checks["errors"]
    assert (slow.samples, errors.samples) == (0, 500)
    world.canary_extra_seconds = 0.02
    assert world.go_on(500) is not None
    assert world.guilty() == {"slow"}, "what it takes with orders is"


@pytest.mark.parametrize(
    ("champion_seconds", "canary_seconds", "verdict"),
    [
        (0.003, 0.003, Verdict.BETTER_OR_EQUAL),
        (0.003, 0.1, Verdict.WORSE),
        (0.1, 0.1, Verdict.BETTER_OR_EQUAL),
        (None, 0.003, Verdict.BETTER_OR_EQUAL),
        (None, 0.1, Verdict.WORSE),
    ],
    ids=["both quick", "slower", "both slow", "never compared and quick", "never compared and slow"],
)
def test_where_the_champion_has_no_orders_the_canary_is_held_against_those_that_it_had(
    champion_seconds: float | None, canary_seconds: float, verdict: Verdict
) -> None:
    judge = Judge()
    for _ in range(500 if champion_seconds else 0):
        judge.evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, champion_seconds or 0.0)
        judge.go_by(0.1)
    judge.evidence.restart()
    for _ in range(1_000):
        judge.evidence.observe_batch(Side.CANARY, Outcome.SUCCESS, canary_seconds)
        judge.evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, math.nan)  # it scores what the canary decides
        judge.go_by(0.1)
    assert judge.evidence.checks["slow"].verdict is verdict


def test_two_seconds_in_which_a_machine_stands_still_roll_back_no_canary_that_gets_all_orders() -> None:
    judge = Judge()
    for tenth in range(6_000):
        stands_still = tenth % 600 >= 580  # two seconds a minute
        for _ in range(10):
            judge.evidence.observe_batch(Side.CANARY, Outcome.SUCCESS, 0.5 if stands_still else 0.003)
        judge.go_by(0.1)
    assert judge.evidence.checks["slow"].verdict is Verdict.BETTER_OR_EQUAL


@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_orders_in_columns_that_fail_for_both_speak_against_neither(size: int) -> None:
    """Those of one model are told of together, after those of the other."""
    world = World(8)
    for _ in range(600):
        fails = bool(world.random.random() < 0.15)
        for side in (Side.CANARY, Side.CHAMPION):
            for _ in range(size):
                world.evidence.observe_order(side, attempt(not fails))
        world.go_by(0.2)
    fallback = world.evidence.checks["fallback"]
    assert (fallback.verdict, fallback.samples) == (Verdict.BETTER_OR_EQUAL, 600)
    assert fallback.canary == fallback.champion


def test_orders_of_the_canarys_that_find_no_partner_say_nothing_while_the_champion_has_some() -> None:
    judge = Judge()
    for _ in range(100):
        for side, orders in ((Side.CANARY, 90), (Side.CHAMPION, 10)):
            for number in range(orders):
                judge.evidence.observe_order(side, attempt(answered=number < 10))
        judge.go_by(0.2)
    fallback = judge.evidence.checks["fallback"]
    assert (fallback.samples, fallback.canary, fallback.verdict) == (100, 0.0, Verdict.BETTER_OR_EQUAL)
    for _ in range(100):
        judge.evidence.observe_order(Side.CANARY, attempt(answered=False))
        judge.go_by(0.2)
    assert fallback.verdict is Verdict.WORSE, "without any, its own do"


@pytest.mark.parametrize("rare", Side)
def test_standstills_that_are_slow_for_both_speak_against_neither_however_few_batches_one_has(rare: Side) -> None:
    """Of the model that has many batches, seven from before a standstill wait for a partner."""
    judge, often = Judge(), Side(1 - rare.value)
    for _ in range(400):
        for number in range(100):
            judge.go_by(0.01)
            judge.evidence.observe_batch(often, Outcome.SUCCESS, 0.001)
            if number % 20 == 0:
                judge.evidence.observe_batch(rare, Outcome.SUCCESS, 0.001)
        judge.go_by(0.3)
        for side in (often, rare):
            judge.evidence.observe_batch(side, Outcome.SUCCESS, 0.3)
    slow = judge.evidence.checks["slow"]
    assert slow.canary == slow.champion > 0.0
    assert slow.verdict is Verdict.BETTER_OR_EQUAL


def test_a_machine_that_is_slow_for_both_rolls_nothing_back() -> None:
    world = World(5, CanarySettings(slow_seconds=0.001))
    assert world.go_on(2_000) is None


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_canary_that_fails_is_found(share: float) -> None:
    world = World(6)
    world.canary_failure_share = share
    found = world.go_on(1_000)
    assert found is not None
    assert world.guilty() & {"errors", "fallback"}


def test_a_canary_that_fails_when_the_champion_fails_is_no_worse() -> None:
    evidence = Judge().evidence
    for number in range(1_000):
        outcome = Outcome.TRANSPORT if number % 3 else Outcome.SUCCESS
        evidence.observe_batch(Side.CHAMPION, outcome, 0.001)
        evidence.observe_batch(Side.CANARY, outcome, 0.001)
    assert evidence.checks["errors"].verdict is Verdict.BETTER_OR_EQUAL


def test_a_canary_that_leaves_its_orders_to_the_champion_is_found_with_and_without_orders_to_compare_it_with() -> None:
    for champion_orders in (True, False):
        judge = Judge()
        evidence = judge.evidence
        for _ in range(100):
            if champion_orders:
                evidence.observe_order(Side.CHAMPION, attempt(True))
            evidence.observe_order(Side.CANARY, attempt(False))
            judge.go_by(0.1)
        assert evidence.verdict is Verdict.WORSE
        assert evidence.reason.startswith("fallback: another replica answered 100.0% of its orders and 0.0% of")


def test_orders_that_a_stalled_machine_leaves_unanswered_on_both_sides_speak_against_nobody() -> None:
    judge = Judge()
    for number in range(1_000):
        answered = number % 100 >= 30
        judge.evidence.observe_order(Side.CANARY, attempt(answered))
        judge.evidence.observe_order(Side.CHAMPION, attempt(answered))
        judge.go_by(0.1)
    assert judge.evidence.checks["fallback"].verdict is Verdict.BETTER_OR_EQUAL


@pytest.mark.parametrize("impatient", Side)
def test_what_one_sides_callers_allow_less_than_the_others_speaks_against_nobody(impatient: Side) -> None:
    judge, random = Judge(), np.random.default_rng(3)
    for _ in range(1_000):
        for side in Side:
            allowed = 0.005 if side is impatient else 0.02
            seconds = float(random.uniform(0.001, 0.009))  # either model takes as long
            judge.evidence.observe_order(side, FirstAttempt(seconds if seconds <= allowed else math.inf, allowed))
        judge.go_by(0.1)
    check = judge.evidence.checks["fallback"]
    assert check.canary == pytest.approx(check.champion, abs=0.05)
    assert check.verdict is not Verdict.WORSE


def test_overload_and_what_we_gave_up_ourselves_are_nobodys_fault() -> None:
    evidence = Judge().evidence
    for _ in range(100):
        evidence.observe_batch(Side.CHAMPION, Outcome.SUCCESS, 0.001)
        evidence.observe_batch(Side.CANARY, Outcome.OVERLOAD, 0.001)
        evidence.observe_batch(Side.CANARY, Outcome.IGNORED, 0.001)
    assert evidence.checks["errors"].samples == 0


def test_a_canary_that_trades_what_turns_out_badly_is_found_by_its_outcomes() -> None:
    world = World(7)
    world.canary_score = lambda champion: 0.9 + champion / 100  # ordered alike, and far too sure
    assert world.go_on(3_000) is not None
    assert world.guilty() <= {"brier", "bad_trades"}


def test_outcomes_are_waited_for_where_they_are_wanted() -> None:
    world = World(8, CanarySettings(min_orders=20, min_pairs=50))
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
    evidence = Judge(CanarySettings(min_orders=100, min_pairs=500, min_outcomes=0)).evidence
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
    evidence = Judge(CanarySettings(min_orders=10)).evidence
    check = evidence.checks["errors"]
    for number in range(11):
        check.observe(float(number % 2), 0.0 if number % 3 else 1.0)
    assert check.verdict is Verdict.NO_EVIDENCE
    assert str(check).endswith("enough samples (11 of 10 samples), but it may still be chance")


def test_rows_of_one_instrument_within_the_horizon_are_one_observation_the_mean_of_theirs() -> None:
    judge = Judge()
    for number in range(1_000):
        disagrees = number % 4 == 0
        for name in ("BTCUSDT.SIM", "ETHUSDT.SIM"):
            judge.evidence.observe_pair(name, pair(0.7, 0.5 if disagrees else 0.7))
            judge.evidence.observe_outcome(name, pair(0.7, 0.5), True)
    checks = judge.evidence.checks
    assert {check.samples for check in checks.values()} == {0}, "more rows may come"
    judge.go_by()
    assert {name for name, check in checks.items() if check.samples == 2} == set(checks) - {
        "errors",
        "slow",
        "fallback",
    }
    assert checks["disagreement"].canary == 0.25
    assert checks["missed_trades"].canary == 1.0


def test_what_is_under_way_when_a_step_begins_belongs_to_the_one_before() -> None:
    judge = Judge()
    judge.evidence.observe_pair(NAME, pair(0.7, 0.5))
    judge.evidence.restart()
    judge.go_by()
    assert judge.evidence.checks["disagreement"].samples == 0


@pytest.mark.long
@pytest.mark.parametrize(("seconds", "verdict"), [(5.0, Verdict.NO_EVIDENCE), (0.001, Verdict.WORSE)])
def test_a_reseeded_champion_at_a_thousand_orders_a_second_is_not_rolled_back_within_a_minute(
    seconds: float, verdict: Verdict
) -> None:
    """In a tenth of the states of two seconds it decides otherwise, for better or worse alike."""
    judge, random = Judge(CanarySettings(independent_seconds=seconds)), np.random.default_rng(11)
    for state in range(30):
        champion, eligible = (0.7, 0.5)[state % 2], bool(random.random() < 0.6)
        canary = 1.2 - champion if state % 10 < 1 else champion + 0.01
        for _ in range(2_000):
            judge.evidence.observe_pair(NAME, pair(champion, canary))
            judge.evidence.observe_outcome(NAME, pair(champion, canary), eligible)
            judge.clock.now += 0.001
        judge.evidence.settle()
    assert judge.evidence.verdict is verdict


def test_a_batch_that_is_late_is_one_observation_however_many_orders_were_in_it() -> None:
    judge = Judge()
    for _ in range(64):
        judge.evidence.observe_order(Side.CANARY, attempt(False))
    judge.go_by(0.2)
    judge.go_by(0.1)
    assert judge.evidence.checks["fallback"].samples == 1
    assert judge.evidence.verdict is Verdict.NO_EVIDENCE


class Other(World):
    """A champion that knows little, and a canary with other scores; the canary's are the probabilities."""

    def ask(self, rows: int, better: bool = True) -> None:
        """So many rows, whose probabilities the canary knows, or knows nothing of."""
        for _ in range(rows):
            self._batch(Side.CHAMPION, 0.0, 0.0)
            self._batch(Side.CANARY, 0.0, 0.0)
            for side in Side:
                self.evidence.observe_order(side, attempt(True))
            true, guess = float(self.random.random()), float(self.random.random())
            scored = pair(0.8 * guess + 0.2 * true, true if better else float(self.random.random()))
            self.evidence.observe_pair(NAME, scored)
            if self.outcomes:
                self.evidence.observe_outcome(NAME, scored, bool(self.random.random() < true))
            self.go_by()


def test_a_canary_that_is_other_and_better_is_proven_by_its_outcomes() -> None:
    world = Other(12)
    world.ask(600)
    checks = world.evidence.checks
    assert checks["disagreement"].beyond
    assert checks["disagreement"].canary > 0.4
    assert checks["disagreement"].verdict is Verdict.NO_EVIDENCE
    assert "it must be better" in str(checks["disagreement"])
    verdicts = [world.verdict]
    assert world.evidence.reason.startswith("other than the champion, and better: its Brier score is 0.1")
    world.evidence.restart()
    verdicts.append(world.verdict)
    assert verdicts == [Verdict.BETTER_OR_EQUAL, Verdict.NO_EVIDENCE], "every step wants evidence of its own"


def test_a_canary_that_is_other_and_not_shown_to_be_better_waits() -> None:
    world = Other(13)
    world.outcomes = False
    world.ask(600)
    assert world.verdict is Verdict.NO_EVIDENCE
    assert "better (0 of 50 samples)" in world.evidence.reason
    assert "disagreement" not in world.evidence.reason
    worse = Other(14)
    worse.ask(2_000, better=False)
    assert worse.verdict is Verdict.WORSE
    assert worse.guilty() <= {"brier", "bad_trades"}


def test_where_no_outcomes_are_waited_for_a_canary_that_is_other_is_rolled_back() -> None:
    world = Other(15, CanarySettings(min_outcomes=0))
    world.ask(600)
    assert world.verdict is Verdict.WORSE
    assert "disagreement" in world.guilty()


def test_a_canary_that_trades_nothing_any_more_is_found_by_what_it_misses() -> None:
    world = World(16)
    world.canary_score = lambda champion: 0.59 * champion
    assert world.go_on(1_000) is not None
    assert world.guilty() & {"missed_trades", "brier"}
    careful = World(17, CanarySettings(max_brier_excess=0.99, max_missed_trade_excess=0.1))
    careful.canary_score = lambda champion: 0.59 * champion
    assert careful.go_on(1_000) is not None
    assert careful.guilty() == {"missed_trades"}


def test_what_spoke_for_a_canary_before_it_became_other_speaks_for_it_no_more() -> None:
    judge = Judge()
    disagreement = judge.evidence.checks["disagreement"]

    def go_on(canary: float) -> None:
        for _ in range(200):
            judge.evidence.observe_pair(NAME, pair(0.7, canary))
            judge.go_by()

    go_on(0.7)
    verdicts = [disagreement.verdict]
    go_on(0.5)
    verdicts.append(disagreement.verdict)
    judge.evidence.restart()
    go_on(0.7)
    verdicts.append(disagreement.verdict)
    assert disagreement.beyond
    assert verdicts == [Verdict.BETTER_OR_EQUAL, Verdict.NO_EVIDENCE, Verdict.BETTER_OR_EQUAL]


@pytest.mark.parametrize(
    ("settings", "span_seconds", "observations"),
    [(SETTINGS, 0.5, 6), (SETTINGS, 30.0, 1), (SETTINGS.model_copy(update={"independent_seconds": 1.0}), 30.0, 30)],
)
def test_rows_within_what_the_label_looks_ahead_are_one_observation(
    settings: CanarySettings, span_seconds: float, observations: int
) -> None:
    judge = Judge(settings, span_seconds=span_seconds)
    judge.clock.now = 1_020.0  # the beginning of a span of any of these lengths
    for _ in range(300):
        judge.evidence.observe_outcome(NAME, pair(0.7, 0.7), eligible=True)
        judge.go_by(0.1)
    judge.go_by(30.0)
    assert judge.evidence.checks["bad_trades"].samples == observations


def trial_of_another_label(canary: Callable[[float], float]) -> Evidence:
    """What is said of a canary whose label the champion has not learnt, after many observations."""
    random = np.random.default_rng(3)
    judge = Judge(same_label=False)
    for _ in range(600):
        for side in Side:
            judge.evidence.observe_batch(side, Outcome.SUCCESS, 0.003)
            judge.evidence.observe_order(side, attempt(answered=True))
        champion = float(random.beta(6, 4))
        scored = pair(champion, canary(champion))
        judge.evidence.observe_pair(NAME, scored)
        judge.evidence.observe_outcome(NAME, scored, bool(random.random() < champion))
        judge.go_by()
    return judge.evidence


def test_scores_of_different_labels_are_not_compared() -> None:
    # The canary scores much higher, and trades the same: its threshold is that of its own label.
    evidence = trial_of_another_label(lambda score: THRESHOLD + (score - THRESHOLD) * 0.2)
    assert evidence.checks.keys().isdisjoint({"score_shift", "brier", "better"})
    assert evidence.verdict is Verdict.BETTER_OR_EQUAL
    assert evidence.reason == "within every tolerance"


def test_a_canary_of_another_label_that_trades_otherwise_cannot_be_better() -> None:
    evidence = trial_of_another_label(lambda score: 0.9 if score > 0.4 else 0.1)
    assert evidence.verdict is Verdict.WORSE
    assert evidence.checks["disagreement"].verdict is Verdict.WORSE
