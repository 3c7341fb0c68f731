"""Guards: each objects for its own reason, and none ever makes an answer less safe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.cases import Clock, new_case

from fallback.guards import Guards, GuardSettings, OrderLimit
from fallback.order import Answer, Case
from feature_cache import features
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

NO_LIMITS = GuardSettings(price_collar_bps=None, max_notional=None)
UNIX_NOW = 1_800_000_000
TRADE = Answer(pb.ACTION_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD, 0.75, 0.5)
OWN = np.zeros(features.N_FEATURES, dtype=np.float32)


def guards(
    settings: GuardSettings = NO_LIMITS,
    state: admin_pb2.TradingState.ValueType = admin_pb2.TRADING_STATE_ACTIVE,
    clock: Callable[[], float] | None = None,
) -> Guards:
    return Guards(settings, lambda: state, clock or Clock(), lambda: UNIX_NOW)


def objections(made: Guards, case: Case, answer: Answer = TRADE) -> tuple[int, list[int]]:
    """The action and the reasons added to the answer's own."""
    action, reasons = made.apply(case, answer)
    assert reasons[0] == answer.reason
    return action, list(reasons[1:])


def test_without_an_objection_the_answer_stands() -> None:
    case = new_case()
    assert objections(guards(), case) == (pb.ACTION_TRADE, [])
    assert [stage for stage, *_ in case.budget.uses] == [pb.STAGE_GUARDS]


@pytest.mark.parametrize(
    "problem",
    [pb.REASON_CODE_FEATURES_MISSING, pb.REASON_CODE_FEATURES_STALE, pb.REASON_CODE_BOOK_UNKNOWN],
)
def test_unusable_features_make_it_abstain(problem: pb.ReasonCode.ValueType) -> None:
    assert objections(guards(), new_case(problem=problem)) == (pb.ACTION_ABSTAIN, [problem])


@pytest.mark.parametrize(
    ("expires_at", "action"),
    [(0, pb.ACTION_TRADE), (UNIX_NOW + 1, pb.ACTION_TRADE), (UNIX_NOW, pb.ACTION_ABSTAIN), (1, pb.ACTION_ABSTAIN)],
)
def test_an_expired_model_makes_it_abstain(expires_at: int, action: pb.Action.ValueType) -> None:
    answer = Answer(TRADE.action, TRADE.source, TRADE.reason, 0.75, 0.5, "champion", "v1", expires_at)
    expected = [] if action == pb.ACTION_TRADE else [pb.REASON_CODE_MODEL_EXPIRED]
    assert objections(guards(), new_case(), answer) == (action, expected)


def known_until(seconds: float) -> Case:
    """A case on a market of this instant."""
    case = new_case(sequence=1)
    assert case.snapshot is not None
    case.snapshot = replace(case.snapshot, event_time_ns=round(seconds * 1e9))
    return case


def test_a_model_expires_on_the_clock_of_the_market_that_is_decided_on() -> None:
    answer = replace(TRADE, model_expires_at=1_000_000)
    made = guards()
    assert objections(made, known_until(999_999.9), answer) == (pb.ACTION_TRADE, []), "a replay, years later"
    assert objections(made, known_until(1_000_000), answer) == (pb.ACTION_ABSTAIN, [pb.REASON_CODE_MODEL_EXPIRED])


def test_an_operator_can_extend_a_model_by_some_days() -> None:
    answer = replace(TRADE, model_expires_at=1_000_000)
    made = guards()
    made.configure(NO_LIMITS.model_copy(update={"model_grace_days": 2.0}))
    assert objections(made, known_until(1_000_000 + 2 * 86_400 - 1), answer) == (pb.ACTION_TRADE, [])
    after = objections(made, known_until(1_000_000 + 2 * 86_400), answer)
    assert after == (pb.ACTION_ABSTAIN, [pb.REASON_CODE_MODEL_EXPIRED])


@pytest.mark.parametrize("reduce_only", [False, True])
def test_halted_lets_nothing_trade(reduce_only: bool) -> None:
    made = guards(state=admin_pb2.TRADING_STATE_HALTED)
    assert objections(made, new_case(reduce_only=reduce_only)) == (
        pb.ACTION_NO_TRADE,
        [pb.REASON_CODE_TRADING_HALTED],
    )


