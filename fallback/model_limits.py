"""What a model says of its own limits, and the guards that hold it to that: UNCERTAIN and OUT_OF_DOMAIN.

Training writes the limits into a model's metadata (`torchserve/conformal.py`, `torchserve/domain.py`): a band of scores
in which the model does not know the label well enough, and what it has seen of its features. A version is the hash of
its metadata too, so the version in a packet says which limits a decision was held to.

The band holds for every score of the model, also for one that is used again. What it has seen is asked where it has
scored the features of this order. Rules have no limits of this kind.

Whether a feature is stuck or turned is seen in the vectors that came before, so no replay can recompute it. The
decision carries it as FEATURE_IMPLAUSIBLE, and the guard goes by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fallback.order import MODEL_SOURCES, Answer, Case, Order, Reasons
from feature_cache.domain import Domain, Watch
from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from fallback.block import Block
    from feature_cache.store.codec import FeatureSnapshot

_SCORED: Final = MODEL_SOURCES | {pb.SOURCE_CACHED_SCORE}
_MOST_WATCHED: Final = 8
"""Models whose vectors are watched: those that are used at the same time, and some before them."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelLimits:
    """The limits of a model version; one that says nothing has none."""

    low: float = math.inf
    high: float = -math.inf
    """Scores from `low` to `high`, both included, are uncertain."""
    domain: Domain | None = None
    """What it has seen."""
    has_band: bool = False
    """Whether it says from where to where it is uncertain."""
    is_known: bool = True
    """False where its archive could not be read, at least not yet."""


NO_LIMITS: Final = ModelLimits()
UNKNOWN: Final = ModelLimits(is_known=False)


def limits_of(metadata: Mapping[str, Any], feature_set: FeatureSet = MF1) -> ModelLimits:
    """The limits of a model of a feature set; none for one that was made before models said theirs.

    Raises:
        ValueError, KeyError, TypeError: They make no sense.
    """
    band, domain = metadata.get("band"), metadata.get("domain")
    low, high = math.inf, -math.inf
    if band is not None:
        # Compared as the float32 that a score is.
        low = -math.inf if band["low"] is None else float(np.float32(band["low"]))
        high = math.inf if band["high"] is None else float(np.float32(band["high"]))
        if math.isnan(low) or math.isnan(high):
            raise ValueError("the band of uncertain scores has no ends")
    return ModelLimits(low, high, None if domain is None else Domain(domain, feature_set), band is not None)


def limits_unknown(case: Case) -> None:
    """Has the decision say that nobody could look at its model's limits."""
    if pb.DEGRADATION_MODEL_LIMITS_UNKNOWN not in case.degradations:
        case.degradations.append(pb.DEGRADATION_MODEL_LIMITS_UNKNOWN)


