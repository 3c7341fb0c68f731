"""How fast the error budget burns: over hours and minutes for the server, over seconds for a canary.

An alarm needs two windows (Source: Beyer et al., "The Site Reliability Workbook", chapter 5). The long window shows
that the burn matters, the short one that it still goes on. Both need a minimum number of events.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pydantic import BaseModel, ConfigDict, Field

from feature_cache.constants import Constant
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.outcome import BLAMES_CONTENT

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.order import Case

_LONGEST_SECONDS = 6 * 3_600.0
_CONTENT_FAILURES: Final = frozenset(outcome.value for outcome in BLAMES_CONTENT)
_ROUNDING: Final = 1e-9
"""What a burn rate loses in binary, as a share of it."""
_ROUNDING_SECONDS: Final = 1e-6
"""What is lost when a deadline is reckoned from an arrival and back."""


@dataclass(frozen=True, slots=True)
class BurnRule:
    """An alarm while the budget burns this many times as fast as it may, over both windows."""

    rate: float
    long_seconds: float
    short_seconds: float
    min_events: int
    """In the long window; the short one wants a tenth of them."""

    def __str__(self) -> str:
        """For people, for example `14.4x over 3600 s and 300 s`."""
        return f"{self.rate:g}x over {self.long_seconds:g} s and {self.short_seconds:g} s"


class SloSettings(BaseModel):
    """The service level objective: decisions that a model answers in time.

    A call counts when a model had a fair chance: it allowed enough time, and the server's own features could decide it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: float = Field(default=0.999, gt=0, lt=1)
    """Share of the calls that a model must answer in time; the rest is the error budget."""
    min_allowed_seconds: float = Field(default=0.02, gt=0, le=10)
    """A call with a shorter deadline, in seconds, counts neither for the objective nor for or against a canary, unless
    its deadline is at least `budget.cap_seconds`. Set it to the shortest deadline at which a model has a fair
    chance."""
    min_events: Constant[int] = 1_000
    """Calls that a long window must have before its burn rate can raise an alarm: with fewer, one failed call would be
    more than the budget of the usual objective allows."""
    canary_rate: float = Field(default=50.0, gt=1)
    """A canary is rolled back when the error budget burns this many times faster than allowed, over both the last 10 s
    and the last 2 s."""
    canary_long_seconds: Constant[float] = 10.0
    """Long window of that rule, in seconds."""
    canary_short_seconds: Constant[float] = 2.0
    """Short window of that rule, in seconds."""
    canary_min_events: Constant[int] = 100
    """Calls that the last 10 s must have before that rule applies: five failed ones of them are then the usual rate."""

    def rules(self) -> tuple[BurnRule, ...]:
        """The rules of the whole server."""
        return (BurnRule(14.4, 3_600, 300, self.min_events), BurnRule(6, 21_600, 1_800, self.min_events))

    def canary_rule(self) -> BurnRule:
        """The one that watches a canary."""
        return BurnRule(self.canary_rate, self.canary_long_seconds, self.canary_short_seconds, self.canary_min_events)


class Objective:
    """Counts the calls that count towards the objective.

    Args:
        settings: Which calls do.
        cap_seconds: The most that the server grants a call.
    """

    def __init__(self, settings: SloSettings, cap_seconds: float) -> None:
        self._min_allowed_seconds = min(settings.min_allowed_seconds, cap_seconds) - _ROUNDING_SECONDS
        self.met = 0
        """Calls that a model answered in time."""
        self.missed = 0
        """Calls that none did."""

    def counts(self, case: Case) -> bool:
        """True when a model has a fair chance to answer this order.

        What makes it false is never a model's fault but the caller's choice: how long it waits, which features it
        sends or leaves out, for which instrument it asks. A single caller must not be able to use up the error budget.
        """
        budget = case.budget
        allowed = budget.deadline - budget.arrived
        if case.features is None or case.from_caller or allowed < self._min_allowed_seconds:
            return False
        return case.others is None or not (_was_not_brought(case) or _failed_on_what_was_brought(case))

    def note(self, case: Case, by_model: bool) -> None:
        """Counts a call, if it counts: whether a model answered it in time."""
        if self.counts(case):
            if by_model:
                self.met += 1
            else:
                self.missed += 1

    def note_block(self, block: Block) -> None:
        """The same for decisions that a model made in columns, from the server's own features."""
        self.met += sum(self.counted(block))

    def counted(self, block: Block) -> list[bool]:
        """The same as `counts` for each of them."""
        least = self._min_allowed_seconds
        return [deadline - arrived >= least for arrived, deadline in block.times()]


