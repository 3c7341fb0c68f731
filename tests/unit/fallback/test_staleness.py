"""Which features may decide: undefined and impossible ages count as too old."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cases import new_case

from fallback.staleness import is_fresh, judge, problem_of
from feature_cache import features
from feature_cache.store.codec import BookState
from pretrade.decision.v1 import decision_pb2 as pb

AGES = st.floats(min_value=0.0, max_value=1e6)


@given(age=AGES, book_age=st.floats(allow_nan=True, allow_infinity=True))
def test_only_an_age_that_can_be_is_young_enough(age: float, book_age: float) -> None:
    fresh = is_fresh(age, book_age, 1.0)
    assert fresh == (math.isfinite(book_age) and book_age >= 0.0 and age + book_age <= 1.0)


@given(
    state=st.sampled_from([None, *BookState]),
    age=AGES,
    book_age=st.floats(allow_nan=True, allow_infinity=True),
    own_book_age_ms=st.one_of(st.none(), st.floats(min_value=0.0, width=32, allow_nan=False)),
)
def test_the_servers_features_and_the_callers_are_judged_apart(
    state: BookState | None, age: float, book_age: float, own_book_age_ms: float | None
) -> None:
    own = None
    if own_book_age_ms is not None:
        own = np.zeros(features.N_FEATURES, dtype=np.float32)
        own[features.INDEX["book_age_ms"]] = own_book_age_ms
    case = new_case(caller_features=own)
    problem = problem_of(state, age, book_age, 1.0)
    judge(case, problem, 1.0)
    usable = problem is None
    assert usable == (state not in (None, BookState.UNKNOWN) and is_fresh(age, book_age, 1.0))
    if own_book_age_ms is None:
        assert (case.features_problem is None) == usable
    else:
        assert (case.features_problem is None) == (own_book_age_ms <= 1_000.0)
    assert len(set(case.degradations)) == len(case.degradations)
    assert bool(case.degradations) == (not usable or case.features_problem is not None)


@pytest.mark.parametrize(
    ("state", "problem", "degradation"),
    [
        (None, pb.REASON_CODE_FEATURES_MISSING, pb.DEGRADATION_FEATURES_MISSING),
        (BookState.UNKNOWN, pb.REASON_CODE_BOOK_UNKNOWN, pb.DEGRADATION_BOOK_UNKNOWN),
        (BookState.VALID, pb.REASON_CODE_FEATURES_STALE, pb.DEGRADATION_FEATURES_STALE),
        (BookState.LOCKED, pb.REASON_CODE_FEATURES_STALE, pb.DEGRADATION_FEATURES_STALE),
    ],
)
def test_the_reason_is_the_first_that_holds(
    state: BookState | None, problem: pb.ReasonCode.ValueType, degradation: pb.Degradation.ValueType
) -> None:
    case = new_case()
    judge(case, problem_of(state, 0.9, 0.2, 1.0), 1.0)
    assert (case.features_problem, case.degradations) == (problem, [degradation])