def test_reducing_lets_only_reduce_only_orders_trade() -> None:
    made = guards(state=admin_pb2.TRADING_STATE_REDUCING)
    assert objections(made, new_case()) == (pb.ACTION_NO_TRADE, [pb.REASON_CODE_TRADING_REDUCING])
    assert objections(made, new_case(reduce_only=True)) == (pb.ACTION_TRADE, [])


@pytest.mark.parametrize("degraded_orders", ["any", "reduce_only"])
@pytest.mark.parametrize("source", [source for source in pb.Source.values() if source])
@pytest.mark.parametrize("reduce_only", [False, True])
def test_without_a_model_a_desk_may_let_only_reducing_orders_trade(
    degraded_orders: Literal["any", "reduce_only"], source: pb.Source.ValueType, reduce_only: bool
) -> None:
    made = guards(NO_LIMITS.model_copy(update={"degraded_orders": degraded_orders}))
    answer = Answer(pb.ACTION_TRADE, source, TRADE.reason, 0.75, 0.5)
    by_model = source in (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_EMBEDDED, pb.SOURCE_CANARY)
    if by_model or reduce_only or degraded_orders == "any":
        expected = pb.ACTION_TRADE, list[int]()
    else:
        expected = pb.ACTION_NO_TRADE, [pb.REASON_CODE_NO_MODEL_REDUCE_ONLY]
    assert objections(made, new_case(reduce_only=reduce_only), answer) == expected


def test_what_degraded_orders_may_do_is_obeyed_from_the_next_answer_on() -> None:
    made = guards()
    answer = Answer(pb.ACTION_TRADE, pb.SOURCE_RULES, pb.REASON_CODE_RULES_PASSED)
    assert objections(made, new_case(), answer) == (pb.ACTION_TRADE, [])
    made.configure(NO_LIMITS.model_copy(update={"degraded_orders": "reduce_only"}))
    assert objections(made, new_case(), answer) == (pb.ACTION_NO_TRADE, [pb.REASON_CODE_NO_MODEL_REDUCE_ONLY])


def test_an_unknown_trading_state_is_as_good_as_halted() -> None:
    made = guards(state=admin_pb2.TRADING_STATE_UNSPECIFIED)
    assert objections(made, new_case()) == (pb.ACTION_NO_TRADE, [pb.REASON_CODE_TRADING_HALTED])


@pytest.mark.parametrize(
    ("side", "limit_price", "within"),
    [
        (pb.SIDE_BUY, 100.99, True),
        (pb.SIDE_BUY, 101.01, False),
        (pb.SIDE_BUY, 1.0, True),  # far below the market it costs nothing to wait
        (pb.SIDE_SELL, 99.01, True),
        (pb.SIDE_SELL, 98.99, False),
        (pb.SIDE_SELL, 1e6, True),
        (pb.SIDE_BUY, math.nan, True),  # a market order has no price to hold against the mid
    ],
)
def test_the_collar_bounds_what_an_order_pays(side: pb.Side.ValueType, limit_price: float, within: bool) -> None:
    made = guards(GuardSettings(price_collar_bps=100, max_notional=None))
    expected = (pb.ACTION_TRADE, []) if within else (pb.ACTION_NO_TRADE, [pb.REASON_CODE_PRICE_COLLAR])
    assert objections(made, new_case(side=side, limit_price=limit_price, mid=100.0)) == expected


@pytest.mark.parametrize("mid", [math.nan, 0.0, -100.0, math.inf])
@pytest.mark.parametrize("side", [pb.SIDE_BUY, pb.SIDE_SELL])
def test_a_collar_without_a_usable_mid_objects(side: pb.Side.ValueType, mid: float) -> None:
    made = guards(GuardSettings(price_collar_bps=100, max_notional=None))
    assert objections(made, new_case(side=side, limit_price=100.0, mid=mid)) == (
        pb.ACTION_NO_TRADE,
        [pb.REASON_CODE_PRICE_COLLAR],
    )


