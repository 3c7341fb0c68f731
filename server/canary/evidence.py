"""The evidence for and against a canary, as one process has it, and what it says.

Every check compares the canary with the champion on the same ground and is one `SequentialTest` of the mean difference
against its tolerance:

* *errors*, *slow*: batches of either model at the same time, one of each, of orders or of shadow rows;
* *fallback*: orders of either model's flows at the same time, one of each, that its first attempt left to another
  replica, both held against the shorter of what the two orders allowed; the canary's against none where the champion
  has hardly any order of its own, as at the last step;
* *disagreement*, *score_shift*, *rank*: rows that both scored, whichever of them decided. For *rank* two such rows in a
  row make one observation: are they ordered alike?
* *brier*, *bad_trades*: such rows whose outcome the market has shown since.

What a caller chooses is not evidence: see `Rollout` for what is left out.

One check beyond its tolerance is enough for WORSE; BETTER_OR_EQUAL takes all of them within it, shown at the step that
the canary is at. Everything else is NO_EVIDENCE. The probability of an error is shared out among checks and processes.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

from server.canary.sequential import SequentialTest
from server.canary.settings import CanarySettings
from server.inference.outcome import Outcome

_WINDOW: Final = 100
_UNPAIRED: Final = 8
"""Batches, or orders, of one model that wait for one of the other."""
_UNBLAMED: Final = frozenset((Outcome.OVERLOAD, Outcome.IGNORED))
"""Outcomes that say nothing about the model."""

_SENTENCES: Final = {
    "errors": ("{} of its batches failed, {} of the champion's; {} more is allowed", True),
    "slow": ("{} of its batches were slow, {} of the champion's; {} more is allowed", True),
    "fallback": ("another replica answered {} of its orders and {} of the champion's; {} more is allowed", True),
    "disagreement": ("it decides {0} of the rows otherwise than the champion; {2} is allowed", True),
    "score_shift": ("its scores differ from the champion's by {0} on average; {2} is allowed", False),
    "rank": ("it orders {} of the pairs of rows otherwise than the champion, and {} alike; {} more is allowed", True),
    "brier": ("its Brier score is {}, the champion's {}, where 0 is best; {} more is allowed", False),
    "bad_trades": ("{} of its rows were bad trades, {} of the champion's; {} more is allowed", True),
}
"""What each check says to people of the canary's value, the champion's and the tolerance; whether these are shares."""


class Verdict(enum.Enum):
    """What the evidence says."""

    NO_EVIDENCE = "no evidence"
    BETTER_OR_EQUAL = "better or equal"
    WORSE = "worse"


class Side(enum.Enum):
    """Whose batch it was."""

    CANARY = 0
    CHAMPION = 1


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """What both models said of one row."""

    canary_score: float
    canary_threshold: float
    champion_score: float
    champion_threshold: float

    @property
    def canary_trades(self) -> bool:
        """True when the canary says TRADE."""
        return self.canary_score >= self.canary_threshold

    @property
    def champion_trades(self) -> bool:
        """True when the champion says TRADE."""
        return self.champion_score >= self.champion_threshold


class FirstAttempt(NamedTuple):
    """What became of the first attempt at an order."""

    seconds: float
    """Until it answered; infinite when it did not."""
    allowed_seconds: float
    """What it might have taken."""


class Check:
    """One comparison. Values are in [0, 1], higher is worse.

    Args:
        name: Of what is compared.
        tolerance: Of the mean difference, canary less champion.
        minimum: Observations at a step before it can speak for the canary; with 0 it need not.
        false_alarm_probability, false_proof_probability: See `SequentialTest`.
    """

    def __init__(
        self,
        name: str,
        tolerance: float,
        minimum: int,
        false_alarm_probability: float,
        false_proof_probability: float,
    ) -> None:
        self.name: Final = name
        self.minimum: Final = minimum
        self._test = SequentialTest(tolerance, false_alarm_probability, false_proof_probability, _WINDOW)
        self._canary_sum = self._champion_sum = 0.0
        self.samples = 0
        """Observations at this step."""

    @property
    def tolerance(self) -> float:
        """Of the mean difference."""
        return self._test.tolerance

    @property
    def canary(self) -> float:
        """The canary's mean at this step; NaN without observations."""
        return self._canary_sum / self.samples if self.samples else float("nan")

    @property
    def champion(self) -> float:
        """The champion's."""
        return self._champion_sum / self.samples if self.samples else float("nan")

    @property
    def verdict(self) -> Verdict:
        """What it says; BETTER_OR_EQUAL from its minimum on, and at once where it need not speak."""
        if self._test.exceeded:
            return Verdict.WORSE
        if not self.minimum or (self._test.kept and self.samples >= self.minimum):
            return Verdict.BETTER_OR_EQUAL
        return Verdict.NO_EVIDENCE

    def observe(self, canary: float, champion: float) -> None:
        """One observation of either."""
        self.samples += 1
        self._canary_sum += canary
        self._champion_sum += champion
        self._test.add(canary - champion)

    def restart(self) -> None:
        """Starts a new step: evidence for the canary must be collected again, evidence against it stays."""
        self._test.restart()
        self._canary_sum = self._champion_sum = 0.0
        self.samples = 0

    @property
    def progress(self) -> str:
        """How many samples there are of those that are needed."""
        return f"{self.samples:,} of {self.minimum:,} samples" if self.minimum else f"{self.samples:,} samples"

    def __str__(self) -> str:
        """A sentence for people: what is compared, what came out, and what that says."""
        if not self.samples:
            return f"nothing to compare yet ({self.progress})"
        sentence, as_share = _SENTENCES[self.name]
        numbers = (self.canary, self.champion, self.tolerance)
        return (
            f"{sentence.format(*(f'{one:.1%}' if as_share else f'{one:.3g}' for one in numbers))}: {self._conclusion}"
        )

    @property
    def _conclusion(self) -> str:
        if self.verdict is Verdict.WORSE:
            return f"WORSE ({self.samples:,} samples)"
        if self.verdict is Verdict.BETTER_OR_EQUAL:
            return f"good ({self.progress})" if self.minimum else f"no objection ({self.progress})"
        if self.samples < self.minimum:
            return f"too early to say ({self.progress})"
        return f"enough samples ({self.progress}), but it may still be chance"


