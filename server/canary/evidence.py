"""The evidence for and against a canary, as one process has it, and what it says.

Every check compares the canary with the champion on the same ground and is one `SequentialTest` of the mean difference
against its tolerance:

* *errors*: batches of either model at the same time, one of each, of orders or of shadow rows;
* *slow*: likewise batches of orders alone: one of shadow rows is large, and nobody waits for it. Where the champion has
  none, as at the last step, the canary's are held against those that it had in the minutes before, or against none;
* *fallback*: orders of either model's flows at the same time, one of each, that its first attempt left to another
  replica, both held against the shorter of what the two orders allowed; the canary's against none where the champion
  has no order of its own, as at the last step;
* *disagreement*, *score_shift*, *rank*: rows that both scored, whichever of them decided. For *rank* two such rows in a
  row, of one instrument, are a pair: are they ordered alike?
* *brier*, *bad_trades*, *missed_trades*: such rows whose outcome the market has shown since;
* *better*: their Brier score once more, against a tolerance of 0.

Rows are no observations. Those of one instrument within the horizon of the label know one state of the market and share
its outcome, be they five or five thousand: the mean of their differences is one observation. Orders of a tenth of a
second may have been in one batch, and are one observation of *fallback* for the same reason, as are the batches of a
quarter of a second of *slow*. What is assumed, and how seldom and how soon a canary is rolled back, is in
`docs/canary.md`.

What a caller chooses is not evidence: see `Rollout` for what is left out.

One check beyond its tolerance is enough for WORSE. To differ is not to be worse: where outcomes are waited for,
*disagreement* and *score_shift* never say WORSE. BETTER_OR_EQUAL takes all checks within their tolerance, shown at the
step that the canary is at; the outcomes of a canary that is *better* stand for *disagreement*, *score_shift* and
*rank*. Everything else is NO_EVIDENCE. The probability of an error is shared out among checks and processes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from server.canary.pairing import Lately, Pairing, Side
from server.canary.sequential import SequentialTest
from server.canary.settings import CanarySettings
from server.inference.outcome import Outcome

NEW_BET: Final = 100
"""Observations after which another bet against the canary begins. With 1,000, what begins to go wrong in between is
found several hundred observations later; with 25, so many bets share the probability of an error that all are slow."""
INDEPENDENT_SECONDS: Final = 5.0
"""Rows of one instrument within this time are one observation, where neither setting nor label says more: states of the
market outlast short horizons."""
_BATCH_SECONDS: Final = 0.1
"""Orders within this time may have been in one batch."""
_SLOW_SECONDS: Final = 0.25
"""Batches within this time are one observation of *slow*: a machine that stands still for two seconds is eight."""
_REMEMBERED: Final = 1_200
"""Such times with batches of the champion that are remembered: five minutes at least."""
_UNBLAMED: Final = frozenset((Outcome.OVERLOAD, Outcome.IGNORED))
"""Outcomes that say nothing about the model."""

_SENTENCES: Final = {
    "errors": ("{} of its batches failed, {} of the champion's; {} more is allowed", True),
    "slow": ("{} of its batches of orders were slow, {} of the champion's; {} more is allowed", True),
    "fallback": ("another replica answered {} of its orders and {} of the champion's; {} more is allowed", True),
    "disagreement": ("it decides {0} of the rows otherwise than the champion; {2} is allowed", True),
    "score_shift": ("its scores differ from the champion's by {0} on average; {2} is allowed", False),
    "rank": ("it orders {} of the pairs of rows otherwise than the champion, and {} alike; {} more is allowed", True),
    "brier": ("its Brier score is {}, the champion's {}, where 0 is best; {} more is allowed", False),
    "bad_trades": ("{} of its rows were bad trades, {} of the champion's; {} more is allowed", True),
    "missed_trades": ("it missed {} of the rows that were eligible, the champion {}; {} more is allowed", True),
    "better": ("its Brier score is {0}, the champion's {1}", False),
}
"""What each check says to people of the canary's value, the champion's and the tolerance; whether these are shares."""
_ALIKE: Final = ("disagreement", "score_shift", "rank")
"""Checks of whether the canary is like the champion. One that is better need not be."""
_BETTER: Final = "better"
_SLOW: Final = "slow"
_OF_SCORES: Final = ("score_shift", "brier", _BETTER)
"""Checks that hold one model's score against the other's, which must be probabilities of the same thing."""


class Verdict(enum.Enum):
    """What the evidence says."""

    NO_EVIDENCE = "no evidence"
    BETTER_OR_EQUAL = "better or equal"
    WORSE = "worse"


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


@dataclass(frozen=True, slots=True)
class Terms:
    """What a check demands."""

    tolerance: float
    """Of the mean difference, canary less champion."""
    minimum: int
    """Observations at a step before it can speak for the canary; with 0 it need not."""
    false_alarm_probability: float
    """See `SequentialTest`."""
    false_proof_probability: float
    """See `SequentialTest`."""
    objects: bool = True
    """False when it never says WORSE."""


class Check:
    """One comparison. Values are in [0, 1], higher is worse.

    Args:
        name: Of what is compared.
        terms: What it demands.
    """

    def __init__(self, name: str, terms: Terms) -> None:
        self.name: Final = name
        self.terms: Final = terms
        self._test = SequentialTest(
            terms.tolerance, terms.false_alarm_probability, terms.false_proof_probability, NEW_BET
        )
        self._canary_sum = self._champion_sum = 0.0
        self.samples = 0
        """Observations at this step."""

    @property
    def beyond(self) -> bool:
        """True once its mean has been shown to lie beyond the tolerance."""
        return self._test.exceeded

    @property
    def tolerance(self) -> float:
        """Of the mean difference."""
        return self.terms.tolerance

    @property
    def minimum(self) -> int:
        """Observations that it needs at a step; with 0 it need not speak."""
        return self.terms.minimum

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
        if self.beyond and self.terms.objects:
            return Verdict.WORSE
        if not self.minimum or (self._test.kept and self.samples >= self.minimum):
            return Verdict.BETTER_OR_EQUAL
        return Verdict.NO_EVIDENCE

    def observe(self, canary: float, champion: float) -> None:
        """One observation of either."""
        self.samples += 1
        self._canary_sum += canary
        self._champion_sum += champion
        was_beyond = self.beyond
        self._test.add(canary - champion)
        if self.beyond and not was_beyond:
            self._test.restart()  # what spoke for it was before that

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
        if self.beyond:
            return (
                f"not {_BETTER} ({self.progress})"
                if self.name == _BETTER
                else f"it must be {_BETTER} ({self.progress})"
            )
        if self.samples < self.minimum:
            return f"too early to say ({self.progress})"
        return f"enough samples ({self.progress}), but it may still be chance"


@dataclass(slots=True)
class _Moment:
    """Sums over the rows of one instrument within some time."""

    number: int
    rows: int = 0
    canary: float = 0.0
    champion: float = 0.0


class GatheredCheck(Check):
    """A comparison whose rows are gathered: those of one instrument within some time make one observation, their mean.

    Args:
        name, terms: See `Check`.
        seconds: That time.
    """

    def __init__(self, name: str, terms: Terms, seconds: float) -> None:
        super().__init__(name, terms)
        self._seconds = seconds
        self._open: dict[str, _Moment] = {}

    def gather(self, instrument: str, now: float, canary: float, champion: float) -> None:
        """One row of this monotonic instant."""
        number = int(now // self._seconds)
        moment = self._open.get(instrument)
        if moment is None or moment.number != number:
            if moment is not None:
                self._close(moment)
            moment = self._open[instrument] = _Moment(number)
        moment.rows += 1
        moment.canary += canary
        moment.champion += champion

    def settle(self, now: float) -> None:
        """Takes in what is over: no further row can belong to it."""
        number = int(now // self._seconds)
        for instrument in [name for name, moment in self._open.items() if moment.number != number]:
            self._close(self._open.pop(instrument))

    def _close(self, moment: _Moment) -> None:
        self.observe(moment.canary / moment.rows, moment.champion / moment.rows)

    def restart(self) -> None:
        """See `Check`; what is under way belongs to the step before."""
        super().restart()
        self._open.clear()


class Evidence:
    """All checks of one canary in one process. Used on the event loop.

    Args:
        settings: Tolerances and minima.
        clock: Monotonic seconds.
        processes: Processes that judge the canary by evidence of their own.
        span_seconds: From a decision to the end of the canary's horizon: rows within it share an outcome.
        same_label: Whether canary and champion have learnt the same label. If not, their scores are probabilities of
            different things: nothing that compares scores is judged, and the canary has to be like the champion,
            because it cannot be *better*.
    """

    def __init__(
        self,
        settings: CanarySettings,
        clock: Callable[[], float],
        processes: int = 1,
        *,
        span_seconds: float = 0.0,
        same_label: bool = True,
    ) -> None:
        orders, pairs, outcomes = settings.min_orders, settings.min_pairs, settings.min_outcomes
        limits = {
            "errors": (settings.max_error_excess, orders),
            _SLOW: (settings.max_slow_excess, orders),
            "fallback": (settings.max_fallback_share, orders),
            "disagreement": (settings.max_disagreement, pairs),
            "score_shift": (settings.max_score_shift, pairs),
            "rank": (settings.max_rank_disagreement, pairs // 2),
            "brier": (settings.max_brier_excess, outcomes),
            "bad_trades": (settings.max_bad_trade_excess, outcomes),
            "missed_trades": (settings.max_missed_trade_excess, outcomes),
            _BETTER: (0.0, max(1, outcomes)),
        }
        if not same_label:
            limits = {name: limit for name, limit in limits.items() if name not in _OF_SCORES}
        self._may_differ = outcomes > 0 and same_label
        silent = {"disagreement", "score_shift", _BETTER} if self._may_differ else {_BETTER}
        false_alarm = settings.false_rollback_probability / (len(limits.keys() - silent) * processes)
        false_proof = settings.false_step_probability / processes
        terms = {
            name: Terms(tolerance, minimum, false_alarm, false_proof, name not in silent)
            for name, (tolerance, minimum) in limits.items()
        }
        self._clock = clock
        self._slow_seconds = settings.slow_seconds
        errors = Check("errors", terms.pop("errors"))
        independent_seconds = settings.independent_seconds or max(INDEPENDENT_SECONDS, span_seconds)
        seconds = {"fallback": _BATCH_SECONDS, _SLOW: _SLOW_SECONDS}
        self._gathered = {
            name: GatheredCheck(name, one, seconds.get(name, independent_seconds)) for name, one in terms.items()
        }
        self.checks: Final[Mapping[str, Check]] = {"errors": errors, **self._gathered}
        self._errors = Pairing[float](clock, errors.observe)
        self._slow = Pairing[float](clock, partial(self._gather, _SLOW, ""), self._slow_alone)
        self._champion_was_slow = Lately(clock, _SLOW_SECONDS, _REMEMBERED)
        self._orders = Pairing[FirstAttempt](clock, self._compare_orders, self._order_alone)
        self._unpaired: dict[str, ScoredPair] = {}
        """By instrument, the newest row that is in no pair of rows."""

    @property
    def verdict(self) -> Verdict:
        """What all of it says."""
        if any(check.verdict is Verdict.WORSE for check in self.checks.values()):
            return Verdict.WORSE
        return Verdict.NO_EVIDENCE if self._missing() else Verdict.BETTER_OR_EQUAL

    @property
    def reason(self) -> str:
        """The checks that decide the verdict, as readable text."""
        worse = [check for check in self.checks.values() if check.verdict is Verdict.WORSE]
        if worse:
            return "; ".join(f"{check.name}: {check}" for check in worse)
        missing = self._missing()
        if missing:
            return f"no verdict yet from {', '.join(f'{check.name} ({check.progress})' for check in missing)}"
        if self._alike:
            return "within every tolerance"
        return f"other than the champion, and better: {self.checks[_BETTER]}"

    @property
    def _alike(self) -> bool:
        """True when the canary is shown to be like the champion."""
        return all(one.verdict is Verdict.BETTER_OR_EQUAL for name, one in self.checks.items() if name in _ALIKE)

    def _missing(self) -> list[Check]:
        """The checks that have to speak for the canary and do not yet: it is to be like the champion, or better."""
        other = self._may_differ and not self._alike
        other = other and (
            self.checks[_BETTER].verdict is Verdict.BETTER_OR_EQUAL or any(self.checks[name].beyond for name in _ALIKE)
        )
        waived = _ALIKE if other else (_BETTER,)
        return [
            check for check in self.checks.values() if check.name not in waived and check.verdict is Verdict.NO_EVIDENCE
        ]

    def settle(self) -> None:
        """Takes in the observations that are over by now."""
        for pairing in (self._slow, self._orders):
            pairing.drop_old()
        now = self._clock()
        for check in self._gathered.values():
            check.settle(now)

    def observe_batch(self, side: Side, outcome: Outcome, seconds: float) -> None:
        """How a batch of either model ended, and what it took, NaN for shadow rows. Waits for one of the other."""
        if outcome in _UNBLAMED:
            return
        self._errors.see(side, float(outcome is not Outcome.SUCCESS))
        if math.isnan(seconds):
            return
        is_slow = float(seconds > self._slow_seconds)
        if side is Side.CHAMPION:
            self._champion_was_slow.see(is_slow)
        self._slow.see(side, is_slow)

    def _slow_alone(self, is_slow: float) -> None:
        self._gather(_SLOW, "", is_slow, self._champion_was_slow.mean)

    def observe_order(self, side: Side, attempt: FirstAttempt) -> None:
        """Observes the first attempt at an order, and pairs it with one of the other model.

        Something that is slow for both, such as a stalled machine, therefore counts against neither. Nor does a caller
        with a short deadline: both orders of a pair are measured against the shorter deadline.
        """
        self._orders.see(side, attempt)

    def _compare_orders(self, canary: FirstAttempt, champion: FirstAttempt) -> None:
        within = min(canary.allowed_seconds, champion.allowed_seconds)
        self._gather("fallback", "", float(canary.seconds > within), float(champion.seconds > within))

    def _order_alone(self, canary: FirstAttempt) -> None:
        self._gather("fallback", "", float(canary.seconds > canary.allowed_seconds), 0.0)

    def observe_pair(self, instrument: str, pair: ScoredPair) -> None:
        """A row that both scored."""
        self._gather("disagreement", instrument, float(pair.canary_trades != pair.champion_trades), 0.0)
        self._gather("score_shift", instrument, abs(pair.canary_score - pair.champion_score), 0.0)
        before = self._unpaired.pop(instrument, None)
        if before is None:
            self._unpaired[instrument] = pair
            return
        product = (pair.canary_score - before.canary_score) * (pair.champion_score - before.champion_score)
        self._gather("rank", instrument, float(product < 0), float(product > 0))

    def observe_outcome(self, instrument: str, pair: ScoredPair, eligible: bool) -> None:
        """What the market has shown of a row that both scored."""
        outcome = float(eligible)
        brier = (pair.canary_score - outcome) ** 2, (pair.champion_score - outcome) ** 2
        self._gather("brier", instrument, *brier)
        self._gather(_BETTER, instrument, *brier)
        trades = pair.canary_trades, pair.champion_trades
        self._gather("bad_trades", instrument, *(float(one and not eligible) for one in trades))
        self._gather("missed_trades", instrument, *(float(eligible and not one) for one in trades))

    def _gather(self, check: str, instrument: str, canary: float, champion: float) -> None:
        gathered = self._gathered.get(check)
        if gathered is not None:
            gathered.gather(instrument, self._clock(), canary, champion)

    def restart(self) -> None:
        """A new step begins."""
        for check in self.checks.values():
            check.restart()
