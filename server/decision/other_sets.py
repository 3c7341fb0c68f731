"""Vectors of other feature sets than `mf1`, for the models that take them.

A row is put together of what `mf1` says of the instrument, of what the feature worker has computed of other sets, and
of what the caller has brought. Each part must be as fresh as features have to be; where one is missing or older, there
is no row, and a model of the set is not asked. Only sets that a model takes at present are followed.

The parts of a row may be of different events: each is the newest there is when the order is decided.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import structlog

from fallback.staleness import is_fresh
from feature_cache import feature_sets
from feature_cache.feature_set import CALLER, ROW, FeatureSet, SetRow
from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.model_map import DEFAULT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fallback.order import Case
    from feature_cache.store.l1 import FeatureCache

_log = structlog.get_logger(__name__)
_LOOK_SECONDS: Final = 0.1
"""Between two looks which sets the models take."""


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

    @property
    def wanted(self) -> bool:
        """True while a model takes another set than `mf1`."""
        return bool(self._plans)

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
        for case in cases:
            plans = self._plans.get(self._model_of(case))
            if plans is not None and case.features is not None:
                rows = {plan.feature_set: self._row(plan, case, now) for plan in plans}
                case.others = {feature_set: row for feature_set, row in rows.items() if row is not None}

    def _row(self, plan: _Plan, case: Case, now: float) -> SetRow | None:
        """The row of a set for a case; None where a part of it is missing or stale."""
        feature_set, order = plan.feature_set, case.order
        brought = order.brought
        if brought is not None and brought.feature_set is feature_set:
            values = brought.values.copy()
        else:
            values = np.full(len(feature_set), math.nan, dtype=np.float32)
        if len(plan.must_bring) and np.isnan(values[plan.must_bring]).any():
            return None
        for part in plan.parts:
            left = np.isnan(values[part.places])
            if not left.any():
                continue
            found = self._mf1(case) if part.source == MF1.id else self._computed(part.source, order.instrument, now)
            if found is None:
                return None
            source, age = found
            own = source[part.in_source] + part.ages * np.float32(age * 1e3)
            values[part.places[left]] = own[left]
        turned = feature_set.for_sell(values) if order.side == pb.SIDE_SELL else values
        return SetRow.of(feature_set, turned.astype(ROW, copy=False).tobytes())

    def _mf1(self, case: Case) -> tuple[NDArray[np.float32], float] | None:
        """The vector of `mf1` that decides, in market orientation, and the age that its ages are to grow by."""
        own = case.order.caller_features
        if own is not None:
            return own, 0.0
        return None if case.snapshot is None else (case.snapshot.values, case.snapshot_age_seconds)

    def _computed(self, set_id: str, instrument: str, now: float) -> tuple[NDArray[np.float32], float] | None:
        """The newest vector of a computed set and its age; None if there is none that is fresh."""
        entry = self._caches[set_id].get(instrument)
        if entry is None:
            return None
        snapshot, age = entry.snapshot, entry.age_seconds(now)
        if snapshot.state is BookState.UNKNOWN or not is_fresh(age, 0.0, self._max_age_seconds):
            return None
        return snapshot.values, age
