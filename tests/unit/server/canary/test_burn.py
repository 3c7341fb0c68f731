"""Burn rates over their windows, in a time of the test's."""

from __future__ import annotations

import pytest

from server.canary.burn import BurnRate, BurnRule, SloSettings

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


def test_a_rule_names_itself() -> None:
    assert str(BurnRule(14.4, 3_600, 300, 1)) == "14.4x over 3600 s and 300 s"
