"""First stage of the chain: the champion model, on the primary, with exactly one retry on the secondary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fallback.budget import BudgetSettings
from fallback.order import Answer, Attempt, Case, held_against
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import Scored
from server.inference.outcome import Outcome
from server.inference.retry_budget import RetryBudget

if TYPE_CHECKING:
    from server.inference.replica import Replica

_FAILURE = {
    Outcome.OVERLOAD: (pb.DEGRADATION_PRIMARY_OVERLOADED, pb.DEGRADATION_SECONDARY_OVERLOADED),
    Outcome.MODEL_ERROR: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.TRANSPORT: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.IGNORED: (pb.DEGRADATION_PRIMARY_FAILED, pb.DEGRADATION_SECONDARY_FAILED),
    Outcome.BAD_ANSWER: (pb.DEGRADATION_PRIMARY_BAD_ANSWER, pb.DEGRADATION_SECONDARY_BAD_ANSWER),
    Outcome.TIMEOUT: (pb.DEGRADATION_PRIMARY_TIMEOUT, pb.DEGRADATION_SECONDARY_TIMEOUT),
}


class _Seat:
    """A replica's place in the stage: how its part in a decision is named."""

    __slots__ = ("breaker_open", "failure_index", "replica", "source", "stage")

    def __init__(
        self,
        replica: Replica,
        source: pb.Source.ValueType,
        stage: pb.Stage.ValueType,
        breaker_open: pb.Degradation.ValueType,
        failure_index: int,
    ) -> None:
        self.replica = replica
        self.source = source
        self.stage = stage
        self.breaker_open = breaker_open
        self.failure_index = failure_index


class Champion:
    """Scores with the champion. At most two attempts, the second on the other replica and only if it can still finish.

    A replica that is full or whose breaker is open is passed over, which costs nothing. The first attempt is made where
    the expected time fits into the attempt's, the second where the p95 fits too and the retry budget grants it.

    Args:
        primary, secondary: Replicas that serve the same model.
        retry_budget: Bounds the retries.
        budget_settings: How the time left is divided between the attempts.
        clock: Monotonic seconds, the event loop's own.
        random: Uniform in [0, 1), jitters the attempts' time so that timeouts do not come in waves.
    """

    def __init__(
        self,
        primary: Replica,
        secondary: Replica,
        retry_budget: RetryBudget,
        budget_settings: BudgetSettings,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._seats = (
            _Seat(primary, pb.SOURCE_PRIMARY, pb.STAGE_PRIMARY, pb.DEGRADATION_PRIMARY_BREAKER_OPEN, 0),
            _Seat(secondary, pb.SOURCE_SECONDARY, pb.STAGE_SECONDARY, pb.DEGRADATION_SECONDARY_BREAKER_OPEN, 1),
        )
        self._retry_budget = retry_budget
        self._first_share = budget_settings.first_attempt_share
        self._clock = clock
        self._random = random

    async def answer(self, case: Case) -> Answer | None:
        """The champion's answer, or None. Cancelling it harms no other caller."""
        if case.features is None:
            return None
        payload = case.features.astype("<f4", copy=False).tobytes()
        seats = self._passing(case)
        tried = False
        for place, seat in enumerate(seats):
            batcher = seat.replica.batcher
            now = self._clock()
            allowed = self._allowance(case.budget.for_models(now), seats[place + 1 :])
            needed = max(batcher.expected_seconds, seat.replica.latency.p95) if tried else batcher.expected_seconds
            if batcher.full:
                case.degradations.append(_FAILURE[Outcome.OVERLOAD][seat.failure_index])
            elif allowed < needed:
                if pb.DEGRADATION_NO_TIME_FOR_MODEL not in case.degradations:
                    case.degradations.append(pb.DEGRADATION_NO_TIME_FOR_MODEL)
            elif tried and not self._retry_budget.try_take():
                case.degradations.append(pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED)
            else:
                if not tried:
                    self._retry_budget.count_attempt()
                answer = await self._attempt(case, seat, payload, now, allowed)
                if answer is not None:
                    return answer
                tried = True
        return None

    def _passing(self, case: Case) -> list[_Seat]:
        """The seats whose breakers let an order pass; the others go into the case."""
        seats = []
        for seat in self._seats:
            if seat.replica.available:
                seats.append(seat)
            else:
                case.degradations.append(seat.breaker_open)
        return seats

    def _allowance(self, left: float, others: Sequence[_Seat]) -> float:
        """What an attempt may take of the seconds left: all, unless another replica could still use the rest."""
        if others and left * (1 - self._first_share) >= others[0].replica.latency.p95:
            left *= self._first_share
        return left * (1 - 0.1 * self._random())

    async def _attempt(self, case: Case, seat: _Seat, payload: bytes, now: float, allowed: float) -> Answer | None:
        """One attempt on one replica, written into the ledger and the case."""
        result = await seat.replica.batcher.submit(payload, now + allowed)
        used = self._clock() - now
        case.budget.charge(seat.stage, allowed, used)
        if isinstance(result, Scored):
            model = result.model
            case.attempts.append(Attempt(seat.replica.name, Outcome.SUCCESS.value, used, model.version))
            action, reason = held_against(result.score, model.threshold)
            return Answer(
                action, seat.source, reason, result.score, model.threshold, model.name, model.version, model.expires_at
            )
        case.attempts.append(Attempt(seat.replica.name, result.value, used, ""))
        case.degradations.append(_FAILURE[result][seat.failure_index])
        return None
