"""The stages of the chain, and what follows a decision, where a server has several models: each order goes to its own.

Orders that come together are handed on together, a group for each model. None of this is there on a server with one
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from fallback.chain import Taken
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.cached_score import CachedScores, CachedScoreSettings
    from fallback.joint_case import JointCase
    from fallback.order import Answer, Case, Order
    from server.inference.embedded_check import EmbeddedCheck
    from server.inference.model_map import ModelMap
    from server.inference.shadow import Shadow


class _Stage(Protocol):
    """A model's own stage: `fallback.chain.Stage`, `JointStage` and `BlockStage` at once."""

    async def answer(self, case: Case) -> Answer | None: ...

    def begin(self, cases: Sequence[JointCase]) -> Sequence[JointCase]: ...

    def settle(self, case: JointCase) -> Answer | None: ...

    async def go_on(self, case: JointCase) -> Answer | None: ...

    @property
    def answers_at_once(self) -> bool: ...

    def is_busy(self, orders: int) -> bool: ...

    def on_free(self, listener: Callable[[], None]) -> None: ...

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]: ...

    def begin_block(self, block: Block) -> Taken: ...

    def settle_block(self, block: Block) -> bool: ...

    def count_block(self, block: Block) -> None: ...


class Scores(Protocol):
    """Keeps scores for later orders: `CachedScores` of one model, or `RoutedScores`."""

    def configure(self, settings: CachedScoreSettings) -> None:
        """Goes by these limits from the next case on."""

    def remember(self, case: Case, answer: Answer, decision_id: str) -> None:
        """Remembers a model's answer."""

    def remember_block(self, block: Block, ids: Sequence[str]) -> None:
        """The same for answers in columns."""

    async def answer(self, case: Case) -> Answer | None:
        """The remembered score, if it may answer."""


class Mirror(Protocol):
    """Mirrors decided rows: `Shadow` of one model, or `RoutedShadow`."""

    def mirror(self, decided: Sequence[tuple[Case, Answer, str]]) -> None:
        """Offers the rows of cases that have features, with their answers and ids, to those who did not decide them."""

    def mirror_block(self, block: Block, ids: Sequence[str]) -> None:
        """Offers the rows of decisions that one model has made in columns."""


class Check(Protocol):
    """Compares embedded models with their primaries: `EmbeddedCheck` of one model, or `RoutedCheck`."""

    def sample(self, case: Case, answer: Answer, decision_id: str) -> None:
        """Offers a decision."""

    def sample_block(self, block: Block, ids: Sequence[str]) -> None:
        """Offers decisions that were made in columns."""


class RoutedStage:
    """Asks each order's own model. Where this server does not have that, the next stage is asked, and no other model.

    Args:
        stages: Those of the models, by name.
        models: Chooses an order's model.
        stage: What the ledger calls it.
    """

    def __init__(self, stages: Mapping[str, _Stage], models: ModelMap, stage: pb.Stage.ValueType) -> None:
        self._stages = stages
        self._models = models
        self._stage = stage

    async def answer(self, case: Case) -> Answer | None:
        """What the order's model answers; None where this server does not have it."""
        stage = self._stages.get(self._models.of(case))
        if stage is None:
            not_here(case, self._stage)
            return None
        return await stage.answer(case)

    def begin(self, cases: Sequence[JointCase]) -> Sequence[JointCase]:
        """Begins with the orders of each model together.

        A model that raises costs the others nothing: its orders are then asked for one by one, and meet its bug there.
        """
        groups: dict[str, list[JointCase]] = {}
        for case in cases:
            groups.setdefault(self._models.of(case), []).append(case)
        begun: list[JointCase] = []
        for name, group in groups.items():
            stage = self._stages.get(name)
            try:
                begun += () if stage is None else stage.begin(group)
            except Exception:
                if len(groups) == 1:
                    raise
        return begun

    def settle(self, case: JointCase) -> Answer | None:
        """See `fallback.chain.JointStage`."""
        return self._stages[case.model].settle(case)

    async def go_on(self, case: JointCase) -> Answer | None:
        """See `fallback.chain.JointStage`."""
        return await self._stages[case.model].go_on(case)

    @property
    def answers_at_once(self) -> bool:
        """Whether that of any model does: its orders do not wait for another's model on trial."""
        return any(stage.answers_at_once for stage in self._stages.values())

    def is_busy(self, orders: int) -> bool:
        """Whether the stages of all models are: the orders may be those of any."""
        return all(stage.is_busy(orders) for stage in self._stages.values())

    def on_free(self, listener: Callable[[], None]) -> None:
        """See `fallback.chain.BlockStage`."""
        for stage in self._stages.values():
            stage.on_free(listener)

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """See `fallback.chain.BlockStage`; all together where this server does not have the model."""
        stage = self._stages.get(chosen)
        return (places,) if stage is None else stage.parted(chosen, orders, places)

    def begin_block(self, block: Block) -> Taken:
        """Begins with orders of one model; see `fallback.chain.BlockStage`."""
        stage = self._stages.get(block.chosen)
        return Taken.LEFT if stage is None else stage.begin_block(block)

    def settle_block(self, block: Block) -> bool:
        """See `fallback.chain.BlockStage`."""
        return self._stages[block.chosen].settle_block(block)

    def count_block(self, block: Block) -> None:
        """See `fallback.chain.BlockStage`."""
        self._stages[block.chosen].count_block(block)


