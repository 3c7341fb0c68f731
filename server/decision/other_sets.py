"""Vectors of other feature sets than `mf1`, for the models that take them.

A row is put together of what `mf1` says of the instrument, of what the feature worker has computed of other sets, and
of what the caller has brought. Each part must be as fresh as features have to be; where one is missing or older, there
is no row, and a model of the set is not asked. Only sets that a model takes at present are followed.

The parts of a row may be of different events: each is the newest there is when the order is decided. Orders whose
callers bring nothing have the same row while its parts are the same.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import structlog

from fallback.staleness import is_fresh
from feature_cache import feature_sets
from feature_cache.feature_set import CALLER, ROW, FeatureSet, SetRow
from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.model_names import DEFAULT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fallback.order import Case, Order
    from feature_cache.store.l1 import CachedFeatures, FeatureCache

_log = structlog.get_logger(__name__)
_LOOK_SECONDS: Final = 0.1
"""Between two looks which sets the models take."""


_Source = tuple["NDArray[np.float32]", float]
"""The vector of a part's source in market orientation, and the age that its ages are to grow by."""
Computed = dict[tuple[str, str], _Source | None]
"""By set and instrument, what is known of computed sets at one instant; None where that may not decide."""


class _Made(NamedTuple):
    """A row, and what it was put together of."""

    sources: Sequence[_Source]
    row: SetRow


class _Plan:
    """How the rows of a set are put together."""

    def __init__(self, feature_set: FeatureSet) -> None:
        self.feature_set: Final = feature_set
        self.parts: Final = feature_sets.parts_of(feature_set)
        self.computed: Final = frozenset(part.source for part in self.parts if part.source != MF1.id)
        """Ids of the sets whose vectors it needs besides those of `mf1`."""
        self.must_bring: Final = np.array(
            [place for place in feature_set.from_source(CALLER) if not feature_set.features[place].may_be_undefined],
            dtype=np.intp,
        )
        self.sources: Final = tuple("" if part.source == MF1.id else part.source for part in self.parts)
        """Of each part the id of the set that it is taken from, empty for `mf1`."""
        self.grows: Final = bool(feature_set.ages)
        """Whether a row is another one when time goes by."""
        self.made: Final[dict[tuple[str, pb.Side.ValueType], _Made]] = {}
        """The newest row of each instrument and side, of orders that bring nothing."""

    def row_of(self, order: Order, sources: Sequence[_Source]) -> SetRow:
        """The row of these sources for the side of an order that brings nothing."""
        key = order.instrument, order.side
        made = self.made.get(key)
        if made is None or not self._are_the_same(sources, made.sources):
            made = self.made[key] = _Made(sources, _put_together(self, order.side, None, sources))
        return made.row

    def _are_the_same(self, sources: Sequence[_Source], others: Sequence[_Source]) -> bool:
        """Whether the same row is put together of both."""
        for (values, age), (of_other, other_age) in zip(sources, others, strict=True):
            if values is not of_other or (self.grows and age != other_age):
                return False
        return True