@pytest.mark.parametrize(
    ("order", "within"),
    [
        ({"quantity": 10, "mid": 100.0}, True),
        ({"quantity": 10.01, "mid": 100.0}, False),
        ({"quantity": 10, "limit_price": 100.1, "mid": 100.0}, False),
        # A sell far below the market trades at the market.
        ({"quantity": 10.01, "limit_price": 1.0, "mid": 100.0, "side": pb.SIDE_SELL}, False),
        ({"quantity": 10, "limit_price": 100.0, "mid": math.nan}, True),
        ({"quantity": 1, "mid": math.nan}, False),
        ({"quantity": 1, "mid": 0.0}, False),
        ({"quantity": 1e308, "mid": 100.0}, False),
    ],
)
def test_the_notional_is_held_against_the_higher_price(order: dict[str, Any], within: bool) -> None:
    made = guards(GuardSettings(price_collar_bps=None, max_notional=1_000))
    expected = (pb.ACTION_TRADE, []) if within else (pb.ACTION_NO_TRADE, [pb.REASON_CODE_NOTIONAL_LIMIT])
    assert objections(made, new_case(**order)) == expected


def limits(*limits: dict[str, Any]) -> GuardSettings:
    return GuardSettings.model_validate({"price_collar_bps": None, "max_notional": None, "limits": limits})


def test_the_quantity_limit_is_the_instruments_own() -> None:
    made = guards(
        limits({"instrument": "BTCUSDT.BINANCE", "max_quantity": 2}, {"instrument": "X.Y", "max_quantity": 1})
    )
    assert objections(made, new_case(quantity=2)) == (pb.ACTION_TRADE, [])
    assert objections(made, new_case(quantity=2.1)) == (pb.ACTION_NO_TRADE, [pb.REASON_CODE_QUANTITY_LIMIT])


@pytest.mark.parametrize(
    ("strategy", "quantity", "reasons"),
    [
        ("alpha", 2, []),
        ("alpha", 2.1, [pb.REASON_CODE_NOTIONAL_LIMIT]),
        ("alpha", 3.1, [pb.REASON_CODE_NOTIONAL_LIMIT, pb.REASON_CODE_QUANTITY_LIMIT]),
        ("beta", 3, []),
        ("beta", 3.1, [pb.REASON_CODE_QUANTITY_LIMIT]),
        ("gamma", 1, []),
        ("gamma", 1.1, [pb.REASON_CODE_QUANTITY_LIMIT]),
    ],
)
def test_every_limit_that_names_the_instrument_or_the_strategy_holds(
    strategy: str, quantity: float, reasons: list[int]
) -> None:
    made = guards(
        limits(
            {"strategy": "alpha", "max_notional": 200},
            {"instrument": "BTCUSDT.BINANCE", "max_quantity": 3},
            {"instrument": "BTCUSDT.BINANCE", "strategy": "gamma", "max_quantity": 1},
            {"instrument": "ETHUSDT.BINANCE", "strategy": "beta", "max_quantity": 1e-9},
            {"max_quantity": 1e6},
        )
    )
    action = pb.ACTION_NO_TRADE if reasons else pb.ACTION_TRADE
    assert objections(made, new_case(strategy=strategy, quantity=quantity)) == (action, reasons)


@pytest.mark.parametrize(
    "wrong",
    [
        [{"instrument": "X.Y"}],
        [{"instrument": "", "max_quantity": 1}],
        [{"strategy": "a", "max_quantity": 1}, {"strategy": "a", "max_notional": 1}],
        [{"strategy": "a", "max_quantity": 1, "max_qty": 1}],
    ],
)
def test_limits_that_say_nothing_or_two_things_are_refused(wrong: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError):
        limits(*wrong)


@pytest.mark.parametrize("limit", [0, -1, math.nan])
def test_a_limit_that_would_limit_nothing_or_everything_is_refused(limit: float) -> None:
    for wrong in (
        {"limits": [{"instrument": "BTCUSDT.BINANCE", "max_quantity": limit}]},
        {"limits": [{"strategy": "alpha", "max_notional": limit}]},
        {"price_collar_bps": limit},
        {"max_notional": limit},
        {"max_decisions_per_second": limit},
    ):
        with pytest.raises(ValidationError):
            GuardSettings.model_validate(wrong)


def limited_to(rate: float) -> GuardSettings:
    return GuardSettings(price_collar_bps=None, max_notional=None, max_decisions_per_second=rate)