def _was_not_brought(case: Case) -> bool:
    """True when no model was asked, and one takes a feature that the caller has to bring and did not."""
    assert case.others is not None
    return not case.attempts and None in case.others.values()


def _failed_on_what_was_brought(case: Case) -> bool:
    """True when a model that takes what the caller has brought failed in a way that a row can bring about."""
    assert case.others is not None
    brought = case.order.brought
    if brought is None or brought.feature_set not in case.others:
        return False
    failed = pb.DEGRADATION_EMBEDDED_FAILED in case.degradations
    return failed or any(attempt.outcome in _CONTENT_FAILURES for attempt in case.attempts)


class Notes(Protocol):
    """Notes what became of calls: `Objective` of one model, or `RoutedObjective`."""

    def note(self, case: Case, by_model: bool) -> None:
        """Counts a call, if it counts: whether a model answered it in time."""

    def note_block(self, block: Block) -> None:
        """The same for decisions that were made in columns."""


class RoutedObjective:
    """The objectives of several models: each is judged by its own orders.

    Args:
        objectives: By model.
        model_of: The model of an order.
    """

    def __init__(self, objectives: Mapping[str, Objective], model_of: Callable[[Case], str]) -> None:
        self._objectives = objectives
        self._model_of = model_of

    def note(self, case: Case, by_model: bool) -> None:
        """See `Objective.note`. An order whose model this server does not have counts for none."""
        if (objective := self._objectives.get(self._model_of(case))) is not None:
            objective.note(case, by_model)

    def note_block(self, block: Block) -> None:
        """The same for decisions that were made in columns."""
        self._objectives[block.chosen].note_block(block)


class BurnRate:
    """Burn rates from cumulative counts, sampled once a second or so.

    Args:
        objective: Share of good events that was promised.
    """

    def __init__(self, objective: float) -> None:
        self._budget = 1.0 - objective
        self._samples: deque[tuple[float, int, int]] = deque()
        """(monotonic instant, good, bad) since start."""

    def sample(self, now: float, good: int, bad: int) -> None:
        """Notes how many events there have been until now."""
        self._samples.append((now, good, bad))
        while self._samples[0][0] < now - _LONGEST_SECONDS - 1:
            self._samples.popleft()

    def rate(self, window_seconds: float, min_events: int, since: float = float("-inf")) -> float:
        """How many times as fast as it may the budget burns in a window, of which nothing before `since` counts.

        0 with too few events. A window that is longer than what is known is as long as that.
        """
        if not self._samples:
            return 0.0
        now, good, bad = self._samples[-1]
        first = bisect_left(self._samples, max(now - window_seconds, since), key=lambda sample: sample[0])
        _, good_then, bad_then = self._samples[min(first, len(self._samples) - 1)]
        failed, events = bad - bad_then, good + bad - good_then - bad_then
        return failed / events / self._budget if events >= max(1, min_events) else 0.0

    def fires(self, rule: BurnRule, since: float = float("-inf")) -> bool:
        """True while a rule's alarm is on."""
        # 144 failures of 10,000 calls are 14.4 times a budget of 0.001, and 14.399999999999999 in binary.
        wanted = rule.rate * (1 - _ROUNDING)
        return (
            self.rate(rule.long_seconds, rule.min_events, since) >= wanted
            and self.rate(rule.short_seconds, max(1, rule.min_events // 10), since) >= wanted
        )