class Evidence:
    """All checks of one canary in one process. Used on the event loop.

    Args:
        settings: Tolerances and minima.
        processes: Processes that judge the canary by evidence of their own.
    """

    def __init__(self, settings: CanarySettings, processes: int = 1) -> None:
        orders, pairs, outcomes = settings.min_orders, settings.min_pairs, settings.min_outcomes
        limits = {
            "errors": (settings.max_error_excess, orders),
            "slow": (settings.max_slow_excess, orders),
            "fallback": (settings.max_fallback_share, orders),
            "disagreement": (settings.max_disagreement, pairs),
            "score_shift": (settings.max_score_shift, pairs),
            "rank": (settings.max_rank_disagreement, pairs // 2),
            "brier": (settings.max_brier_excess, outcomes),
            "bad_trades": (settings.max_bad_trade_excess, outcomes),
        }
        false_alarm = settings.false_rollback_probability / (len(limits) * processes)
        false_proof = settings.false_step_probability / processes
        self._slow_seconds = settings.slow_seconds
        self.checks: Final = {
            name: Check(name, tolerance, minimum, false_alarm, false_proof)
            for name, (tolerance, minimum) in limits.items()
        }
        self._batches: dict[Side, deque[tuple[float, float]]] = {side: deque(maxlen=_UNPAIRED) for side in Side}
        self._orders: dict[Side, deque[FirstAttempt]] = {side: deque(maxlen=_UNPAIRED) for side in Side}
        self._last_pair: ScoredPair | None = None

    @property
    def verdict(self) -> Verdict:
        """What all of it says."""
        found = {check.verdict for check in self.checks.values()}
        if Verdict.WORSE in found:
            return Verdict.WORSE
        return Verdict.NO_EVIDENCE if Verdict.NO_EVIDENCE in found else Verdict.BETTER_OR_EQUAL

    @property
    def reason(self) -> str:
        """The checks that decide the verdict, as readable text."""
        verdict = self.verdict
        if verdict is Verdict.BETTER_OR_EQUAL:
            return "within every tolerance"
        deciding = [check for check in self.checks.values() if check.verdict is verdict]
        if verdict is Verdict.WORSE:
            return "; ".join(f"{check.name}: {check}" for check in deciding)
        return f"no verdict yet from {', '.join(f'{check.name} ({check.progress})' for check in deciding)}"

    def observe_batch(self, side: Side, outcome: Outcome, seconds: float) -> None:
        """How a batch of either model ended, and what it took. Waits for one of the other."""
        if outcome in _UNBLAMED:
            return
        failed = outcome is not Outcome.SUCCESS
        seen = (float(failed), float(seconds > self._slow_seconds))
        other = Side.CHAMPION if side is Side.CANARY else Side.CANARY
        if not self._batches[other]:
            self._batches[side].append(seen)
            return
        waiting = self._batches[other].popleft()
        canary, champion = (seen, waiting) if side is Side.CANARY else (waiting, seen)
        self.checks["errors"].observe(canary[0], champion[0])
        self.checks["slow"].observe(canary[1], champion[1])

    def observe_order(self, side: Side, attempt: FirstAttempt) -> None:
        """Observes the first attempt at an order, and pairs it with the next one of the other model.

        Something that is slow for both, such as a stalled machine, therefore counts against neither. Nor does a caller
        with a short deadline: both orders of a pair are measured against the shorter deadline.
        """
        waiting, other = self._orders[side], self._orders[Side(1 - side.value)]
        if other:
            waited = other.popleft()
            within = min(attempt.allowed_seconds, waited.allowed_seconds)
            canary, champion = (attempt, waited) if side is Side.CANARY else (waited, attempt)
            self.checks["fallback"].observe(float(canary.seconds > within), float(champion.seconds > within))
            return
        if side is Side.CANARY and len(waiting) == _UNPAIRED:
            alone = waiting.popleft()
            self.checks["fallback"].observe(float(alone.seconds > alone.allowed_seconds), 0.0)
        waiting.append(attempt)

    def observe_pair(self, pair: ScoredPair) -> None:
        """A row that both scored."""
        self.checks["disagreement"].observe(float(pair.canary_trades != pair.champion_trades), 0.0)
        self.checks["score_shift"].observe(abs(pair.canary_score - pair.champion_score), 0.0)
        before, self._last_pair = self._last_pair, pair
        if before is not None:
            self._last_pair = None  # every pair is in one observation
            product = (pair.canary_score - before.canary_score) * (pair.champion_score - before.champion_score)
            self.checks["rank"].observe(float(product < 0), float(product > 0))

    def observe_outcome(self, pair: ScoredPair, eligible: bool) -> None:
        """What the market has shown of a row that both scored."""
        outcome = float(eligible)
        self.checks["brier"].observe((pair.canary_score - outcome) ** 2, (pair.champion_score - outcome) ** 2)
        bad = not eligible
        self.checks["bad_trades"].observe(float(bad and pair.canary_trades), float(bad and pair.champion_trades))

    def restart(self) -> None:
        """A new step begins."""
        for check in self.checks.values():
            check.restart()
