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

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from fallback.block import Scores
from fallback.chain import Taken
from fallback.order import Answer, Attempt, held_against
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fallback.block import Block
    from fallback.joint_case import JointCase
    from fallback.order import Case, Order, Part
    from feature_cache.feature_set import FeatureSet

NAME: Final = "embedded"
"""What the audit calls the model in this process, where it names a replica otherwise."""


class Scorer(Protocol):
    """A model that scores in this process, and what it says of itself."""

    name: str
    version: str
    threshold: float
    expires_at: int
    feature_set: FeatureSet
    parts: tuple[Part, ...]
    """Of a model that is made of several."""

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """The calibrated scores of rows, float32[n], not yet checked, and those of a model's parts, float32[n, parts].

        Raises:
            ValueError: There are none.
        """


class Holder(Protocol):
    """Keeps the champion's model in this process."""

    @property
    def scorer(self) -> Scorer | None:
        """The champion's version; None when that is not loaded."""

    @property
    def lack(self) -> pb.Degradation.ValueType:
        """Why there is no scorer; unspecified where the server is to have none."""


class Trial(Protocol):
    """A model on trial. It is asked for its own orders first: where this stage comes first, it would get none."""

    @property
    def takes_all(self) -> bool:
        """Whether every order is its own."""

    def is_busy(self, orders: int) -> bool:
        """See `fallback.chain.BlockStage`."""

    def wants(self, case: Case) -> bool:
        """Whether an order is its own, and no model was asked for it yet."""

    async def answer_on_trial(self, case: Case) -> Answer | None:
        """Its answer to an order that it wants; None for others."""

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """See `fallback.chain.BlockStage`."""

    def begin_on_trial(self, block: Block) -> Taken | None:
        """Has it begin with a block of its own; None for other blocks."""

    def was_asked(self, replica: str) -> bool:
        """Whether it is served by a replica of this name."""

    def settle_block(self, block: Block) -> bool:
        """See `fallback.chain.BlockStage`; for blocks that it was asked for."""

    def count_block(self, block: Block) -> None:
        """The same."""

    def settle(self, case: JointCase) -> Answer | None:
        """See `fallback.chain.JointStage`; for orders that it was asked for."""


_MOST_ROWS: Final = 256
"""That are scored in one call: a third of a millisecond."""


class _Scored(NamedTuple):
    """What a row got that was scored with others."""

    score: float
    scorer: Scorer
    batch_rows: int
    """That were scored together."""
    batch_index: int
    """This one's place among them."""
    part_scores: tuple[float, ...] = ()
    queued_seconds: float = 0.0
    call_parent: str = ""


class _Asking(NamedTuple):
    """A row that came alone."""

    row: bytes
    scorer: Scorer
    result: asyncio.Future[_Scored]


