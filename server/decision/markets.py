"""What the server knows of an order's instrument when it decides: the newest snapshot, its age and its vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fallback.block import View
from fallback.order import Case, Order
from fallback.staleness import judge, problem_of
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.model_names import DEFAULT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from feature_cache.store.codec import FeatureSnapshot
    from feature_cache.store.l1 import FeatureCache
    from server.decision.other_sets import Computed, OtherSets

_BOOK_AGE = features.MF1.index["book_age_ms"]
_AGES = slice(_BOOK_AGE, features.MF1.index["trade_age_ms"] + 1)
assert features.MF1.names[_AGES] == ("book_age_ms", "trade_age_ms"), "they grow with the snapshot's own age"


class _Market:
    """What a snapshot says, in the form that decisions take it: the same for all of them until the next snapshot."""

    __slots__ = ("_made_at", "_made_for", "book_age_seconds", "for_buy", "for_sell", "mid", "snapshot")

    def __init__(self, snapshot: FeatureSnapshot) -> None:
        self.snapshot = snapshot
        self.book_age_seconds = float(snapshot.values[_BOOK_AGE]) / 1e3
        self.mid = snapshot.mid
        self.for_buy = snapshot.values
        self.for_sell = features.MF1.for_sell(snapshot.values)
        self._made_at = math.nan
        self._made_for: dict[pb.Side.ValueType, tuple[NDArray[np.float32], bytes]] = {}

    def vector(self, side: pb.Side.ValueType, age: float) -> tuple[NDArray[np.float32], bytes]:
        """The vector for an order's side when the snapshot has this age, and its bytes; nobody may change it."""
        if age != self._made_at:  # cases that are looked up together have one age
            self._made_at = age
            self._made_for.clear()
        made = self._made_for.get(side)
        if made is None:
            values = (self.for_sell if side == pb.SIDE_SELL else self.for_buy).copy()
            values[_AGES] += age * 1e3
            made = self._made_for[side] = (values, values.astype(features.ROW, copy=False).tobytes())
        return made


class _Seen(NamedTuple):
    """What is known of an instrument at one instant."""

    market: _Market | None
    """None when the server has no vector."""
    age_seconds: float
    """Of the vector."""
    problem: pb.ReasonCode.ValueType | None
    """Why it may not decide."""


_NOT_LOOKED_AT: Final[Any] = object()


class Markets:
    """Fills in what is known of each case's instrument.

    Args:
        feature_cache: The server's copy of all features.
        max_age_seconds: Older features are stale.
        clock: Monotonic seconds.
        others: Fills in what models of other sets take; None where there are no such models.
    """

    def __init__(
        self,
        feature_cache: FeatureCache,
        max_age_seconds: float,
        clock: Callable[[], float],
        others: OtherSets | None = None,
    ) -> None:
        self._feature_cache = feature_cache
        self._others = others
        self._max_age_seconds = max_age_seconds
        self._clock = clock
        self._markets: dict[str, _Market] = {}
        """The newest of each instrument."""

    def look_up(self, cases: Sequence[Case]) -> None:
        """Looks up all cases' instruments at one instant. Missing or stale features are a degradation, not an error."""
        started = self._clock()
        seen: dict[str, _Seen] = {}
        for case in cases:
            name = case.order.instrument
            known = seen.get(name)
            if known is None:
                known = seen[name] = self._see(name, started)
            self._fill_in(case, known)
        if self._others is not None and self._others.wanted:
            self._others.fill_in(cases, started)
        used = self._clock() - started
        for case in cases:
            budget = case.budget
            budget.charge(pb.STAGE_FEATURES, budget.deadline - started, used)

    def views(self, orders: Sequence[Order], models: Mapping[str, Sequence[int]], now: float) -> list[View | None]:
        """What is known of the instruments of some orders at an instant; None where it may not decide.

        Args:
            orders: Without features of their own.
            models: The places of each model's orders.
            now: Monotonic seconds.
        """
        found: list[View | None] = [None] * len(orders)
        seen: dict[str, _Seen] = {}
        computed: Computed = {}
        for model, places in models.items():
            known: dict[tuple[str, pb.Side.ValueType], View | None] = {}
            for place in places:
                order = orders[place]
                instrument = order.instrument
                key = instrument, order.side
                view = known.get(key, _NOT_LOOKED_AT)
                if view is _NOT_LOOKED_AT:
                    if (at := seen.get(instrument)) is None:
                        at = seen[instrument] = self._see(instrument, now)
                    view = known[key] = self._view(order, model, at, now, computed)
                found[place] = view
        return found

    def _view(self, order: Order, model: str, seen: _Seen, now: float, computed: Computed) -> View | None:
        """What is known for an order of a model's, and others of its side."""
        market, age, problem = seen
        if market is None or problem is not None:
            return None
        others = None
        if self._others is not None:
            others = self._others.rows(model or DEFAULT, order, (market.snapshot.values, age), now, computed)
        return View(market.snapshot, age, market.mid, *market.vector(order.side, age), others)

    def _see(self, instrument: str, now: float) -> _Seen:
        """What is known of an instrument now."""
        entry = self._feature_cache.get(instrument)
        if entry is None:
            return _Seen(None, math.nan, problem_of(None, math.nan, math.nan, self._max_age_seconds))
        market, age = self._market(entry.snapshot), entry.age_seconds(now)
        problem = problem_of(market.snapshot.state, age, market.book_age_seconds, self._max_age_seconds)
        return _Seen(market, age, problem)

    def _fill_in(self, case: Case, known: _Seen) -> None:
        market, age, problem = known
        order = case.order
        own = order.caller_features
        if problem is not None or own is not None:
            judge(case, problem, self._max_age_seconds)
        if market is not None:
            case.snapshot, case.snapshot_age_seconds = market.snapshot, age
            if problem is None:
                case.mid = market.mid
            if own is None:
                case.feature_age_seconds = age
                if problem is None:
                    case.take_vector(*market.vector(order.side, age))
        if own is not None and case.features_problem is None:
            case.features = features.MF1.for_sell(own) if order.side == pb.SIDE_SELL else own

    def _market(self, snapshot: FeatureSnapshot) -> _Market:
        market = self._markets.get(snapshot.instrument)
        if market is None or market.snapshot is not snapshot:
            market = self._markets[snapshot.instrument] = _Market(snapshot)
        return market
