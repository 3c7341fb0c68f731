"""Orders that came together on their way through the usual case, in columns: what they have in common is there once.

The usual case is that an instrument is known and fresh, that the first stage that can be asked asks one model and gets
all scores from one version of it, and that no guard objects. Stages that can be asked for none of the orders are passed
over for all of them. What else may happen to an order is `Case`'s affair: who meets it is taken out of the block, and
goes on alone from where the block stands. So there is one account of everything unusual, and a
block is never more than a short way to what each of its orders would have got by itself; tests hold one against the
other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

from fallback.order import Answer, Attempt, Case, Part, held_against
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fallback.budget import Budget, Use
    from fallback.order import Order, Reasons
    from feature_cache.feature_set import FeatureSet, SetRow
    from feature_cache.store.codec import FeatureSnapshot


_REACHED, _MISSED = held_against(0.5, 0.5), held_against(0.0, 0.5)
"""Action and reason of a score at or above its threshold, and of one below it."""


class View(NamedTuple):
    """What is known of an instrument, and may decide: the same for all orders of a side and model at one instant."""

    snapshot: FeatureSnapshot
    age_seconds: float
    """Of the snapshot."""
    mid: float
    """Quote currency."""
    features: NDArray[np.float32]
    """Those of `mf1`, turned for the side; nobody may change them."""
    row: bytes
    """The same as a model gets them."""
    others: Mapping[FeatureSet, SetRow | None] | None = None
    """See `Case.others`."""

    def row_of(self, feature_set: FeatureSet) -> bytes | None:
        """What a model of this set gets; None where a part of it is missing."""
        if feature_set is features.MF1:
            return self.row
        return None if self.others is None else self.others.get(feature_set)


class Model(Protocol):
    """What a model says of itself."""

    @property
    def name(self) -> str:
        """Of the registry."""
        ...

    @property
    def version(self) -> str:
        """First 16 hex digits of its content hash."""
        ...

    @property
    def threshold(self) -> float:
        """TRADE at or above it."""
        ...

    @property
    def expires_at(self) -> int:
        """Unix seconds; 0 for never."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """Of a model that is made of several."""
        ...


class Scored(Protocol):
    """What a row got of a model."""

    @property
    def score(self) -> float:
        """In [0, 1]."""
        ...

    @property
    def part_scores(self) -> tuple[float, ...]:
        """What each part of the model says."""
        ...

    @property
    def batch_rows(self) -> int:
        """Rows that were scored together."""
        ...

    @property
    def batch_index(self) -> int:
        """This one's place among them."""
        ...

    @property
    def queued_seconds(self) -> float:
        """How long it waited for its batch."""
        ...

    @property
    def call_parent(self) -> str:
        """`traceparent` that the batch's call carried; empty without a trace."""
        ...


class Scores(Sequence[Any]):
    """What the rows of a block got that were scored in one call.

    As a sequence it has the result of each order, of the stage's own kind, which is made when somebody asks for it.

    Args:
        values: The score of each order, in [0, 1].
        model: That gave them.
        batch_rows: Rows that were scored together: these, and maybe others.
        first_index: The place of the first of these among them.
        part_scores: What each part of the model says of each order; None of a model that is not made of parts.
        result: Makes an order's result, by its place in the block.
    """

    __slots__ = ("_result", "batch_rows", "first_index", "model", "part_scores", "values")

    def __init__(
        self,
        values: list[float],
        model: Model,
        batch_rows: int,
        first_index: int,
        part_scores: list[list[float]] | None,
        result: Callable[[int], Any],
    ) -> None:
        self.values = values
        self.model = model
        self.batch_rows = batch_rows
        self.first_index = first_index
        self.part_scores = part_scores
        self._result = result

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self._result(one) for one in range(*place.indices(len(self.values)))]
        if not 0 <= place < len(self.values):  # also the end of an iteration
            raise IndexError(place)
        return self._result(place)