class OtherSets:
    """Puts together the rows of the sets that models take now.

    Args:
        in_use: The sets of the versions that may decide or be asked now, by model.
        follow: Makes the server's copy of a computed set, still to be run.
        max_age_seconds: Older features are stale.
        clock: Monotonic seconds.
        model_of: The model of an order, whose sets alone it needs rows of.
    """

    def __init__(
        self,
        in_use: Callable[[], Mapping[str, Iterable[FeatureSet]]],
        follow: Callable[[FeatureSet], FeatureCache],
        max_age_seconds: float,
        clock: Callable[[], float],
        model_of: Callable[[Case], str] = lambda case: DEFAULT,
    ) -> None:
        self._model_of = model_of
        self._in_use = in_use
        self._follow = follow
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._plans: dict[str, tuple[_Plan, ...]] = {}
        """By model, of those that take other sets than `mf1`."""
        self._caches: dict[str, FeatureCache] = {}
        self.missing: Counter[tuple[str, str]] = Counter()
        """Orders without a row since start: by set, and by the part that was missing, `CALLER` or the set that it is
        of."""

    @property
    def wanted(self) -> bool:
        """True while a model takes another set than `mf1`."""
        return bool(self._plans)

    @property
    def taken(self) -> Mapping[FeatureSet, list[str]]:
        """The models that take each set now."""
        found: dict[FeatureSet, list[str]] = {}
        for model, plans in self._plans.items():
            for plan in plans:
                found.setdefault(plan.feature_set, []).append(model)
        return found

    def computed(self, feature_set: FeatureSet) -> list[FeatureCache]:
        """The server's copies of the computed sets that the rows of a set are put together of."""
        sources = {part.source for part in feature_sets.parts_of(feature_set)}
        return [cache for set_id, cache in self._caches.items() if set_id in sources]

    @property
    def caches(self) -> Mapping[str, FeatureCache]:
        """The server's copies of computed sets, by id."""
        return self._caches

    async def run(self) -> None:
        """Follows what the models take, until cancelled."""
        async with asyncio.TaskGroup() as following:
            while True:
                for cache in self.look():
                    following.create_task(cache.run(), name=f"feature-cache-{cache.feature_set.id}")
                await asyncio.sleep(_LOOK_SECONDS)

    def look(self) -> list[FeatureCache]:
        """Sees which sets the models take; returns the copies that are new, for `run` to run."""
        in_use = self._in_use().items()
        sets = {model: dict.fromkeys(one for one in taken if one is not MF1) for model, taken in in_use}
        sets = {model: taken for model, taken in sets.items() if taken}
        if sets == {model: dict.fromkeys(plan.feature_set for plan in plans) for model, plans in self._plans.items()}:
            return []
        plans = {plan.feature_set: plan for of_model in self._plans.values() for plan in of_model}
        plans = {one: plans.get(one) or _Plan(one) for of_model in sets.values() for one in of_model}
        self._plans = {model: tuple(plans[one] for one in of_model) for model, of_model in sets.items()}
        _log.info("feature sets of models", sets=[one.version for one in plans])
        new = []
        for set_id in {one for plan in plans.values() for one in plan.computed} - self._caches.keys():
            computed = feature_sets.by_id(set_id)
            assert computed is not None
            self._caches[set_id] = self._follow(computed)
            new.append(self._caches[set_id])
        return new

    def fill_in(self, cases: Sequence[Case], now: float) -> None:
        """Gives each case with features of `mf1` a row of each set that its model takes, if its parts are there."""
        computed: Computed = {}
        for case in cases:
            model = self._model_of(case)
            if case.features is not None:
                case.others = self.rows(model, case.order, _mf1(case), now, computed, self.missing)

    def rows(
        self,
        model: str,
        order: Order,
        mf1: _Source | None,
        now: float,
        computed: Computed,
        missing: Counter[tuple[str, str]] | None = None,
    ) -> dict[FeatureSet, SetRow | None] | None:
        """The row of each set that a model takes besides `mf1`, as in `Case.others`; None where it takes no other.

        Args:
            model: Its name.
            order: Whose features of `mf1` may decide.
            mf1: These features.
            now: Monotonic seconds.
            computed: What was found at this instant for orders before.
            missing: Counts what is missing, by set and part.
        """
        plans = self._plans.get(model)
        if plans is None:
            return None
        rows: dict[FeatureSet, SetRow | None] = {}
        for plan in plans:
            brought = _brought(plan, order)
            if len(plan.must_bring) and (brought is None or np.isnan(brought[plan.must_bring]).any()):
                rows[plan.feature_set], lacking = None, CALLER
            elif isinstance(row := self._row(plan, order, brought, mf1, now, computed), SetRow):
                rows[plan.feature_set] = row
                continue
            else:
                lacking = row
            if missing is not None:
                missing[plan.feature_set.id, lacking] += 1
        return rows

    def _row(
        self,
        plan: _Plan,
        order: Order,
        values: NDArray[np.float32] | None,
        mf1: _Source | None,
        now: float,
        computed: Computed,
    ) -> SetRow | str:
        """The row of a set for an order that brings these values of it.

        Returns:
            The row; or the id of the set whose features are missing or stale.
        """
        sources = []
        for source, part in zip(plan.sources, plan.parts, strict=True):
            if values is not None and not np.isnan(values[part.places]).any():
                sources.append((values, 0.0))  # all of it is brought
                continue
            found = self._computed(source, order.instrument, now, computed) if source else mf1
            if found is None:
                return source or MF1.id
            sources.append(found)
        if values is not None or order.caller_features is not None:
            return _put_together(plan, order.side, values, sources)
        return plan.row_of(order, sources)

    def _computed(self, set_id: str, instrument: str, now: float, known: Computed) -> _Source | None:
        """The newest vector of a computed set and its age; None if there is none that is fresh."""
        key = set_id, instrument
        if key not in known:
            entry = self._caches[set_id].get(instrument)
            known[key] = None if entry is None else self._fresh(entry, now)
        return known[key]

    def _fresh(self, entry: CachedFeatures, now: float) -> _Source | None:
        snapshot, age = entry.snapshot, entry.age_seconds(now)
        if snapshot.state is BookState.UNKNOWN or not is_fresh(age, 0.0, self._max_age_seconds):
            return None
        return snapshot.values, age


def _brought(plan: _Plan, order: Order) -> NDArray[np.float32] | None:
    """What an order brings of a set; None if it brings nothing of it. A copy."""
    brought = order.brought
    return brought.values.copy() if brought is not None and brought.feature_set is plan.feature_set else None


def _mf1(case: Case) -> _Source | None:
    """The vector of `mf1` that decides."""
    own = case.order.caller_features
    if own is not None:
        return own, 0.0
    return None if case.snapshot is None else (case.snapshot.values, case.snapshot_age_seconds)


def _put_together(
    plan: _Plan,
    side: pb.Side.ValueType,
    brought: NDArray[np.float32] | None,
    sources: Sequence[_Source],
) -> SetRow:
    """A row for a side: what was brought as it is, and the rest from its sources."""
    feature_set = plan.feature_set
    values = np.full(len(feature_set), math.nan, dtype=np.float32) if brought is None else brought
    for part, (source, age) in zip(plan.parts, sources, strict=True):
        left = np.isnan(values[part.places])
        if left.any():
            own = source[part.in_source] + part.ages * np.float32(age * 1e3)
            values[part.places[left]] = own[left]
    turned = feature_set.for_sell(values) if side == pb.SIDE_SELL else values
    return SetRow.of(feature_set, turned.astype(ROW, copy=False).tobytes())
