"""The fallback chain: the first source that can answer decides.

The order is model (primary, secondary) → embedded model → cached score → rules baseline → abstain, unless the settings
say otherwise. Each stage either answers or notes in the case why it could not, and the next one is asked. A stage that
raises has a bug: it is counted and logged, and the next one is asked all the same. Abstaining needs nothing and
therefore never fails.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import structlog
from pydantic import BaseModel, ConfigDict, Field, field_validator

from fallback.order import Answer, Case
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from fallback.block import Block
    from fallback.order import Order

_log = structlog.get_logger(__name__)

_REPORT_SECONDS: Final = 5.0
"""Between two log lines about stages that break off: a bug may be met by every order."""

StageName = Literal["model", "embedded", "cached_score", "rules"]
"""What a stage is called in the settings."""


class ChainSettings(BaseModel):
    """Which sources may answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: tuple[StageName, ...] = Field(default=("model", "embedded", "cached_score", "rules"), min_length=1)
    """Stages in the order in which they are asked; a JSON list. A stage that is not in the list never answers; abstain
    always comes last. Remove `rules` or `cached_score` if that source must not decide. Put `embedded` before `model`
    for the shortest latency; the primary then checks a sample of its scores."""

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


CaseT = TypeVar("CaseT", bound=Case)


@runtime_checkable
class JointStage(Protocol[CaseT]):
    """A stage that can begin with many cases at once, and comes back to each when its result is there."""

    def begin(self, cases: Sequence[CaseT]) -> Sequence[CaseT]:
        """Begins with those that are asked here in the usual way; returns them.

        The others are left as they are. When it raises, all of them are asked one by one in `Stage.answer`, and what
        becomes of an attempt that it made before is not looked at.
        """
        ...

    def settle(self, case: CaseT) -> Answer | None:
        """The answer of a case that was begun, now that its result is there; None to `go_on`."""
        ...

    async def go_on(self, case: CaseT) -> Answer | None:
        """What is left of the stage for a case that `settle` gave no answer; as `Stage.answer`."""
        ...


class Taken(enum.Enum):
    """What became of a block that a stage was to begin with."""

    BEGUN = enum.auto()
    """Its orders get their results."""
    PASSED_OVER = enum.auto()
    """The stage can be asked for none of them; the block says why. The next one is asked for all of them."""
    LEFT = enum.auto()
    """Nothing was done: each of them goes alone."""


@runtime_checkable
class BlockStage(Protocol):
    """A stage that can begin with orders in columns."""

    @property
    def answers_at_once(self) -> bool:
        """Whether a block has its results when it was begun, but perhaps for those of a model on trial."""
        ...

    def is_busy(self, orders: int) -> bool:
        """Whether so many orders that were begun now would wait for what is under way, or for others."""
        ...

    def on_free(self, listener: Callable[[], None]) -> None:
        """Registers a function that is called when the stage may be busy no longer."""
        ...

    def parted(self, chosen: str, orders: Sequence[Order], places: Sequence[int]) -> Iterable[Sequence[int]]:
        """The orders at these places by who scores them, a block for each; `chosen` is the name of their model."""
        ...

    def begin_block(self, block: Block) -> Taken:
        """Begins with all orders of a block, or with none."""
        ...

    def settle_block(self, block: Block) -> bool:
        """Writes the answers into the block, now that all results are there; False where they are not the usual."""
        ...

    def count_block(self, block: Block) -> None:
        """Counts the orders that the block still has, as `settle` does each of them."""
        ...


Asked = tuple[StageName, Stage]
"""A stage that is asked, and its name."""


class ForBlocks(NamedTuple):
    """What is asked of orders in columns."""

    stage: BlockStage | None
    """The first stage, if it takes them."""
    asked: tuple[Asked, ...]
    """All that are asked."""
    said: tuple[StageName, ...]
    """Their names, if they are not the default ones."""