class Own(NamedTuple):
    """What an order of a block that has a caller of its own does not share with the others."""

    arrived: float
    """In monotonic seconds."""
    deadline: float
    """The same; never before the block's."""
    admission: Use
    """Its first entry in the ledger."""


class Block(ABC):
    """Some orders that came together, and their first attempt.

    Args:
        orders: n of them, without idempotency keys and features of their own, and without a trace.
        views: What is known of each.
        budget: Of all of them. Its first entry in the ledger is that of the admission.
        chosen: The model that the map chose for all of them; empty where there is one model.
        stages: See `Case.stages`.
        own: The arrival and deadline of each, where they have their own; the budget's deadline is the earliest.
    """

    __slots__ = (
        "actions",
        "allowed",
        "asked_at",
        "asked_of",
        "before_model",
        "budget",
        "chosen",
        "degradations",
        "missing",
        "model",
        "objections",
        "orders",
        "own",
        "reasons",
        "results",
        "scores",
        "source",
        "stages",
        "used",
        "views",
    )

    def __init__(
        self,
        orders: Sequence[Order],
        views: Sequence[View],
        budget: Budget,
        chosen: str = "",
        stages: tuple[str, ...] = (),
        own: Sequence[Own] | None = None,
    ) -> None:
        self.own = own
        self.chosen = chosen
        self.stages = stages
        self.orders = orders
        self.views = views
        self.budget = budget
        self.before_model = len(budget.uses)
        """How many entries the ledger has before those of the stage that is asked."""
        self.degradations: list[pb.Degradation.ValueType] = []
        """Of every order: why stages were passed over."""
        self.asked_at = math.nan
        """When the attempt began, in monotonic seconds."""
        self.asked_of = ""
        """The replica that it is made at."""
        self.allowed = 0.0
        """Seconds that it may take."""
        self.used = 0.0
        """Seconds that it took."""
        self.results: list[Any] | Scores = [None] * len(orders)
        """Of the stage's own kind, None until there is one; once they are answered, each is a `Scored`."""
        self.scores: list[float] = []
        """Once they are answered."""
        self.missing = len(orders)
        """Results that are still to come."""
        self.model: Model | None = None
        self.source = pb.SOURCE_NONE
        self.actions: list[pb.Action.ValueType] = []
        """Once they are answered; after the guards, what these made of them."""
        self.reasons: list[pb.ReasonCode.ValueType] = []
        """Of the answers themselves."""
        self.objections: list[Reasons] = []
        """Of the guards, by order; empty where they object to none."""

    def __len__(self) -> int:
        """The orders that are still in it."""
        return len(self.orders)

    def pass_over(self, stage: pb.Stage.ValueType, allowed_seconds: float, reason: pb.Degradation.ValueType) -> None:
        """Notes why a stage is asked for none of the orders."""
        self.budget.skip(stage, allowed_seconds, reason)
        self.before_model = len(self.budget.uses)
        if reason not in self.degradations:
            self.degradations.append(reason)

    def put_all(self, scores: Scores) -> None:
        """Takes the scores of all orders, of which none has a result."""
        self.results, self.missing = scores, 0
        self.complete()

    def put(self, place: int, result: Any) -> None:
        """Takes the result of an order."""
        assert isinstance(self.results, list)
        self.results[place] = result
        self.missing -= 1
        if not self.missing:
            self.complete()

    @abstractmethod
    def complete(self) -> None:
        """The attempt of each order has ended."""

    @abstractmethod
    def is_left(self) -> bool:
        """Whether nobody waits for an order of the block: all have gone, or have their decisions."""

    @abstractmethod
    def is_gone(self, place: int) -> bool:
        """Whether nobody waits any more for the result of an order, by its place when the attempt began."""

    def has_left(self) -> bool:
        """Whether nobody waits any more for the result of at least one order, while none has a result."""
        return any(map(self.is_gone, range(len(self))))

    @abstractmethod
    def put_failure(self, place: int, result: Any) -> None:
        """Takes the result of an order that got no score."""

    def answered(self, source: pb.Source.ValueType, model: Model, used: float) -> None:
        """All results are usable scores of one model, whose attempt took so long."""
        self.source, self.model, self.used = source, model, used
        results, threshold = self.results, model.threshold
        self.scores = results.values if isinstance(results, Scores) else [one.score for one in results]
        (trade, reached), (no_trade, missed) = _REACHED, _MISSED
        self.actions = [trade if score >= threshold else no_trade for score in self.scores]
        self.reasons = [reached if score >= threshold else missed for score in self.scores]

    def rows_of(self, feature_set: FeatureSet) -> list[bytes | None]:
        """What a model of a set gets of each order; None of one that a part is missing of."""
        if feature_set is features.MF1:
            return [view.row for view in self.views]
        return [view.row_of(feature_set) for view in self.views]

    def whole_rows_of(self, feature_set: FeatureSet) -> list[bytes] | None:
        """The same; None where a part of one is missing."""
        rows = self.rows_of(feature_set)
        whole = [row for row in rows if row is not None]
        return whole if len(whole) == len(rows) else None

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with these orders alone."""
        for name in ("orders", "views", "results", "scores", "actions", "reasons", "objections"):
            column = getattr(self, name)
            setattr(self, name, [column[place] for place in places] if column else [])
        if self.own is not None:
            self.own = [self.own[place] for place in places]

    def reasons_of(self, place: int) -> list[pb.ReasonCode.ValueType]:
        """All reasons of a decision: the answer's own, and what the guards object."""
        own = self.reasons[place]
        return [own, *self.objections[place]] if self.objections else [own]

    def times(self) -> list[tuple[float, float]]:
        """Arrival and deadline of each order, in monotonic seconds."""
        if self.own is None:
            return [(self.budget.arrived, self.budget.deadline)] * len(self)
        return [(arrived, deadline) for arrived, deadline, _ in self.own]

    def uses_of(self, place: int, uses: list[Use]) -> list[Use]:
        """The ledger of one order, where that of the block is this."""
        return uses if self.own is None else [self.own[place].admission, *uses[1:]]

    def budget_of(self, place: int) -> Budget:
        """The budget of one order, which is charged by itself from now on."""
        own = self.budget.copy()
        if self.own is not None:
            own.arrived, own.deadline, own.uses[0] = self.own[place]
        return own

    def case(self, place: int, budget: Budget | None = None) -> Case:
        """An answered order as a case of its own, with this ledger or one like the block's."""
        case = Case(self.orders[place], self.budget_of(place) if budget is None else budget)
        self.fill(case, place)
        case.attempts.append(self.attempt(place))
        return case

    def fill(self, case: Case, place: int) -> None:
        """Writes into a case what is known of an order's instrument, and whose order it is."""
        view = self.views[place]
        case.model, case.others, case.stages = self.chosen, view.others, self.stages
        case.snapshot, case.snapshot_age_seconds = view.snapshot, view.age_seconds
        case.mid, case.feature_age_seconds = view.mid, view.age_seconds
        case.degradations += self.degradations
        case.take_vector(view.features, view.row)

    def each(self) -> list[tuple[Case, Answer]]:
        """Each order as a case of its own, with its answer."""
        return [(self.case(place), self.answer(place)) for place in range(len(self))]

    def attempt(self, place: int) -> Attempt:
        """An order's attempt, for the audit."""
        assert self.model is not None
        scored: Scored = self.results[place]
        return Attempt(
            self.asked_of,
            "success",
            self.used,
            self.model.version,
            scored.batch_rows,
            scored.batch_index,
            "",
            scored.queued_seconds,
            scored.call_parent,
        )

    def answer(self, place: int) -> Answer:
        """What the model says of an order."""
        model = self.model
        assert model is not None
        scored: Scored = self.results[place]
        return Answer(
            held_against(scored.score, model.threshold)[0],
            self.source,
            self.reasons[place],
            scored.score,
            model.threshold,
            model.name,
            model.version,
            model.expires_at,
            parts=model.parts,
            part_scores=scored.part_scores,
        )
