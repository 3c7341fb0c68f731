"""The fallback chain: the best source still standing answers.

model (primary, secondary) → cached score → rules baseline → abstain, unless the settings say otherwise. Each stage
either answers or notes in the case why it could not, and the next one is asked. Abstaining needs nothing and therefore
never fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb

StageName = Literal["model", "cached_score", "rules"]
"""What a stage is called in the settings."""


class ChainSettings(BaseModel):
    """Who may answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stages: tuple[StageName, ...] = Field(default=("model", "cached_score", "rules"), min_length=1)
    """Stages in the order they are asked, a JSON list; one that is not named never answers. Abstain comes last."""

    @field_validator("stages")
    @classmethod
    def _each_once(cls, stages: tuple[StageName, ...]) -> tuple[StageName, ...]:
        if len(set(stages)) < len(stages):
            raise ValueError(f"a stage is named twice: {', '.join(stages)}")
        return stages


class Stage(Protocol):
    """A source of answers."""

    async def answer(self, case: Case) -> Answer | None:
        """An answer, or None with the cause added to `case.degradations`. Raises only when cancelled."""
        ...


class Chain:
    """Asks stages in order until one answers."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)

    async def decide(self, case: Case) -> Answer:
        """The answer of the first stage that has one, else ABSTAIN. Cancelling it is safe at any moment."""
        for stage in self._stages:
            answer = await stage.answer(case)
            if answer is not None:
                return answer
        return Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)
