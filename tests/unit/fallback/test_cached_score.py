"""The cached score answers only for the same question, while it is young and the market stands still."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from support.cases import Clock, new_case

from fallback.cached_score import CachedScores, CachedScoreSettings
from fallback.order import Answer, Case
from feature_cache import features
from pretrade.decision.v1 import decision_pb2 as pb

SETTINGS = CachedScoreSettings(max_age_seconds=1, max_mid_move_bps=2, max_feature_move={"imbalance_l5": 0.5})
IMBALANCE = features.INDEX["imbalance_l5"]


def scored(score: float = 0.75, version: str = "v1", threshold: float = 0.5) -> Answer:
    return Answer(
        pb.ACTION_TRADE,
        pb.SOURCE_PRIMARY,
        pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD,
        score,
        threshold,
        "champion",
        version,
        1_900_000_000,
    )


def with_imbalance(value: float) -> NDArray[np.float32]:
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    values[IMBALANCE] = value
    return values


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> CachedScores:
    return CachedScores(SETTINGS, clock)


async def test_the_remembered_score_answers_with_its_provenance(cache: CachedScores) -> None:
    cache.remember(new_case(), scored(), "decision-1")
    case = new_case()
    answer = await cache.answer(case)
    assert answer is not None
    assert (answer.action, answer.source) == (pb.ACTION_TRADE, pb.SOURCE_CACHED_SCORE)
    assert (answer.score, answer.threshold, answer.model_version) == (0.75, 0.5, "v1")
    assert (answer.model_expires_at, answer.cached_from) == (1_900_000_000, "decision-1")
    assert case.degradations == []
    assert [stage for stage, *_ in case.budget.uses] == [pb.STAGE_CACHED_SCORE]


async def test_a_remembered_score_below_the_threshold_is_no_trade(cache: CachedScores) -> None:
    cache.remember(new_case(), scored(0.25), "decision-1")
    answer = await cache.answer(new_case())
    assert answer is not None
    assert (answer.action, answer.reason) == (pb.ACTION_NO_TRADE, pb.REASON_CODE_SCORE_BELOW_THRESHOLD)


async def nothing_from(cache: CachedScores, case: Case) -> bool:
    return await cache.answer(case) is None and case.degradations == [pb.DEGRADATION_NO_CACHED_SCORE]


async def test_without_a_score_there_is_no_answer(cache: CachedScores) -> None:
    assert await nothing_from(cache, new_case())


async def test_a_score_of_a_version_that_does_not_decide_any_more_does_not_answer(clock: Clock) -> None:
    deciding = {"v1", "v2"}
    cache = CachedScores(SETTINGS, clock, decides=lambda version: version in deciding)
    cache.remember(new_case(), scored(version="v2"), "decision-1")
    assert await cache.answer(new_case()) is not None
    deciding.remove("v2")
    assert await nothing_from(cache, new_case()), "rolled back: at once, however young"
    # An order that was under way at that moment comes back with the old version's score.
    cache.remember(new_case(), scored(version="v2"), "decision-2")
    assert await nothing_from(cache, new_case())
    cache.remember(new_case(), scored(version="v1"), "decision-3")
    answer = await cache.answer(new_case())
    assert answer is not None
    assert answer.cached_from == "decision-3"


async def test_the_other_side_is_another_question(cache: CachedScores) -> None:
    cache.remember(new_case(side=pb.SIDE_BUY), scored(), "decision-1")
    assert await nothing_from(cache, new_case(side=pb.SIDE_SELL))


async def test_an_old_score_does_not_answer(cache: CachedScores, clock: Clock) -> None:
    cache.remember(new_case(arrived=clock.now), scored(), "decision-1")
    clock.now += 1
    assert await cache.answer(new_case()) is not None
    clock.now += 0.001
    assert await nothing_from(cache, new_case())


async def test_the_age_counts_from_the_order_it_was_made_for(cache: CachedScores, clock: Clock) -> None:
    case = new_case(arrived=clock.now)
    clock.now += 0.6  # the model and the audit took their time
    cache.remember(case, scored(), "decision-1")
    clock.now += 0.5
    assert await nothing_from(cache, new_case())


@pytest.mark.parametrize(("mid", "answers"), [(100.0199, True), (99.9801, True), (100.021, False), (99.979, False)])
async def test_a_mid_that_moved_too_far_either_way_makes_it_useless(
    cache: CachedScores, mid: float, answers: bool
) -> None:
    cache.remember(new_case(mid=100.0), scored(), "decision-1")
    assert (await cache.answer(new_case(mid=mid)) is not None) == answers


async def test_an_unknown_mid_is_a_move_too_far(cache: CachedScores) -> None:
    cache.remember(new_case(), scored(), "decision-1")
    assert await nothing_from(cache, new_case(mid=math.nan))


@pytest.mark.parametrize("mid", [math.nan, 0.0, -1.0])
async def test_a_score_without_a_usable_mid_is_not_kept(cache: CachedScores, mid: float) -> None:
    cache.remember(new_case(mid=mid), scored(), "decision-1")
    assert await nothing_from(cache, new_case())


@pytest.mark.parametrize(
    ("before", "after", "answers"),
    [
        (0.0, 0.5, True),
        (0.25, -0.25, True),
        (0.0, 0.75, False),
        (0.0, math.nan, False),
        (math.nan, 0.0, False),
        (math.nan, math.nan, True),
    ],
)
async def test_a_watched_feature_may_move_only_so_far(
    cache: CachedScores, before: float, after: float, answers: bool
) -> None:
    cache.remember(new_case(values=with_imbalance(before)), scored(), "decision-1")
    assert (await cache.answer(new_case(values=with_imbalance(after))) is not None) == answers


async def test_an_answer_of_another_model_version_takes_its_place(cache: CachedScores) -> None:
    cache.remember(new_case(), scored(0.75, "v1", 0.5), "decision-1")
    cache.remember(new_case(), scored(0.75, "v2", 0.8), "decision-2")
    answer = await cache.answer(new_case())
    assert answer is not None
    assert (answer.model_version, answer.threshold, answer.action) == ("v2", 0.8, pb.ACTION_NO_TRADE)
    assert answer.cached_from == "decision-2"


async def test_the_callers_own_features_are_neither_kept_nor_answered(cache: CachedScores) -> None:
    own = with_imbalance(0)
    cache.remember(new_case(caller_features=own, values=own), scored(), "decision-1")
    assert await nothing_from(cache, new_case())
    cache.remember(new_case(), scored(), "decision-2")
    assert await nothing_from(cache, new_case(caller_features=own, values=own))


async def test_stale_features_get_no_answer(cache: CachedScores) -> None:
    cache.remember(new_case(), scored(), "decision-1")
    assert await nothing_from(cache, new_case(problem=pb.REASON_CODE_FEATURES_STALE))


async def test_switched_off_it_says_so(clock: Clock) -> None:
    cache = CachedScores(SETTINGS, clock, lambda: False)
    cache.remember(new_case(), scored(), "decision-1")
    case = new_case()
    assert await cache.answer(case) is None
    assert case.degradations == [pb.DEGRADATION_CACHED_SCORE_OFF]


@given(
    mids=st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 2),
    imbalances=st.tuples(*[st.floats(width=32, allow_nan=True, allow_infinity=True)] * 2),
)
async def test_whatever_the_market_holds_it_answers_or_declines(
    mids: tuple[float, float], imbalances: tuple[float, float]
) -> None:
    cache = CachedScores(SETTINGS, Clock())
    cache.remember(new_case(mid=mids[0], values=with_imbalance(imbalances[0])), scored(), "decision-1")
    answer = await cache.answer(new_case(mid=mids[1], values=with_imbalance(imbalances[1])))
    if answer is not None:
        assert abs(mids[1] / mids[0] - 1) * 1e4 <= SETTINGS.max_mid_move_bps


@pytest.mark.parametrize("moves", [{"imbalance_l6": 0.5}, {"imbalance_l5": -0.1}, {"imbalance_l5": math.nan}])
def test_settings_refuse_a_feature_that_does_not_exist_and_a_negative_move(moves: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CachedScoreSettings(max_feature_move=moves)
