"""What is counted of ledgers, plainly and compiled."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.twins import compiled_here

from fallback.budget import Use
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.tally import count_plainly
from server.timing.histogram import LATENCY_EDGES_SECONDS, Histogram

STAGES = pb.Stage.values()[1:]
SECONDS = st.floats(-1, 100) | st.sampled_from(LATENCY_EDGES_SECONDS)
USES = st.tuples(
    st.sampled_from(STAGES),
    SECONDS,
    SECONDS,
    st.just(pb.DEGRADATION_UNSPECIFIED) | st.sampled_from(pb.Degradation.values()),
)
Counts = tuple[dict[int, Histogram], dict[int, Histogram], Counter[tuple[int, int]]]


def nothing() -> Counts:
    return {stage: Histogram() for stage in STAGES}, {stage: Histogram() for stage in STAGES}, Counter()


@given(together=st.lists(st.lists(st.lists(USES, max_size=6), max_size=4), max_size=3), times=st.integers(1, 3))
def test_compiled_and_plain_count_the_same(together: list[list[list[Use]]], times: int) -> None:
    plain, fast = nothing(), nothing()
    for ledgers in together:
        count_plainly(ledgers * times, *plain)
        compiled_here("server.decision.tally_c").count(ledgers, *fast, times)
    assert fast[2] == plain[2]
    for of_plain, of_fast in zip(plain[:2], fast[:2], strict=True):
        for stage in STAGES:
            (buckets, total), (fast_buckets, fast_total) = of_plain[stage].buckets(), of_fast[stage].buckets()
            assert fast_buckets == buckets
            assert fast_total == pytest.approx(total, abs=1e-9)


def test_a_ledger_that_several_decisions_have_counts_for_each() -> None:
    ledger: list[Use] = [(pb.STAGE_AUDIT, 0.004, 0.002, pb.DEGRADATION_UNSPECIFIED)]
    ledger.append((pb.STAGE_PRIMARY, 0.0, 0.0, pb.DEGRADATION_PRIMARY_BREAKER_OPEN))
    each, at_once = nothing(), nothing()
    count_plainly([ledger] * 3, *each)
    count_plainly([ledger], *at_once, 3)
    assert at_once[2] == each[2]
    assert at_once[0][pb.STAGE_AUDIT].buckets() == each[0][pb.STAGE_AUDIT].buckets()


def test_a_stage_that_was_passed_over_took_no_time() -> None:
    used, allowed, skips = counts = nothing()
    passed_over: Use = (pb.STAGE_PRIMARY, 0.0, 0.0, pb.DEGRADATION_PRIMARY_BREAKER_OPEN)
    count_plainly([[passed_over, (pb.STAGE_AUDIT, 0.004, 0.002, pb.DEGRADATION_UNSPECIFIED)]], *counts)
    assert skips == {(pb.STAGE_PRIMARY, pb.DEGRADATION_PRIMARY_BREAKER_OPEN): 1}
    assert used[pb.STAGE_PRIMARY].buckets()[0][-1] == ("+Inf", 0.0)
    assert math.isclose(used[pb.STAGE_AUDIT].buckets()[1], 0.002)
    assert math.isclose(allowed[pb.STAGE_AUDIT].buckets()[1], 0.004)
