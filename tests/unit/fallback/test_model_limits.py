"""Models are held to their own limits, and only their own scores are."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.cases import Clock, new_case
from support.guest_sets import MIXED

from fallback.guards import Guards, GuardSettings
from fallback.model_limits import NO_LIMITS, UNKNOWN, LimitGuards, ModelLimits, limits_of
from fallback.order import Answer, Brought, Case
from feature_cache import features
from feature_cache.domain import LOOK_NS
from feature_cache.feature_set import SetRow
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

DOMAIN: dict[str, Any] = {
    "features": ["imbalance_l1", "rv_5s_bps"],
    "patterns": [0],
    "low": [-1.0, 0.0],
    "high": [1.0, 40.0],
    "values": [[-1.0, 1.0], [0.0, 8.0]],
    "scores": [[-3.0, 3.0], [-3.0, 3.0]],
    "whitening": [[1.0, 0.0], [0.0, 1.0]],
    "distance": 30.0,
    "most_same": [10, 10],
    "most_turned": [40.0, 40.0],
}
METADATA: dict[str, Any] = {"band": {"low": 0.6, "high": 0.8}, "domain": DOMAIN}
UNCERTAIN, OUTSIDE = pb.REASON_CODE_UNCERTAIN, pb.REASON_CODE_OUT_OF_DOMAIN
MODELS = (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_EMBEDDED, pb.SOURCE_CANARY)


class Market:
    """The limit guards, all on, and flags that a test may turn."""

    def __init__(self, limits: ModelLimits | None = None) -> None:
        self.limits = limits_of(METADATA) if limits is None else limits
        self.uncertain = self.out_of_domain = True
        self.asked: list[str] = []
        self.guards = LimitGuards(self.of, lambda: self.uncertain, lambda: self.out_of_domain)

    def of(self, version: str) -> ModelLimits:
        self.asked.append(version)
        return self.limits

    def objections(self, case: Case, score: float = 0.9, source: pb.Source.ValueType = pb.SOURCE_PRIMARY) -> list[int]:
        (found,) = self.guards.objections((case,), (answer(score, source),))
        return list(found)


def answer(score: float = 0.9, source: pb.Source.ValueType = pb.SOURCE_PRIMARY) -> Answer:
    reason = pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
    return Answer(pb.ACTION_TRADE, source, reason, float(np.float32(score)), 0.5, "champion", "v1")


def row(imbalance: float = 0.1, volatility: float = 1.0) -> NDArray[np.float32]:
    values = np.zeros(features.N_FEATURES, np.float32)
    values[[features.INDEX["imbalance_l1"], features.INDEX["rv_5s_bps"]]] = imbalance, volatility
    return values


@pytest.mark.parametrize(
    ("score", "objected"), [(0.5999, []), (0.6, [UNCERTAIN]), (0.7, [UNCERTAIN]), (0.8, [UNCERTAIN]), (0.8001, [])]
)
@pytest.mark.parametrize("source", [*MODELS, pb.SOURCE_CACHED_SCORE])
def test_a_score_in_the_band_is_uncertain_also_when_it_is_used_again(
    score: float, objected: list[int], source: pb.Source.ValueType
) -> None:
    assert Market().objections(new_case(values=row()), score, source) == objected


@pytest.mark.parametrize("source", MODELS)
def test_features_that_the_model_has_not_seen_are_outside(source: pb.Source.ValueType) -> None:
    market = Market()
    assert market.objections(new_case(values=row()), source=source) == []
    assert market.objections(new_case(values=row(volatility=41.0)), source=source) == [OUTSIDE]
    own = row(volatility=41.0)
    assert market.objections(new_case(values=own, caller_features=own), source=source) == [OUTSIDE], "also the caller's"
    assert market.objections(new_case(values=row(volatility=41.0)), 0.7, source) == [UNCERTAIN, OUTSIDE]


@pytest.mark.parametrize("source", [pb.SOURCE_RULES, pb.SOURCE_NONE])
def test_what_is_no_score_of_a_model_has_no_limits(source: pb.Source.ValueType) -> None:
    market = Market()
    assert market.objections(new_case(values=row(volatility=41.0)), 0.7, source) == []
    assert market.asked == []


def test_features_are_not_those_that_a_cached_score_was_made_of() -> None:
    assert Market().objections(new_case(values=row(volatility=41.0)), source=pb.SOURCE_CACHED_SCORE) == []


def test_each_guard_has_a_switch() -> None:
    market, case = Market(), new_case(values=row(volatility=41.0))
    market.uncertain = False
    assert market.objections(case, 0.7) == [OUTSIDE]
    market.out_of_domain = False
    assert market.objections(case, 0.7) == []
    market.uncertain = True
    assert market.objections(case, 0.7) == [UNCERTAIN]


def test_a_model_that_says_nothing_has_no_limits_and_one_that_is_not_known_is_a_degradation() -> None:
    case = new_case(values=row(volatility=41.0))
    for limits in (NO_LIMITS, limits_of({}), limits_of({"band": None, "domain": None})):
        assert Market(limits).objections(case, 0.7) == []
        assert case.degradations == []
    unknown = Market(UNKNOWN)
    for _ in range(2):
        assert unknown.objections(case, 0.7) == []
        assert case.degradations == [pb.DEGRADATION_MODEL_LIMITS_UNKNOWN]


def test_a_band_without_ends_holds_every_score() -> None:
    limits = limits_of({"band": {"low": None, "high": None}})
    for score in (0.0, 0.5, 1.0):
        assert Market(limits).objections(new_case(values=row()), score) == [UNCERTAIN]


@pytest.mark.parametrize(
    "metadata",
    [
        {"band": {"low": math.nan, "high": 1.0}},
        {"band": {"low": 0.5}},
        {"domain": {}},
        {"domain": DOMAIN | {"low": []}},
    ],
)
def test_limits_that_make_no_sense_are_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        limits_of(metadata)


def test_orders_that_are_decided_together_get_what_each_gets_alone() -> None:
    random = np.random.default_rng(1)
    rows = [row(float(random.uniform(-1.2, 1.2)), float(random.uniform(-1, 45))) for _ in range(600)]
    sources = [(*MODELS, pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES)[number % 6] for number in range(600)]
    answers = [answer(float(random.random()), source) for source in sources]
    together = Market().guards.objections([new_case(values=one) for one in rows], answers)
    alone = [Market().guards.objections([new_case(values=r)], [a])[0] for r, a in zip(rows, answers, strict=True)]
    assert together == alone
    assert {(), (UNCERTAIN,), (OUTSIDE,), (UNCERTAIN, OUTSIDE)} == set(together)


def on(look: int, imbalance: float, volatility: float) -> Case:
    case = new_case(values=row(imbalance, volatility))
    time_ns, values = look * LOOK_NS + 1, row(imbalance, volatility)
    case.snapshot = FeatureSnapshot(
        case.order.instrument, look, time_ns, time_ns, time_ns, time_ns, 0, 99.0, 101.0, BookState.VALID, values
    )
    return case


def test_a_stuck_feature_is_found_over_time_and_the_decision_says_so() -> None:
    market = Market()
    found = []
    for look in range(20):
        case = on(look, 0.25, 1.0 + 0.1 * look)
        found.append(market.objections(case))
        assert (pb.DEGRADATION_FEATURE_IMPLAUSIBLE in case.degradations) == bool(found[-1])
    assert found.index([OUTSIDE]) == 11
    own = row(0.25, 9.0)
    assert market.objections(new_case(values=own, caller_features=own)) == [], "the caller's own are not stuck"
    assert market.objections(on(20, 0.3, 9.0)) == []


def test_an_age_that_every_vector_is_published_with_is_not_stuck() -> None:
    """A vector is published after an event of the book, when its age is 0, and scored with its age of then."""
    aged = DOMAIN | {"features": ["book_age_ms", "rv_5s_bps"], "low": [0.0, 0.0], "high": [1_000.0, 40.0]}
    market = Market(limits_of({"domain": aged}))
    for look in range(30):
        case = on(look, 0.25, 1.0 + 0.1 * look)
        assert case.snapshot is not None
        scored = case.snapshot.values.copy()
        scored[features.INDEX["book_age_ms"]] = 7.0 + 3.1 * look % 50
        case.take_vector(scored, scored.tobytes())
        assert market.objections(case) == []
    stuck = [market.objections(on(look, 0.25, 4.0 + 0.1 * look)) for look in range(30, 50)]
    assert stuck[-1] == [OUTSIDE], "one that orders are scored with is"


def of_guest(look: int, weighted_mid: float, trades: float, urgency: float, side: pb.Side.ValueType) -> Case:
    """An order that a model of the set MIXED has scored."""
    case = new_case(side=side, values=row())
    values = np.array([weighted_mid, trades, urgency], dtype=np.float32)
    turned = MIXED.for_sell(values) if side == pb.SIDE_SELL else values
    case.others = {MIXED: SetRow.of(MIXED, turned.tobytes())}
    case.snapshot = on(look, 0.1, 1.0).snapshot
    case.order.brought = Brought(MIXED, np.array([math.nan, math.nan, urgency], dtype=np.float32))
    return case


OF_GUEST = DOMAIN | {"features": list(MIXED.names)}
OF_GUEST |= {name: [*OF_GUEST[name], 1.0] for name in ("high", "low")} | {"low": [-9.0, 0.0, 0.0]}
OF_GUEST |= {name: [*OF_GUEST[name], [-9.0, 9.0]] for name in ("values", "scores")}
OF_GUEST |= {
    "whitening": np.eye(3).tolist(),
    "most_same": [10] * 3,
    "most_turned": [40.0] * 3,
    "high": [9.0, 40.0, 1.0],
}


def test_a_model_of_another_set_is_held_to_what_it_has_scored() -> None:
    market = Market(limits_of({"domain": OF_GUEST}, MIXED))
    for side in (pb.SIDE_BUY, pb.SIDE_SELL):
        assert market.objections(of_guest(1, 1.0, 2.0, 0.5, side)) == []
        assert market.objections(of_guest(2, 1.0, 41.0, 0.5, side)) == [OUTSIDE]
        assert market.objections(of_guest(3, 1.0, math.nan, 0.5, side)) == [OUTSIDE]


def test_of_another_set_a_stuck_feature_is_found_and_what_callers_bring_may_stay_as_it_is() -> None:
    """Orders of both sides follow each other: what is watched is in market orientation."""

    def found(weighted_mid: float | None, brought: float = math.nan) -> list[bool]:
        market, objected = Market(limits_of({"domain": OF_GUEST}, MIXED)), []
        for look in range(30):
            side = (pb.SIDE_BUY, pb.SIDE_SELL)[look % 2]
            case = of_guest(look, 0.1 * look if weighted_mid is None else weighted_mid, 0.1 * look, 0.5, side)
            case.order.brought = Brought(MIXED, np.array([brought, math.nan, 0.5], dtype=np.float32))
            objected.append(market.objections(case) == [OUTSIDE])
        return objected

    assert found(1.5).index(True) == 11
    assert not any(found(None)), "urgency is the caller's"
    assert not any(found(1.5, brought=1.5)), "the caller has brought what was stuck"


def test_models_that_no_longer_decide_are_forgotten_and_those_that_do_are_watched_on() -> None:
    market, others, found = Market(), [], []
    champion = market.limits
    for look in range(12):
        market.limits = champion
        found = market.objections(on(look, 0.25, 1.0 + 0.1 * look))
        for _ in range(2):
            other = market.limits = limits_of(METADATA)
            assert other.domain is not None
            others.append(weakref.ref(other.domain))
            market.objections(on(look, 0.25, 1.0))
    del other
    gc.collect()
    assert found == [OUTSIDE], "stuck for as long as it has been watched"
    assert sum(domain() is not None for domain in others) < 10


def test_guards_abstain_beyond_the_limits_and_leave_a_refusal_as_it_is() -> None:
    market = Market()
    active = admin_pb2.TRADING_STATE_ACTIVE
    settings = GuardSettings(price_collar_bps=None, max_notional=None)
    made = Guards(settings, lambda: active, Clock(), lambda: 0.0, market.guards)
    case = new_case(values=row())
    assert made.apply(case, answer(0.9))[0] == pb.ACTION_TRADE
    reason = pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD
    assert made.apply(case, answer(0.7)) == (pb.ACTION_ABSTAIN, [reason, UNCERTAIN])
    assert made.again(case, answer(0.7)) == (pb.ACTION_ABSTAIN, [reason, UNCERTAIN])
    assert made.apply(case, answer(0.9), made.look((case,), (answer(0.7),))[0])[1] == [reason, UNCERTAIN]
    refused = Answer(pb.ACTION_NO_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_SCORE_BELOW_THRESHOLD, 0.7, 0.9, "c", "v1")
    assert made.apply(case, refused)[0] == pb.ACTION_NO_TRADE, "an answer only ever gets safer"