def test_a_strategy_may_trade_only_so_often() -> None:
    clock = Clock()
    made = guards(limited_to(2), clock=clock)
    assert [made.apply(new_case(), TRADE)[0] for _ in range(3)] == [
        pb.ACTION_TRADE,
        pb.ACTION_TRADE,
        pb.ACTION_NO_TRADE,
    ]
    assert objections(made, new_case()) == (pb.ACTION_NO_TRADE, [pb.REASON_CODE_STRATEGY_RATE])
    assert objections(made, new_case(strategy="beta")) == (pb.ACTION_TRADE, []), "each strategy has its own"
    clock.now += 0.5
    assert objections(made, new_case()) == (pb.ACTION_TRADE, [])


def test_only_orders_that_would_trade_count_for_the_rate() -> None:
    made = guards(limited_to(1))
    no_trade = Answer(pb.ACTION_NO_TRADE, pb.SOURCE_PRIMARY, pb.REASON_CODE_SCORE_BELOW_THRESHOLD, 0.25, 0.5)
    for _ in range(10):
        made.apply(new_case(), no_trade)
        made.apply(new_case(problem=pb.REASON_CODE_FEATURES_STALE), TRADE)
    assert objections(made, new_case()) == (pb.ACTION_TRADE, [])


def test_a_rate_below_one_a_second_lets_single_orders_trade() -> None:
    clock = Clock()
    made = guards(limited_to(0.1), clock=clock)
    assert objections(made, new_case())[0] == pb.ACTION_TRADE
    clock.now += 9
    assert objections(made, new_case())[0] == pb.ACTION_NO_TRADE
    clock.now += 1.001
    assert objections(made, new_case())[0] == pb.ACTION_TRADE


def test_strategies_that_a_caller_invents_do_not_pile_up() -> None:
    clock = Clock()
    made = guards(limited_to(10), clock=clock)
    for number in range(1_000):
        made.apply(new_case(strategy=f"invented-{number}"), TRADE)
        clock.now += 0.1
    assert len(made._rates) <= 11


def test_every_objection_is_named_and_the_safest_action_taken() -> None:
    made = guards(
        GuardSettings(price_collar_bps=10, max_notional=1, limits=(OrderLimit(max_quantity=0.5),)),
        admin_pb2.TRADING_STATE_HALTED,
    )
    case = new_case(limit_price=200, mid=100.0, problem=pb.REASON_CODE_BOOK_UNKNOWN)
    assert objections(made, case) == (
        pb.ACTION_ABSTAIN,
        [
            pb.REASON_CODE_BOOK_UNKNOWN,
            pb.REASON_CODE_TRADING_HALTED,
            pb.REASON_CODE_PRICE_COLLAR,
            pb.REASON_CODE_NOTIONAL_LIMIT,
            pb.REASON_CODE_QUANTITY_LIMIT,
        ],
    )


any_float = st.floats(allow_nan=True, allow_infinity=True)


