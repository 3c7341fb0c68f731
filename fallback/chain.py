"""The fallback chain: the best source still standing answers.

primary and secondary model → cached score → rules baseline → abstain. Each stage either answers or notes in the case
why it could not, and the next one is asked. Abstaining needs nothing and therefore never fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb


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
