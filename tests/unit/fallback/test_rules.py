"""The rules baseline: every rule objects alone, an undefined feature leaves it undecided."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.cases import Clock, new_case

from fallback.order import Answer, Case
from fallback.rules import RulesBaseline, RulesSettings
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb

SETTINGS = RulesSettings(
    max_spread_bps=2,
    max_volatility_bps=8,
    max_adverse_weighted_mid_bps=0.25,
    max_adverse_imbalance=0.5,
    max_adverse_ofi=0.75,
)
LIMITS = {"spread_bps": 2.0, "rv_5s_bps": 8.0, "weighted_mid_bps": -0.25, "imbalance_l5": -0.5, "ofi_1s": -0.75}
"""The last value each rule lets pass."""
WORSE = {name: limit + (0.01 if limit > 0 else -0.01) for name, limit in LIMITS.items()}


def values(**changes: float) -> NDArray[np.float32]:
    row = np.zeros(features.N_FEATURES, dtype=np.float32)
    for name, value in changes.items():
        row[features.INDEX[name]] = value
    return row


async def answer_to(case: Case) -> Answer | None:
    return await RulesBaseline(SETTINGS, Clock()).answer(case)


async def test_a_calm_and_balanced_book_is_a_trade() -> None:
    case = new_case(values=values())
    answer = await answer_to(case)
    assert answer is not None
    assert (answer.action, answer.source, answer.reason) == (
        pb.ACTION_TRADE,
        pb.SOURCE_RULES,
        pb.REASON_CODE_RULES_PASSED,
    )
    assert math.isnan(answer.score)
    assert [stage for stage, *_ in case.budget.uses] == [pb.STAGE_RULES]


async def test_the_limits_themselves_pass() -> None:
    answer = await answer_to(new_case(values=values(**LIMITS)))
    assert answer is not None
    assert answer.action == pb.ACTION_TRADE


@pytest.mark.parametrize("name", LIMITS)
async def test_each_rule_objects_alone(name: str) -> None:
    answer = await answer_to(new_case(values=values(**{name: WORSE[name]})))
    assert answer is not None
    assert (answer.action, answer.reason) == (pb.ACTION_NO_TRADE, pb.REASON_CODE_RULES_OBJECTED)


@pytest.mark.parametrize("name", LIMITS)
async def test_an_undefined_feature_leaves_it_undecided(name: str) -> None:
    case = new_case(values=values(**{name: math.nan}))
    assert await answer_to(case) is None
    assert case.degradations == [pb.DEGRADATION_RULES_UNDECIDED]


async def test_no_features_leave_it_undecided() -> None:
    case = new_case(problem=pb.REASON_CODE_FEATURES_MISSING)
    assert await answer_to(case) is None
    assert case.degradations == [pb.DEGRADATION_RULES_UNDECIDED]


async def test_features_that_no_rule_needs_may_be_undefined() -> None:
    unneeded = {name: math.nan for name in features.NAMES if name not in LIMITS}
    answer = await answer_to(new_case(values=values(**unneeded)))
    assert answer is not None
    assert answer.action == pb.ACTION_TRADE


@given(row=st.lists(st.floats(width=32), min_size=features.N_FEATURES, max_size=features.N_FEATURES))
async def test_it_trades_exactly_when_every_rule_holds(row: list[float]) -> None:
    answer = await answer_to(new_case(values=np.array(row, dtype=np.float32)))
    by_name = dict(zip(features.NAMES, row, strict=True))
    if any(math.isnan(by_name[name]) for name in LIMITS):
        assert answer is None
    else:
        assert answer is not None
        holds = all(by_name[name] <= limit if limit > 0 else by_name[name] >= limit for name, limit in LIMITS.items())
        assert (answer.action == pb.ACTION_TRADE) == holds
