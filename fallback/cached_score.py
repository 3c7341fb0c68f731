"""Second source: the last good score of the same question, while it is young and the market has not moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fallback.order import Answer, Case, held_against
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fallback.block import Block


_NOT_AGAIN: Final = pb.REASON_CODE_OUT_OF_DOMAIN
"""A score of features that no model has seen."""


class CachedScoreSettings(BaseModel):
    """When an earlier score may answer because no model can."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_age_seconds: float = Field(default=1.0, gt=0, le=60)
    """Age of the oldest score that may answer, in seconds. Lower it for a model whose scores lose their value
    sooner."""
    max_mid_move_bps: float = Field(default=1.0, ge=0, le=1_000)
    """Largest move of the mid since the score, in basis points either way. Raise it for a more volatile market."""
    max_feature_move: dict[str, float] = Field(default={"imbalance_l5": 0.5, "spread_bps": 1.0})
    """Largest move of single features since the score, in each feature's own unit."""

    @field_validator("max_feature_move")
    @classmethod
    def _features_exist(cls, moves: dict[str, float]) -> dict[str, float]:
        for name, move in moves.items():
            if name not in features.MF1.index:
                raise ValueError(f"{name!r} is not a feature of {features.MF1.id}")
            if not move >= 0:
                raise ValueError(f"the move of {name!r} must be >= 0")
        return moves


class _Score(NamedTuple):
    answer: Answer
    at: float
    """Arrival of the order it was made for, on the monotonic clock: its features are not newer."""
    mid: float
    features: NDArray[np.float32]
    decision_id: str


class CachedScores:
    """Keeps the last good score per (instrument, side) of the current model version, and answers with it.

    One entry a key, so it is bounded by the number of configured instruments. An answer of another model version
    replaces the entry: scores of different models are not comparable.

    Args:
        settings: When an old score may still answer.
        clock: Monotonic seconds.
        enabled: False while the stage is switched off.
        decides: Whether a model version decides at this moment; a score of one that was rolled back answers nothing.
    """

    def __init__(
        self,
        settings: CachedScoreSettings,
        clock: Callable[[], float],
        enabled: Callable[[], bool] = lambda: True,
        decides: Callable[[str], bool] = lambda version: True,
    ) -> None:
        self._clock = clock
        self._enabled = enabled
        self._decides = decides
        self._scores: dict[tuple[str, pb.Side.ValueType], _Score] = {}
        self.configure(settings)

    def configure(self, settings: CachedScoreSettings) -> None:
        """Goes by these limits from the next case on."""
        self._settings = settings
        self._moves = tuple((features.MF1.index[name], move) for name, move in settings.max_feature_move.items())

    def remember(self, case: Case, answer: Answer, decision_id: str) -> None:
        """Remembers a model's answer, but not one from features that the caller brought: another may bring others."""
        if case.features is None or case.order.brings_features or not case.mid > 0:
            return
        self._scores[case.order.instrument, case.order.side] = _Score(
            answer, case.budget.arrived, case.mid, case.features, decision_id
        )

    def remember_block(self, block: Block, ids: Sequence[str]) -> None:
        """The same for answers in columns, which no caller brought features for: the last one of each question."""
        last = {
            (order.instrument, order.side): place
            for place, order in enumerate(block.orders)
            if not block.objections or _NOT_AGAIN not in block.objections[place]
        }
        for question, place in last.items():
            view = block.views[place]
            if view.mid > 0:
                arrived = block.budget.arrived if block.own is None else block.own[place].arrived
                self._scores[question] = _Score(block.answer(place), arrived, view.mid, view.features, ids[place])

    async def answer(self, case: Case) -> Answer | None:
        """The remembered score, if it is young enough and features and mid have not moved too far.

        With the values of then and now::

            now - then                        <= max_age_seconds
            |mid_now / mid_then - 1| * 10,000 <= max_mid_move_bps
            |feature_now - feature_then|      <= max_feature_move[feature]     (or undefined both times)

        It is held against the threshold of its model anew. Asked for orders one by one: see docs/decisions.md.
        """
        if not self._enabled():
            case.degradations.append(pb.DEGRADATION_CACHED_SCORE_OFF)
            case.budget.skip(pb.STAGE_CACHED_SCORE, 0.0, pb.DEGRADATION_CACHED_SCORE_OFF)
            return None
        started = self._clock()
        kept = self._eligible(case, started)
        case.budget.charge(pb.STAGE_CACHED_SCORE, max(0.0, case.budget.remaining(started)), self._clock() - started)
        if kept is None:
            case.degradations.append(pb.DEGRADATION_NO_CACHED_SCORE)
            return None
        action, reason = held_against(kept.answer.score, kept.answer.threshold)
        return replace(
            kept.answer,
            action=action,
            source=pb.SOURCE_CACHED_SCORE,
            reason=reason,
            cached_from=kept.decision_id,
        )

    def _eligible(self, case: Case, now: float) -> _Score | None:
        current = case.features
        if current is None or case.order.brings_features:
            return None
        kept = self._scores.get((case.order.instrument, case.order.side))
        if (
            kept is None
            or not now - kept.at <= self._settings.max_age_seconds
            or not self._decides(kept.answer.model_version)
        ):
            return None
        # Written so that an undefined mid or feature (NaN) is a move too far, unless it was undefined before as well.
        if not abs(case.mid / kept.mid - 1) * 1e4 <= self._settings.max_mid_move_bps:
            return None
        for index, limit in self._moves:
            before, after = kept.features.item(index), current.item(index)
            if not abs(after - before) <= limit and not (math.isnan(before) and math.isnan(after)):
                return None
        return kept