class LimitGuards:
    """Objects to scores outside of what their models know.

    Args:
        limits: Of a model version.
        uncertain: Whether the guard UNCERTAIN is on.
        out_of_domain: Whether the guard OUT_OF_DOMAIN is on.
    """

    def __init__(
        self, limits: Callable[[str], ModelLimits], uncertain: Callable[[], bool], out_of_domain: Callable[[], bool]
    ) -> None:
        self._limits = limits
        self._uncertain = uncertain
        self._out_of_domain = out_of_domain
        self._watches: dict[Domain, dict[str, Watch]] = {}
        """By model, the one used last at the end; by instrument."""

    def objections(self, cases: Sequence[Case], answers: Sequence[Answer]) -> list[Reasons]:
        """The objections to each answer; a case also gets the degradations that go with them."""
        uncertain, out_of_domain = self._uncertain(), self._out_of_domain()
        found: list[Reasons] = [()] * len(cases)
        if not uncertain and not out_of_domain:
            return found
        to_look_at: dict[Domain, list[int]] = {}
        by_version: dict[str, ModelLimits] = {}
        for place, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            if answer.source not in _SCORED:
                continue
            version = answer.model_version
            limits = by_version.get(version)
            if limits is None:
                limits = by_version[version] = self._limits(version)
            if not limits.is_known:
                limits_unknown(case)
                continue
            if uncertain and limits.low <= answer.score <= limits.high:
                found[place] = (pb.REASON_CODE_UNCERTAIN,)
            domain = limits.domain
            if out_of_domain and domain is not None and answer.source in MODEL_SOURCES and case.features is not None:
                to_look_at.setdefault(domain, []).append(place)
        for domain, places in to_look_at.items():
            outside = domain.are_outside([_row(cases[place], domain) for place in places])
            watches = self._watches_of(domain)
            for place, is_outside in zip(places, outside, strict=True):
                if self._is_implausible(cases[place], domain, watches) or is_outside:
                    found[place] = (*found[place], pb.REASON_CODE_OUT_OF_DOMAIN)
        return found

    def of_block(self, block: Block) -> tuple[dict[int, Reasons], Collection[int]]:
        """The objections to the orders of an answered block, by place; and the places of those to ask `objections` for.

        The latter are orders that a degradation goes with.
        """
        uncertain, out_of_domain = self._uncertain(), self._out_of_domain()
        found: dict[int, Reasons] = {}
        if not uncertain and not out_of_domain:
            return found, ()
        assert block.model is not None
        limits = self._limits(block.model.version)
        if not limits.is_known:
            return found, range(len(block))
        if uncertain and limits.low <= limits.high:
            for place, score in enumerate(block.scores):
                if limits.low <= score <= limits.high:
                    found[place] = (pb.REASON_CODE_UNCERTAIN,)
        domain = limits.domain
        if not out_of_domain or domain is None:
            return found, ()
        views = {id(view): (view, order.side) for view, order in zip(block.views, block.orders, strict=True)}
        rows = [row for view, _ in views.values() if (row := view.row_of(domain.feature_set)) is not None]
        if len(rows) < len(views):
            return found, range(len(block))
        watches = self._watches_of(domain)
        outside = {key for key, is_outside in zip(views, domain.are_outside(rows), strict=True) if is_outside}
        implausible = {
            key
            for (key, (view, side)), row in zip(views.items(), rows, strict=True)
            if self._is_stuck_or_turned(view.snapshot, domain, watches, row, side)
        }
        if not outside and not implausible:
            return found, ()
        for place, view in enumerate(block.views):
            if id(view) in outside:
                found[place] = (*found.get(place, ()), pb.REASON_CODE_OUT_OF_DOMAIN)
        return found, [place for place, view in enumerate(block.views) if id(view) in implausible]

    def _watches_of(self, domain: Domain) -> dict[str, Watch]:
        """Those of a model; the model that was used least lately is forgotten for a new one."""
        watches = self._watches[domain] = self._watches.pop(domain, {})
        if len(self._watches) > _MOST_WATCHED:
            del self._watches[next(iter(self._watches))]
        return watches

    def _is_implausible(self, case: Case, domain: Domain, watches: dict[str, Watch]) -> bool:
        """Whether a feature of the server's own is stuck or turned; the case then says so."""
        if pb.DEGRADATION_FEATURE_IMPLAUSIBLE in case.degradations:
            return True
        snapshot = case.snapshot
        if snapshot is None or _brings_watched(case.order, domain):
            return False
        if not self._is_stuck_or_turned(snapshot, domain, watches, _row(case, domain), case.order.side):
            return False
        case.degradations.append(pb.DEGRADATION_FEATURE_IMPLAUSIBLE)
        return True

    @staticmethod
    def _is_stuck_or_turned(
        snapshot: FeatureSnapshot, domain: Domain, watches: dict[str, Watch], row: bytes, side: pb.Side.ValueType
    ) -> bool:
        """Whether a feature of an instrument is so, as far as is known with this row, which was scored for a side."""
        watch = watches.get(snapshot.instrument)
        if watch is None:
            watch = watches[snapshot.instrument] = Watch(domain)
        time_ns = snapshot.event_time_ns
        if watch.is_due(time_ns):
            # What was scored, and not what was published: the samples of the bounds have ages as of then, too. A vector
            # is published after an event of the book, when its age is 0.
            watch.see(_in_market(row, domain.feature_set, side), time_ns)
        return watch.is_implausible


def _brings_watched(order: Order, domain: Domain) -> bool:
    """Whether features that are watched are the caller's own for this order."""
    if order.caller_features is not None:
        return True
    brought = order.brought
    if brought is None or brought.feature_set is not domain.feature_set:
        return False
    return not np.isnan(brought.values[domain.columns[domain.is_watched]]).all()


def _in_market(row: bytes, feature_set: FeatureSet, side: pb.Side.ValueType) -> NDArray[np.float32]:
    """What the model has scored, in market orientation."""
    values = np.frombuffer(row, ROW)
    return feature_set.for_sell(values) if side == pb.SIDE_SELL else values


def _row(case: Case, domain: Domain) -> bytes:
    """What the model has scored."""
    row = case.row_of(domain.feature_set)
    assert row is not None
    return row