@given(
    action=st.sampled_from([pb.ACTION_TRADE, pb.ACTION_NO_TRADE, pb.ACTION_ABSTAIN]),
    source=st.sampled_from([value for value in pb.Source.values() if value]),
    score=any_float,
    expires_at=st.sampled_from([0, 1, UNIX_NOW + 10]),
    state=st.sampled_from(admin_pb2.TradingState.values()),
    settings=st.builds(
        GuardSettings,
        price_collar_bps=st.one_of(st.none(), st.floats(1e-3, 1e4)),
        max_notional=st.one_of(st.none(), st.floats(1e-3, 1e9)),
        limits=st.one_of(
            st.just(()),
            st.tuples(
                st.builds(
                    OrderLimit,
                    instrument=st.sampled_from([None, "BTCUSDT.BINANCE"]),
                    strategy=st.sampled_from([None, "alpha"]),
                    max_quantity=st.floats(1e-3, 1e9),
                    max_notional=st.one_of(st.none(), st.floats(1e-3, 1e9)),
                )
            ),
        ),
        max_decisions_per_second=st.one_of(st.none(), st.floats(1e-3, 1e3)),
        degraded_orders=st.sampled_from(["any", "reduce_only"]),
    ),
    side=st.sampled_from([pb.SIDE_BUY, pb.SIDE_SELL]),
    quantity=st.floats(min_value=1e-300, max_value=1e300),
    limit_price=st.one_of(st.just(math.nan), st.floats(min_value=1e-300, max_value=1e300)),
    mid=any_float,
    reduce_only=st.booleans(),
    problem=st.sampled_from([None, pb.REASON_CODE_FEATURES_STALE, pb.REASON_CODE_BOOK_UNKNOWN]),
    own_features=st.booleans(),
)
def test_no_guard_ever_makes_an_answer_less_safe(
    action: pb.Action.ValueType,
    source: pb.Source.ValueType,
    score: float,
    expires_at: int,
    state: admin_pb2.TradingState.ValueType,
    settings: GuardSettings,
    side: pb.Side.ValueType,
    quantity: float,
    limit_price: float,
    mid: float,
    reduce_only: bool,
    problem: pb.ReasonCode.ValueType | None,
    own_features: bool,
) -> None:
    answer = Answer(action, source, pb.REASON_CODE_RULES_PASSED, score, 0.5, "champion", "v1", expires_at)
    made = guards(settings, state)
    for _ in range(3):
        case = new_case(
            side=side,
            quantity=quantity,
            limit_price=limit_price,
            mid=mid,
            reduce_only=reduce_only,
            problem=problem,
            caller_features=OWN if own_features else None,
        )
        after, reasons = made.apply(case, answer)
        repeated, objections = made.again(case, answer)
        assert (repeated == pb.ACTION_TRADE) == (action == pb.ACTION_TRADE and len(objections) == 1)
        assert [*objections, pb.REASON_CODE_STRATEGY_RATE][: len(reasons)] == reasons, "but for the rate it is the same"
        if action != pb.ACTION_TRADE:
            assert after == action
        if after == pb.ACTION_TRADE:
            assert reasons == [answer.reason]
            assert problem is None
            assert state != admin_pb2.TRADING_STATE_HALTED
        else:
            assert action != pb.ACTION_TRADE or len(reasons) > 1, "whoever objects says why"


SETTINGS = st.builds(
    GuardSettings,
    price_collar_bps=st.none() | st.just(100.0),
    max_notional=st.none() | st.just(1_000.0),
    limits=st.just(()) | st.just((OrderLimit(strategy="alpha", max_quantity=5.0),)),
    max_decisions_per_second=st.none() | st.just(2.0),
    degraded_orders=st.sampled_from(["any", "reduce_only"]),
)
CASES = st.fixed_dictionaries(
    {
        "side": st.sampled_from([pb.SIDE_BUY, pb.SIDE_SELL]),
        "quantity": st.sampled_from([1.0, 9.9, 10.0, 10.1]),
        "limit_price": st.sampled_from([math.nan, 98.9, 99.0, 100.0, 101.0, 101.1]),
        "reduce_only": st.booleans(),
        "mid": st.sampled_from([100.0, math.nan, 0.0, math.inf]),
        "problem": st.none() | st.just(pb.REASON_CODE_FEATURES_STALE),
    }
)
ANSWERS = st.builds(
    replace,
    st.just(TRADE),
    action=st.sampled_from([pb.ACTION_TRADE, pb.ACTION_NO_TRADE]),
    source=st.sampled_from([pb.SOURCE_PRIMARY, pb.SOURCE_EMBEDDED, pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES]),
    model_expires_at=st.sampled_from([0, UNIX_NOW, UNIX_NOW + 1]),
)


@given(
    settings=SETTINGS,
    state=st.sampled_from(
        [admin_pb2.TRADING_STATE_ACTIVE, admin_pb2.TRADING_STATE_REDUCING, admin_pb2.TRADING_STATE_HALTED]
    ),
    asked=st.lists(st.tuples(CASES, ANSWERS), min_size=1, max_size=6),
)
def test_orders_that_are_decided_together_get_what_each_gets_alone(
    settings: GuardSettings,
    state: admin_pb2.TradingState.ValueType,
    asked: list[tuple[dict[str, Any], Answer]],
) -> None:
    answers = [answer for _, answer in asked]
    alone, together = ([new_case(**about) for about, _ in asked] for _ in range(2))
    one_by_one, at_once = guards(settings, state), guards(settings, state)
    expected = [one_by_one.apply(case, answer) for case, answer in zip(alone, answers, strict=True)]
    assert at_once.apply_together(together, answers) == expected
    assert [case.budget.uses for case in together] == [case.budget.uses for case in alone]
