"""Decisions are counted by strategy, of a bounded number of names."""

from __future__ import annotations

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.metrics import DecisionMetrics, of_decisions
from server.decision.strategies import MOST, OTHERS, StrategyCounts


def test_the_first_names_are_counted_by_themselves_and_all_further_ones_together() -> None:
    counts = StrategyCounts()
    counts.count((f"s{number}", pb.ACTION_TRADE) for number in range(MOST + 30))
    counts.count([("s0", pb.ACTION_TRADE), ("s0", pb.ACTION_ABSTAIN), (f"s{MOST}", pb.ACTION_TRADE)])
    assert len(counts.counts) == MOST + 2
    assert (counts.counts["s0", pb.ACTION_TRADE], counts.counts["s0", pb.ACTION_ABSTAIN]) == (2, 1)
    assert counts.counts[OTHERS, pb.ACTION_TRADE] == 31


def test_a_strategy_that_an_alert_rule_names_is_counted_however_late_it_comes() -> None:
    counts = StrategyCounts()
    counts.count((f"s{number}", pb.ACTION_TRADE) for number in range(MOST))
    counts.named = lambda: {"twap"}
    counts.count([("twap", pb.ACTION_TRADE), ("vwap", pb.ACTION_TRADE)])
    assert counts.counts["twap", pb.ACTION_TRADE] == 1
    assert counts.counts[OTHERS, pb.ACTION_TRADE] == 1


def test_a_strategy_has_a_series_for_each_action_so_that_a_share_of_0_is_one() -> None:
    metrics = DecisionMetrics()
    metrics.strategies.count([("twap", pb.ACTION_TRADE)])
    (family,) = (one for one in of_decisions(metrics) if one.name == "pretrade_strategy_decisions")
    assert {(one.labels["strategy"], one.labels["action"]): one.value for one in family.samples} == {
        ("twap", "TRADE"): 1,
        ("twap", "NO_TRADE"): 0,
        ("twap", "ABSTAIN"): 0,
    }
