"""What can wait until decisions are durable: cached scores, mirrored rows, admission, metrics, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, TypeVar

from fallback.order import CHAMPION_SOURCES, MODEL_SOURCES
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from server.canary.burn import Notes
    from server.control.state import ControlState
    from server.decision.admission import Admission
    from server.decision.decided_block import DecidedBlock
    from server.decision.metrics import DecisionMetrics
    from server.decision.pending import Pending
    from server.decision.reports import DecisionReports
    from server.inference.routed import Check, Mirror, Scores
    from server.timing.loop_lag import LoopLag

T = TypeVar("T")

_NOT_AGAIN = frozenset((pb.REASON_CODE_AUDIT_UNAVAILABLE, pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_OUT_OF_DOMAIN))
"""Scores that are not used for a later order: those that the audit does not hold, and of features no model has seen."""
_OUT_OF_TIME = frozenset(
    (
        pb.DEGRADATION_NO_TIME_FOR_MODEL,
        pb.DEGRADATION_PRIMARY_TIMEOUT,
        pb.DEGRADATION_SECONDARY_TIMEOUT,
        pb.DEGRADATION_PRIMARY_OVERLOADED,
        pb.DEGRADATION_SECONDARY_OVERLOADED,
    )
)
"""What keeps a model from answering when too many ask it at once."""


@dataclass(frozen=True, slots=True)
class Observers:
    """What counts decisions and tells of them."""

    metrics: DecisionMetrics
    objective: Notes
    reports: DecisionReports
    loop_lag: LoopLag
    """How late the event loop is."""
    embedded_check: Check
    """Has the primary score a sample of what the embedded model decided."""


class Following:
    """Does what follows decisions, before their callers hear of them.

    Args:
        cached_scores: Keep scores for later orders.
        shadow: Mirrors rows to the models that did not decide.
        control: Says whether rows are mirrored.
        admission: Learns how long decisions take.
        observers: Count decisions and tell of them.
    """

    def __init__(
        self, cached_scores: Scores, shadow: Mirror, control: ControlState, admission: Admission, observers: Observers
    ) -> None:
        self._cached_scores = cached_scores
        self._shadow = shadow
        self._control = control
        self._admission = admission
        self._metrics = observers.metrics
        self._objective = observers.objective
        self._reports = observers.reports
        self._embedded_check = observers.embedded_check

    def cases(self, cases: Sequence[Pending], now: float) -> Mapping[Pending, Exception]:
        """Does so for cases that were decided in time.

        Returns:
            The cases that a bug was met with.
        """
        failed: dict[Pending, Exception] = {}
        is_mirrored, mirrored = self._control.shadow, []
        in_time: list[tuple[float, float]] = []
        for case in cases:
            answer, decided, budget = case.answer, case.decided, case.budget
            assert answer is not None
            assert decided is not None
            source = answer.source
            by_model, allowed = source in MODEL_SOURCES, budget.deadline - budget.arrived
            try:
                if source in CHAMPION_SOURCES and _NOT_AGAIN.isdisjoint(decided.reasons):
                    # A score that is used again must be found in the audit, where a replay of its second use looks for
                    # it. That of a model on trial is not: its flows are its own.
                    self._cached_scores.remember(case, answer, decided.decision_id)
                if source == pb.SOURCE_EMBEDDED:
                    self._embedded_check.sample(case, answer, decided.decision_id)
                self._objective.note(case, by_model)
            except Exception as error:  # a bug that one order meets is none of the others' business
                failed[case] = error
                continue
            if case.features is not None and (is_mirrored or source == pb.SOURCE_CANARY):
                mirrored.append((case, answer, decided.decision_id))
            if by_model or _OUT_OF_TIME.isdisjoint(case.degradations):
                in_time.append((now - budget.arrived, allowed))
            else:
                self._admission.dropped(allowed)
        self._admission.answered(in_time)
        sound = [case for case in cases if case not in failed] if failed else cases
        _all_or_each(self._shadow.mirror, mirrored, itemgetter(0), failed)
        _all_or_each(lambda some: self._reports.decided(some, now), sound, _itself, failed)
        _all_or_each(lambda some: self._metrics.observe(some, now), sound, _itself, failed)
        return failed

    def block(self, decided: DecidedBlock, now: float) -> None:
        """The same for decisions that were made in columns."""
        block, count = decided.block, len(decided)
        if block.source in CHAMPION_SOURCES:  # see `cases`
            self._cached_scores.remember_block(block, decided.ids)
        self._embedded_check.sample_block(block, decided.ids)
        self._reports.decided_block(decided, now)
        if self._control.shadow or block.source == pb.SOURCE_CANARY:
            self._shadow.mirror_block(block, decided.ids)
        # Where all this met no bug, nothing is counted twice.
        self._objective.note_block(block)
        if block.own is None:
            arrived, deadline = block.budget.arrived, block.budget.deadline
            self._admission.answered([(now - arrived, deadline - arrived)], count)
        else:
            self._admission.answered([(now - arrived, deadline - arrived) for arrived, deadline, _ in block.own])
        self._metrics.observe_block(decided, now)
        self._admission.leave(count)

    def too_late(self, case: Pending) -> None:
        """A decision became durable when its deadline had passed."""
        self._metrics.late += 1
        self._objective.note(case, by_model=False)
        self._admission.dropped(case.budget.allowed)


def _all_or_each(
    step: Callable[[Sequence[T]], None],
    items: Sequence[T],
    case_of: Callable[[T], Pending],
    failed: dict[Pending, Exception],
) -> None:
    """Does something for all, or, where a bug is met, for each by itself, and notes the cases that meet it then.

    The step must meet a bug before it counts anything, or what it has counted counts twice.
    """
    try:
        step(items)
    except Exception:
        for item in items:
            try:
                step((item,))
            except Exception as error:
                failed[case_of(item)] = error


def _itself(case: Pending) -> Pending:
    return case