class Chain:
    """Asks stages in order until one answers.

    Args:
        stages: By name.
        default: The stages that are asked, in this order, until others are set.
        clock: Monotonic seconds.
    """

    def __init__(
        self, stages: Mapping[StageName, Stage], default: tuple[StageName, ...], clock: Callable[[], float]
    ) -> None:
        self._known = stages
        # Once and for all: asking a protocol whether something meets it takes longer than asking the stage itself.
        self._joint: dict[StageName, JointStage[Any]] = {
            name: stage for name, stage in stages.items() if isinstance(stage, JointStage)
        }
        self._in_blocks: dict[StageName, BlockStage] = {
            name: stage for name, stage in stages.items() if isinstance(stage, BlockStage)
        }
        self._asked = self._default = tuple((name, stages[name]) for name in default)
        self._said: tuple[StageName, ...] = ()
        """What cases say of the stages that are asked: their names, if they are not the default ones."""
        self._clock = clock
        self._next_report = -math.inf
        self.broken: Counter[StageName] = Counter()
        """Times that a stage broke off with an error, by stage."""

    def for_blocks(self) -> ForBlocks:
        """What is asked now, as orders in columns need it."""
        asked = self._asked
        return ForBlocks(self._in_blocks.get(asked[0][0]), asked, self._said)

    def in_blocks(self, name: StageName) -> BlockStage | None:
        """A stage, if it takes orders in columns."""
        return self._in_blocks.get(name)

    def on_free(self, listener: Callable[[], None]) -> None:
        """Registers a function that is called when a stage may be busy no longer."""
        for stage in self._in_blocks.values():
            stage.on_free(listener)

    def ask_in_order(self, names: tuple[StageName, ...]) -> None:
        """Asks these stages in this order from the next case on; the others are not asked."""
        self._asked = tuple((name, self._known[name]) for name in names)
        self._said = () if self._asked == self._default else names

    async def decide(self, case: Case) -> Answer:
        """The answer of the first stage that has one, else ABSTAIN. Cancelling it is safe at any moment."""
        asked, case.stages = self._asked, self._said
        return await self._ask(asked, case)

    def begin(self, cases: Sequence[CaseT]) -> tuple[Sequence[CaseT], tuple[Asked, ...]]:
        """Begins with many cases at once, as far as the first stage can.

        Returns:
            Those that were begun, which `settle` is for as soon as there is a result; and the stages that are asked for
            them. All others are as they were, and for `decide`.
        """
        asked = self._asked
        name = asked[0][0]
        stage = self._joint.get(name)
        try:
            begun = () if stage is None else stage.begin(cases)
        except Exception:
            self.broke(name)
            return (), asked
        for case in begun:
            case.stages = self._said
        return begun, asked

    def settle(self, asked: tuple[Asked, ...], case: Case) -> Answer | None:
        """The answer of a case that was begun, if its result is one; else there is still `go_on`."""
        name = asked[0][0]
        try:
            return self._joint[name].settle(case)
        except Exception:
            self._note(name, case)
            return None

    async def go_on(self, asked: tuple[Asked, ...], case: Case) -> Answer:
        """The answer of a case that was begun and that `settle` had none for. Cancelling it is safe at any moment."""
        name = asked[0][0]
        try:
            answer = await self._joint[name].go_on(case)
        except Exception:
            self._note(name, case)
            answer = None
        return answer if answer is not None else await self._ask(asked[1:], case)

    async def _ask(self, asked: tuple[Asked, ...], case: Case) -> Answer:
        for name, stage in asked:
            try:
                answer = await stage.answer(case)
            except Exception:
                self._note(name, case)
                continue
            if answer is not None:
                return answer
        return Answer(pb.ACTION_ABSTAIN, pb.SOURCE_NONE, pb.REASON_CODE_NO_SOURCE)

    def _note(self, name: StageName, case: Case) -> None:
        """Counts a stage's bug, and says in the case that it met one."""
        self.broke(name)
        if pb.DEGRADATION_STAGE_BROKEN not in case.degradations:
            case.degradations.append(pb.DEGRADATION_STAGE_BROKEN)

    def broke(self, name: StageName) -> None:
        """Counts a stage's bug; logs it with its traceback, at most once in `_REPORT_SECONDS`."""
        self.broken[name] += 1
        now = self._clock()
        if now >= self._next_report:
            self._next_report = now + _REPORT_SECONDS
            _log.exception("a stage broke off, the next one is asked", stage=name, times=self.broken[name])
