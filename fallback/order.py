"""The order being decided, and the case that gathers all that is known while it is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from fallback.budget import Budget
    from feature_cache.feature_set import FeatureSet, SetRow
    from feature_cache.store.codec import FeatureSnapshot


class Part(NamedTuple):
    """A part of a model that is made of several."""

    version: str
    """First 16 hex digits of its content hash."""
    weight: float
    """With which it counts: its share of a mean, or what a stack multiplies its margin by."""


class CallContext(NamedTuple):
    """Which call of the caller's an order came with: W3C Trace Context, and an id of the caller's own."""

    trace_id: str = ""
    """32 hex digits; empty where the caller sent none and none has begun here."""
    span_id: str = ""
    """The caller's span, 16 hex digits; empty when the trace begins here."""
    sampled: bool = False
    """True when the caller keeps this trace."""
    correlation_id: str = ""
    """What the caller calls this piece of work; empty when it does not say."""
    is_chosen: bool = False
    """True when this server keeps the trace of this order, as it keeps one in so many."""


NO_CONTEXT: Final = CallContext()

Reasons = tuple[pb.ReasonCode.ValueType, ...]
"""Some reasons of a decision."""

CHAMPION_SOURCES: Final = frozenset((pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_EMBEDDED))
"""Sources that are the champion, asked at this moment."""
MODEL_SOURCES: Final = CHAMPION_SOURCES | {pb.SOURCE_CANARY}
"""Sources that are a model, asked at this moment: an answer of any other source is a degraded one."""


class Brought(NamedTuple):
    """A caller's part in a vector of another feature set than `mf1`, for models of that set alone."""

    feature_set: FeatureSet
    values: NDArray[np.float32]
    """float32[n] in market orientation, within its ranges; NaN leaves a feature to the server."""


@dataclass(slots=True)
class Order:
    """A valid order."""

    wire: bytes
    """The caller's own `pretrade.decision.v1.Order`, for the audit packet."""
    instrument: str
    side: pb.Side.ValueType
    quantity: float
    """Base asset, finite, > 0."""
    limit_price: float
    """Quote currency; NaN for a market order."""
    strategy: str
    reduce_only: bool
    caller_features: NDArray[np.float32] | None
    """A vector of `mf1` in market orientation, finite; None to use the server's."""
    order_ref: str = ""
    idempotency_key: str = ""
    timeout_seconds: float | None = None
    """What the order itself allows, > 0; None when it does not say."""
    context: CallContext = NO_CONTEXT
    caller: str = ""
    """The name that the caller's credentials prove; empty on a port without credentials."""
    brought: Brought | None = None
    """The caller's part in a vector of another set than `mf1`; None if it brings none."""

    @property
    def brings_features(self) -> bool:
        """True when the caller has brought features of any set."""
        return self.caller_features is not None or self.brought is not None

    @property
    def message(self) -> pb.Order:
        """The caller's own, read anew."""
        return pb.Order.FromString(self.wire)


class Case:
    """One order on its way through the chain: what is asked, what is known, and what went wrong so far.

    `snapshot` is what the server itself knows of the instrument (None: nothing). `features` is what a scorer may use
    (turned for the order's side): the server's, or the caller's own. None when they may not decide; `features_problem`
    then says why.
    """

    __slots__ = (
        "_row",
        "attempts",
        "budget",
        "degradations",
        "feature_age_seconds",
        "features",
        "features_problem",
        "mid",
        "model",
        "order",
        "others",
        "snapshot",
        "snapshot_age_seconds",
        "stages",
    )

    def __init__(self, order: Order, budget: Budget) -> None:
        self.order = order
        self.budget = budget
        self.snapshot: FeatureSnapshot | None = None
        self.snapshot_age_seconds = math.nan
        self.features: NDArray[np.float32] | None = None
        self._row: bytes | None = None
        self.others: Mapping[FeatureSet, SetRow | None] | None = None
        """What models of other sets get, by set; None where no such model decides. A set of which the server has no
        part is not among them; one of which the caller has not brought his part has None."""
        self.features_problem: pb.ReasonCode.ValueType | None = None
        self.feature_age_seconds = math.nan
        """The snapshot's age; NaN when the features are the caller's own."""
        self.mid = math.nan
        """Current mid in quote currency from a fresh, known book; NaN otherwise."""
        self.degradations: list[pb.Degradation.ValueType] = []
        self.attempts: list[Attempt] = []
        self.model = ""
        """Name of the model that the map chose for it; empty while nobody has asked, and where there is one model."""
        self.stages: tuple[str, ...] = ()
        """Stages of the chain that may answer, if they are not the default ones."""

    @property
    def from_caller(self) -> bool:
        """True when the features of `mf1` are the caller's own."""
        return self.order.caller_features is not None

    def is_callers(self, feature_set: FeatureSet) -> bool:
        """True when a row of this set has values of the caller's own: a model may fail on it without being at fault."""
        order = self.order
        return order.caller_features is not None or (
            order.brought is not None and order.brought.feature_set is feature_set
        )

    def take_vector(self, features: NDArray[np.float32], row: bytes) -> None:
        """Takes features that other cases may have, too, and what `row` then is."""
        self.features = features
        self._row = row

    def row(self) -> bytes:
        """The features as a model gets them and the audit keeps them: little-endian float32. There must be some."""
        if self._row is None:
            assert self.features is not None
            self._row = self.features.astype(features.ROW, copy=False).tobytes()
        return self._row

    def row_of(self, feature_set: FeatureSet) -> bytes | None:
        """What a model of this set gets; None where a part of it is missing. There must be features of `mf1`."""
        if feature_set is features.MF1:
            return self.row()
        return None if self.others is None else self.others.get(feature_set)


@dataclass(slots=True)
class Attempt:
    """One model attempt, for the audit."""

    replica: str
    outcome: str
    used_seconds: float
    model_version: str
    batch_rows: int = 0
    """Rows in the batch that was answered; 0 without an answer."""
    batch_index: int = 0
    """This order's row in it."""
    span_id: str = ""
    """Its span in the call's trace, 16 hex digits; empty without tracing."""
    queued_seconds: float = math.nan
    """How long the row waited for its batch; NaN without an answer."""
    call_parent: str = ""
    """`traceparent` that the batch's call carried: that of its first row; empty without an answer or a trace."""


@dataclass(slots=True)
class Answer:
    """What one source says. Guards may still make it safer."""

    action: pb.Action.ValueType
    source: pb.Source.ValueType
    reason: pb.ReasonCode.ValueType
    score: float = math.nan
    """Calibrated P(eligible); NaN when the source does not score."""
    threshold: float = math.nan
    model_name: str = ""
    model_version: str = ""
    model_expires_at: int = 0
    """Unix seconds; 0 for never."""
    cached_from: str = ""
    """Decision id a cached score came from."""
    parts: tuple[Part, ...] = ()
    """Of a model that is made of several."""
    part_scores: tuple[float, ...] = ()
    """What each of them says, calibrated, in [0, 1]."""


def held_against(score: float, threshold: float) -> tuple[pb.Action.ValueType, pb.ReasonCode.ValueType]:
    """TRADE if the score reaches the threshold, else NO_TRADE, with the reason."""
    if score >= threshold:
        return pb.ACTION_TRADE, pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
    return pb.ACTION_NO_TRADE, pb.REASON_CODE_SCORE_BELOW_THRESHOLD