class Embedded:
    """Answers with the champion's model in this process.

    It scores a row in less than 0.1 ms, and 64 in little more, on the event loop.

    Args:
        holder: Keeps the model.
        clock: Monotonic seconds.
        enabled: False while the stage is switched off.
        trial: Model on trial, or one that may come to be.
    """

    def __init__(
        self,
        holder: Holder,
        clock: Callable[[], float],
        enabled: Callable[[], bool] = lambda: True,
        trial: Trial | None = None,
    ) -> None:
        self._holder = holder
        self._clock = clock
        self._enabled = enabled
        self._trial = trial
        self.scored = 0
        """Rows scored since start."""
        self.failed = 0
        """Rows that the model gave no score for."""
        self._asking: list[_Asking] = []
        """Those that came alone in this turn of the event loop."""

    async def answer(self, case: Case) -> Answer | None:
        """The champion's answer; None without features, a model or a score."""
        scorer = self._holder.scorer
        reason = self._holder.lack if scorer is None else pb.DEGRADATION_UNSPECIFIED
        if case.features is None or (scorer is None and not reason):
            return None
        if not self._enabled():
            reason = pb.DEGRADATION_EMBEDDED_OFF
        elif scorer is not None and case.row_of(scorer.feature_set) is None:
            reason = pb.DEGRADATION_FEATURES_OF_SET_MISSING
        if scorer is None or reason:
            case.degradations.append(reason)
            case.budget.skip(pb.STAGE_EMBEDDED, 0.0, reason)
            return None
        answer = None if self._trial is None else await self._trial.answer_on_trial(case)
        return answer if answer is not None else await self._with_others(case, scorer)

    def begin(self, cases: Sequence[JointCase]) -> Sequence[JointCase]:
        """Scores all rows in one call; none where `answer` has more to do than that, or where the call fails."""
        scorer = self._holder.scorer
        asked = [case for case in cases if case.features is not None][:_MOST_ROWS]
        if self._trial is not None:
            asked = [case for case in asked if not self._trial.wants(case)]
        if scorer is None or not asked or not self._enabled():
            return ()
        started = self._clock()
        rows = [case.row_of(scorer.feature_set) for case in asked]
        whole = [row for row in rows if row is not None]
        if len(whole) < len(rows):
            asked = [case for case, row in zip(asked, rows, strict=True) if row is not None]
            if not asked:
                return ()
        try:
            results = _scored(scorer, whole)
        except ValueError:
            return ()  # each finds out by itself
        for case, result in zip(asked, results, strict=True):
            case.asked_at, case.allowed = started, max(0.0, case.budget.remaining(started))
            case.set_result(result)
        return asked

    @property
    def answers_at_once(self) -> bool:
        """True but where a model on trial gets all orders."""
        return self._trial is None or not self._trial.takes_all

    def is_busy(self, orders: int) -> bool:
        """False where it answers at once; else whether the model on trial is."""
        return self._trial is not None and self._trial.takes_all and self._trial.is_busy(orders)

    def on_free(self, listener: Callable[[], None]) -> None:
        """Never: it is not busy by itself, and a model on trial says so through the champion's stage."""

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """Those of a model on trial by themselves."""
        return (places,) if self._trial is None else self._trial.parted(chosen, orders, places)

    def begin_block(self, block: Block) -> Taken:
        """Scores a block's rows in one call, or has a model on trial begin with a block of its own."""
        scorer = self._holder.scorer
        reason = self._holder.lack if scorer is None else pb.DEGRADATION_UNSPECIFIED
        if (scorer is not None or reason) and not self._enabled():
            reason = pb.DEGRADATION_EMBEDDED_OFF
        if scorer is None or reason:
            if reason:
                block.pass_over(pb.STAGE_EMBEDDED, 0.0, reason)
            return Taken.PASSED_OVER
        if self._trial is not None and (taken := self._trial.begin_on_trial(block)) is not None:
            return taken
        rows = block.whole_rows_of(scorer.feature_set)
        if rows is None:
            return Taken.LEFT
        block.asked_at = self._clock()
        block.asked_of, block.allowed = NAME, max(0.0, block.budget.remaining(block.asked_at))
        try:
            array, of_parts = scorer.scores_and_parts(b"".join(rows))
        except ValueError:
            return Taken.LEFT
        scores, parts, count = array.tolist(), None if of_parts is None else of_parts.tolist(), len(rows)

        def result(place: int) -> _Scored:
            return _Scored(scores[place], scorer, count, place, () if parts is None else tuple(parts[place]))

        block.put_all(Scores(scores, scorer, count, 0, parts, result))
        return Taken.BEGUN

    def settle_block(self, block: Block) -> bool:
        """Makes the results of a block answers, if all of them are scores."""
        if trial := self._asked_instead(block.asked_of):
            return trial.settle_block(block)
        scores, used = block.results, self._clock() - block.asked_at
        if not isinstance(scores, Scores) or not all(0.0 <= score <= 1.0 for score in scores.values):
            return False
        block.answered(pb.SOURCE_EMBEDDED, scores.model, used)
        return True

    def count_block(self, block: Block) -> None:
        """Counts the orders that a block still has, and writes the attempt into the ledger."""
        if trial := self._asked_instead(block.asked_of):
            trial.count_block(block)
            return
        self.scored += len(block)
        block.budget.charge(pb.STAGE_EMBEDDED, block.allowed, block.used)

    def settle(self, case: JointCase) -> Answer | None:
        """The answer of a case whose row was scored with others; None without a usable score."""
        if trial := self._asked_instead(case.asked_of):
            return trial.settle(case)
        scored: _Scored = case.result
        return self._answered(case, scored, case.allowed, self._clock() - case.asked_at)

    async def go_on(self, case: JointCase) -> Answer | None:
        """None where the model has said what it has to say; its answer where another on trial had none."""
        return await self.answer(case) if self._asked_instead(case.asked_of) else None

    def _asked_instead(self, replica: str) -> Trial | None:
        """The model on trial, if a replica of this name serves it."""
        return self._trial if self._trial is not None and self._trial.was_asked(replica) else None

    async def _with_others(self, case: Case, scorer: Scorer) -> Answer | None:
        """The model's answer to one row, which is scored with all that come in the same turn of the event loop.

        Where no replica answers, the orders of many callers come here at once.
        """
        started, row = self._clock(), case.row_of(scorer.feature_set)
        assert row is not None
        loop = asyncio.get_running_loop()
        asking = _Asking(row, scorer, loop.create_future())
        self._asking.append(asking)
        if len(self._asking) == 1:
            loop.call_soon(self._score_all)
        result = await asking.result
        return self._answered(case, result, max(0.0, case.budget.remaining(started)), self._clock() - started)

    def _score_all(self) -> None:
        """Scores what has come in a turn of the event loop."""
        asking, self._asking = [one for one in self._asking if not one.result.done()], []
        for _, of_one_version in groupby(asking, key=lambda one: id(one.scorer)):
            rows = list(of_one_version)
            for first in range(0, len(rows), _MOST_ROWS):
                _score(rows[first : first + _MOST_ROWS])

    def _answered(self, case: Case, scored: _Scored, allowed: float, used: float) -> Answer | None:
        """The answer that a score gives, written into the ledger and the case."""
        case.budget.charge(pb.STAGE_EMBEDDED, allowed, used)
        score, scorer = scored.score, scored.scorer
        if not 0.0 <= score <= 1.0:  # also for NaN
            self.failed += 1
            case.degradations.append(pb.DEGRADATION_EMBEDDED_FAILED)
            return None
        self.scored += 1
        attempt = Attempt(
            NAME,
            "success",
            used,
            scorer.version,
            scored.batch_rows,
            scored.batch_index,
            queued_seconds=scored.queued_seconds,
        )
        case.attempts.append(attempt)
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
            parts=scorer.parts,
            part_scores=scored.part_scores,
        )


def _score(asking: Sequence[_Asking]) -> None:
    """Gives rows of one version of the model their scores; each by itself, where scoring them together fails."""
    scorer = asking[0].scorer
    try:
        results = _scored(scorer, [one.row for one in asking])
    except Exception as error:
        if len(asking) > 1:
            for one in asking:
                _score((one,))
        elif isinstance(error, ValueError):
            asking[0].result.set_result(_Scored(math.nan, scorer, 1, 0))
        else:
            asking[0].result.set_exception(error)
        return
    for one, result in zip(asking, results, strict=True):
        one.result.set_result(result)


def _scored(scorer: Scorer, rows: Sequence[bytes]) -> list[_Scored]:
    """What rows get that are scored together, not yet checked. Raises `ValueError` where there is nothing."""
    scores, of_parts = scorer.scores_and_parts(b"".join(rows))
    count = len(rows)
    if of_parts is None:
        return [_Scored(score, scorer, count, place) for place, score in enumerate(scores.tolist())]
    both = zip(scores.tolist(), of_parts.tolist(), strict=True)
    return [_Scored(score, scorer, count, place, tuple(parts)) for place, (score, parts) in enumerate(both)]
