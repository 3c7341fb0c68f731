"""Compares the embedded model with the primary, where it answers orders without asking the primary first."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.rows import Result, Row, Scored

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.budget import Budget
    from fallback.order import Answer, Case
    from server.inference.pool import Role

_log = structlog.get_logger(__name__)

_TOLERANCE: Final = 1e-6
"""Of a score."""
_REPORT_SECONDS: Final = 60.0
"""Between two log lines about disagreements."""

Fate = Literal["agreed", "disagreed", "other_version", "failed", "shed", "refused"]
FATES: Final[tuple[Fate, ...]] = ("agreed", "disagreed", "other_version", "failed", "shed", "refused")


class EmbeddedSettings(BaseModel):
    """The champion in the server's own process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the embedded model's decisions that the primary scores too, after the reply, where the chain asks
    `embedded` before `model`. Scores that differ are counted and logged."""


class EmbeddedCheck:
    """Sends a sample of the embedded model's rows to the primary, after the reply, and compares the scores.

    Nothing waits for the comparison. The rows share the primary's bounded queue of shadow rows.

    Args:
        primary: Who serves the model to compare with.
        settings: How many rows it gets.
        random: Uniform in [0, 1).
        clock: Monotonic seconds.
    """

    def __init__(
        self, primary: Role, settings: EmbeddedSettings, random: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._primary = primary
        self._share = settings.check_share
        self._random = random
        self._clock = clock
        self._next_report = -math.inf
        self.fates: dict[Fate, int] = dict.fromkeys(FATES, 0)
        """Sampled rows since start, by what became of them; those under way are missing. A version other than the
        decision's is no disagreement: a new one is on its way."""

    def sample(self, case: Case, answer: Answer, decision_id: str) -> None:
        """Offers a decision. Only one that the embedded model made before any replica was asked is a candidate."""
        if answer.source != pb.SOURCE_EMBEDDED or self._random() >= self._share or _was_asked(case.budget):
            return
        self._send(case, answer, decision_id)

    def _send(self, case: Case, answer: Answer, decision_id: str) -> None:
        replica = self._primary.pick()
        row = None if replica is None else case.row_of(replica.feature_set)
        if replica is None or row is None:
            self.fates["refused"] += 1
            return
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        from_caller = case.is_callers(replica.feature_set)
        if not replica.batcher.submit_shadow((Row(row, math.inf, future, from_caller=from_caller),)):
            self.fates["shed"] += 1
            return
        future.add_done_callback(lambda done: self._compare(done, answer, decision_id))

    def sample_block(self, block: Block, ids: Sequence[str]) -> None:
        """Offers decisions that were made in columns."""
        if block.source == pb.SOURCE_EMBEDDED and not _was_asked(block.budget):
            for place, decision_id in enumerate(ids):
                if self._random() < self._share:
                    self._send(block.case(place), block.answer(place), decision_id)

    def _compare(self, done: asyncio.Future[Result], answer: Answer, decision_id: str) -> None:
        if done.cancelled():
            return
        result = done.result()
        if not isinstance(result, Scored):
            self.fates["failed"] += 1
            return
        model = result.model
        if model.version != answer.model_version:
            self.fates["other_version"] += 1
            return
        same_action = (result.score >= model.threshold) == (answer.score >= answer.threshold)
        if same_action and abs(result.score - answer.score) <= _TOLERANCE:
            self.fates["agreed"] += 1
            return
        self.fates["disagreed"] += 1
        if (now := self._clock()) >= self._next_report:
            self._next_report = now + _REPORT_SECONDS
            _log.error(
                "the embedded model and the primary disagree",
                decision_id=decision_id,
                version=model.version,
                embedded=answer.score,
                primary=result.score,
                same_action=same_action,
                times=self.fates["disagreed"],
            )


def _was_asked(budget: Budget) -> bool:
    """True when a replica of the champion was asked or passed over before: the order then did not skip the check."""
    return any(stage in (pb.STAGE_PRIMARY, pb.STAGE_SECONDARY) for stage, *_ in budget.uses)
