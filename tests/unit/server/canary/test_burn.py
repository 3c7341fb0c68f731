"""Burn rates over their windows, in a time of the test's."""

from __future__ import annotations

import numpy as np
import pytest
from support.cases import new_case
from support.guest_sets import MIXED

from fallback.order import Attempt, Brought, Case
from feature_cache.feature_set import SetRow
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.burn import BurnRate, BurnRule, Objective, SloSettings

FAST, SLOW = SloSettings().rules()


class Traffic:
    """A hundred calls a second, some of which fail."""

    def __init__(self, objective: float = 0.999) -> None:
        self.burn = BurnRate(objective)
        self.now, self.good, self.bad = 0.0, 0, 0
        self.burn.sample(0.0, 0, 0)

    def go_on(self, seconds: int, bad_per_100: int) -> None:
        for _ in range(seconds):
            self.now += 1
            self.good += 100 - bad_per_100
            self.bad += bad_per_100
            self.burn.sample(self.now, self.good, self.bad)


def test_a_rate_is_the_share_of_failures_over_what_is_allowed() -> None:
    traffic = Traffic()
    traffic.go_on(100, 2)
    assert traffic.burn.rate(60, 1_000) == pytest.approx(20.0)
    traffic.go_on(100, 0)
    assert traffic.burn.rate(60, 1_000) == 0.0
    assert traffic.burn.rate(200, 1_000) == pytest.approx(10.0)


@pytest.mark.parametrize(("failed", "calls", "fires"), [(144, 10_000, True), (143, 10_000, False), (72, 5_000, True)])
def test_an_alarm_is_on_at_exactly_its_rate(failed: int, calls: int, fires: bool) -> None:
    burn = BurnRate(0.999)
    burn.sample(0.0, 0, 0)
    burn.sample(60.0, calls - failed, failed)
    assert burn.fires(FAST) == fires


def test_nothing_is_said_of_a_few_calls() -> None:
    traffic = Traffic()
    traffic.go_on(5, 100)
    assert traffic.burn.rate(60, 1_000) == 0.0
    assert not traffic.burn.fires(FAST)
    assert BurnRate(0.999).rate(60, 1) == 0.0


def test_an_alarm_wants_both_windows() -> None:
    traffic = Traffic()
    traffic.go_on(3_600, 0)
    traffic.go_on(300, 5)
    assert traffic.burn.rate(300, 100) > 14.4
    assert not traffic.burn.fires(FAST), "five minutes in an hour are not enough of it"
    traffic.go_on(900, 5)
    assert traffic.burn.fires(FAST)
    traffic.go_on(300, 0)
    assert traffic.burn.rate(3_600, 100) > 14.4
    assert not traffic.burn.fires(FAST), "it is over"


def test_the_slow_rule_sees_what_the_fast_one_does_not() -> None:
    traffic = Traffic()
    traffic.go_on(7 * 3_600, 1)
    assert not traffic.burn.fires(FAST)
    assert traffic.burn.fires(SLOW)


def test_a_canarys_rule_fires_within_seconds_and_sees_nothing_from_before_it() -> None:
    traffic = Traffic()
    rule = SloSettings().canary_rule()
    traffic.go_on(60, 50)
    began = traffic.now
    assert traffic.burn.fires(rule)
    traffic.go_on(1, 0)
    assert not traffic.burn.fires(rule, since=began)
    traffic.go_on(3, 20)
    assert traffic.burn.fires(rule, since=began)


def test_what_is_longer_ago_than_any_window_is_forgotten() -> None:
    traffic = Traffic()
    traffic.go_on(30_000, 0)
    assert len(traffic.burn._samples) < 21_700


ROW = SetRow.of(MIXED, bytes(MIXED.row_bytes))


def case_of_another_set(row: SetRow | None, *outcomes: str, brings: bool = True) -> Case:
    """An order for a model of another set, after attempts that ended so."""
    case = new_case()
    if brings:
        case.order.brought = Brought(MIXED, np.zeros(len(MIXED), dtype=np.float32))
    case.others = {MIXED: row}
    case.attempts = [Attempt("primary", outcome, 0.001, "") for outcome in outcomes]
    return case


def missed(case: Case) -> int:
    """How many of the calls that count no model answered."""
    objective = Objective(SloSettings(), cap_seconds=0.05)
    objective.note(case, by_model=False)
    assert objective.met == 0
    return objective.missed


def test_a_caller_who_leaves_out_what_a_model_needs_uses_up_no_budget() -> None:
    assert missed(case_of_another_set(None, brings=False)) == 0
    server_lacks = case_of_another_set(None)
    server_lacks.others = {}
    assert missed(server_lacks) == 1, "a part of the server's own is missing"
    assert missed(case_of_another_set(None, "timeout", brings=False)) == 1, (
        "another model was asked, and did not answer"
    )


def test_a_caller_whose_row_makes_a_model_fail_uses_up_no_budget() -> None:
    for outcome in ("model_error", "bad_answer"):
        assert missed(case_of_another_set(ROW, outcome)) == 0
        assert missed(case_of_another_set(ROW, outcome, brings=False)) == 1
    for outcome in ("timeout", "transport", "overload"):
        assert missed(case_of_another_set(ROW, outcome)) == 1
    embedded = case_of_another_set(ROW)
    embedded.degradations.append(pb.DEGRADATION_EMBEDDED_FAILED)
    assert missed(embedded) == 0


def test_a_rule_names_itself() -> None:
    assert str(BurnRule(14.4, 3_600, 300, 1)) == "14.4x over 3600 s and 300 s"