class RoutedScores:
    """The cached scores of several models: each keeps its own.

    Args:
        scores: By model.
        models: Chooses an order's model.
    """

    def __init__(self, scores: Mapping[str, CachedScores], models: ModelMap) -> None:
        self._scores = scores
        self._models = models

    def configure(self, settings: CachedScoreSettings) -> None:
        """Goes by these limits from the next case on."""
        for scores in self._scores.values():
            scores.configure(settings)

    def remember(self, case: Case, answer: Answer, decision_id: str) -> None:
        """Remembers the answer of an order's own model."""
        self._scores[self._models.of(case)].remember(case, answer, decision_id)

    def remember_block(self, block: Block, ids: Sequence[str]) -> None:
        """The same for answers in columns."""
        self._scores[block.chosen].remember_block(block, ids)

    async def answer(self, case: Case) -> Answer | None:
        """The remembered score of the order's own model."""
        scores = self._scores.get(self._models.of(case))
        if scores is None:
            not_here(case, pb.STAGE_CACHED_SCORE)
            return None
        return await scores.answer(case)


class RoutedShadow:
    """Mirrors rows to the challenger of the model that decided them.

    Args:
        shadows: By model.
        models: Chooses an order's model.
    """

    def __init__(self, shadows: Mapping[str, Shadow], models: ModelMap) -> None:
        self._shadows = shadows
        self._models = models

    def mirror(self, decided: Sequence[tuple[Case, Answer, str]]) -> None:
        """See `Shadow.mirror`."""
        groups: dict[str, list[tuple[Case, Answer, str]]] = {}
        for one in decided:
            groups.setdefault(self._models.of(one[0]), []).append(one)
        for name, group in groups.items():
            if (shadow := self._shadows.get(name)) is not None:
                shadow.mirror(group)

    def mirror_block(self, block: Block, ids: Sequence[str]) -> None:
        """See `Shadow.mirror_block`."""
        self._shadows[block.chosen].mirror_block(block, ids)


class RoutedCheck:
    """Compares each embedded model with its own primary.

    Args:
        checks: By model.
        models: Chooses an order's model.
    """

    def __init__(self, checks: Mapping[str, EmbeddedCheck], models: ModelMap) -> None:
        self._checks = checks
        self._models = models

    def sample(self, case: Case, answer: Answer, decision_id: str) -> None:
        """See `EmbeddedCheck.sample`."""
        self._checks[self._models.of(case)].sample(case, answer, decision_id)

    def sample_block(self, block: Block, ids: Sequence[str]) -> None:
        """See `EmbeddedCheck.sample_block`."""
        self._checks[block.chosen].sample_block(block, ids)


def not_here(case: Case, stage: pb.Stage.ValueType) -> None:
    """Has the decision say that this server does not have its model."""
    case.budget.skip(stage, 0.0, pb.DEGRADATION_MODEL_NOT_HERE)
    if pb.DEGRADATION_MODEL_NOT_HERE not in case.degradations:
        case.degradations.append(pb.DEGRADATION_MODEL_NOT_HERE)
