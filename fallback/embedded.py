"""The champion in the server's own process: the same model, version and threshold as on the replicas, without a call.

    margin = sum of the leaves that the row falls into, one a tree
    score  = 1 / (1 + exp(-(slope * margin + intercept)))
    action = TRADE if score >= threshold, else NO_TRADE

Margin, calibration and threshold are those of the champion's archive; scores are float32, as a replica sends them. The
stage needs no connection, so no lost model server costs the quality of an answer. By default it is asked after both
replicas. Asked before them, it saves the call, and a sample of its decisions is compared with the primary's scores.

It never answers with another version than the champion's: where that is not loaded, the next stage is asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

from fallback.order import Answer, Attempt, held_against
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from fallback.order import Case

NAME: Final = "embedded"
"""What the audit calls the model in this process, where it names a replica otherwise."""


class Scorer(Protocol):
    """A model that scores in this process, and what it says of itself."""

    name: str
    version: str
    threshold: float
    expires_at: int

    def score(self, row: bytes) -> float:
        """The calibrated score of a row, in [0, 1]. Raises `ValueError` where there is none."""


class Holder(Protocol):
    """Keeps the champion's model in this process."""

    @property
    def scorer(self) -> Scorer | None:
        """The champion's version; None when that is not loaded."""

    @property
    def lack(self) -> pb.Degradation.ValueType:
        """Why there is no scorer; unspecified where the server is to have none."""


async def _nobody(_case: Case) -> Answer | None:
    return None


class Embedded:
    """Answers with the champion's model in this process. It scores a row in less than 0.1 ms, on the event loop.

    Args:
        holder: Keeps the model.
        clock: Monotonic seconds.
        enabled: False while the stage is switched off.
        on_trial: Asked first: the answer of a model on trial to an order that is its own and that it has not been asked
            for yet. It would get no orders where this stage is asked first.
    """

    def __init__(
        self,
        holder: Holder,
        clock: Callable[[], float],
        enabled: Callable[[], bool] = lambda: True,
        on_trial: Callable[[Case], Awaitable[Answer | None]] = _nobody,
    ) -> None:
        self._holder = holder
        self._clock = clock
        self._enabled = enabled
        self._on_trial = on_trial
        self.scored = 0
        """Rows scored since start."""
        self.failed = 0
        """Rows that the model gave no score for."""

    async def answer(self, case: Case) -> Answer | None:
        """The champion's answer; None without features, a model or a score."""
        scorer = self._holder.scorer
        reason = self._holder.lack if scorer is None else pb.DEGRADATION_UNSPECIFIED
        if case.features is None or (scorer is None and not reason):
            return None
        if not self._enabled():
            reason = pb.DEGRADATION_EMBEDDED_OFF
        if scorer is None or reason:
            case.degradations.append(reason)
            case.budget.skip(pb.STAGE_EMBEDDED, 0.0, reason)
            return None
        answer = await self._on_trial(case)
        return answer if answer is not None else self._scored(case, scorer)

    def _scored(self, case: Case, scorer: Scorer) -> Answer | None:
        """The model's answer, written into the ledger and the case."""
        started = self._clock()
        allowed = max(0.0, case.budget.remaining(started))
        try:
            score = scorer.score(case.row())
        except ValueError:
            self.failed += 1
            case.budget.charge(pb.STAGE_EMBEDDED, allowed, self._clock() - started)
            case.degradations.append(pb.DEGRADATION_EMBEDDED_FAILED)
            return None
        self.scored += 1
        used = self._clock() - started
        case.budget.charge(pb.STAGE_EMBEDDED, allowed, used)
        case.attempts.append(Attempt(NAME, "success", used, scorer.version, batch_rows=1, queued_seconds=0.0))
        action, reason = held_against(score, scorer.threshold)
        return Answer(
            action,
            pb.SOURCE_EMBEDDED,
            reason,
            score,
            scorer.threshold,
            scorer.name,
            scorer.version,
            scorer.expires_at,
        )
