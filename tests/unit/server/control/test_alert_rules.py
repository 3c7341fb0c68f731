"""Alert rules of users: what they may be, and what Prometheus makes of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from server.control.alert_rules import AlertRule, UserAlerts, read_rule, read_rules, rules_file, write_rules

SHARE: dict[str, Any] = {
    "name": "twap-trades",
    "action": "TRADE",
    "strategy": "twap",
    "above": 0.9,
    "for_seconds": 300,
    "cooldown_seconds": 600,
}
SPREAD: dict[str, Any] = {"name": "wide", "feature": "spread_bps", "above": 20.0, "severity": "page"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "TwapTrades"}, "name: must be 1 to 48 lower-case letters"),
        ({"name": ""}, "name: must be 1 to 48"),
        ({"action": "", "strategy": ""}, "condition: must be either the share of an action or the value of a feature"),
        ({"feature": "spread_bps"}, "condition: must be either"),
        ({"below": 0.1}, "threshold: must be either above or below a value"),
        ({"above": None}, "threshold: must be either"),
        ({"above": 90.0}, "threshold: must be from 0 to 1 for a share"),
        ({"above": float("nan")}, "above: Input should be a finite number"),
        ({"strategy": "twäp"}, "strategy: must be at most 64 characters of ASCII"),
        ({"instrument": "BTCUSDT"}, "instrument: belongs to a condition on a feature"),
        ({"window_seconds": 5}, "window_seconds: Input should be greater than or equal to 60"),
        ({"for_seconds": -1}, "for_seconds: Input should be greater than or equal to 0"),
        ({"severity": "urgent"}, "severity: Input should be 'page' or 'ticket'"),
        ({"action": "BUY"}, "action: Input should be '', 'TRADE', 'NO_TRADE' or 'ABSTAIN'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_with_its_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read_rule(SHARE | change)


def test_a_feature_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"feature: must be one of spread_bps, "):
        read_rule(SPREAD | {"feature": "spread"})
    with pytest.raises(ValueError, match="strategy: belongs to a condition on decisions"):
        read_rule(SPREAD | {"strategy": "twap"})


def test_rules_survive_the_control_state_and_say_what_they_are() -> None:
    rules = (read_rule(SHARE), read_rule(SPREAD))
    assert read_rules(write_rules(rules)) == rules
    assert (write_rules(()), read_rules("")) == ("", ())
    assert [str(one) for one in rules] == [
        "twap-trades: TRADE share of strategy twap above 0.9 for 300 s (ticket)",
        "wide: spread_bps of any instrument above 20 (page)",
    ]


def test_no_more_rules_are_read_than_there_may_be() -> None:
    many = [SPREAD | {"name": f"r{number}"} for number in range(101)]
    with pytest.raises(ValueError, match="at most 100"):
        read_rules(json.dumps(many))


def test_the_rules_in_force_say_what_must_be_exported() -> None:
    alerts = UserAlerts()
    assert (alerts.strategies, alerts.features) == (frozenset(), ())
    alerts.set((read_rule(SPREAD), read_rule(SHARE), read_rule(SPREAD | {"name": "again"})))
    assert [one.name for one in alerts.rules] == ["again", "twap-trades", "wide"]
    assert (alerts.strategies, alerts.features) == (frozenset({"twap"}), ("spread_bps",))


def promtool(folder: Path, rules: tuple[AlertRule, ...], case: dict[str, Any]) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    (folder / "user.rules.yaml").write_text(rules_file(rules))
    test = {"rule_files": ["user.rules.yaml"], "evaluation_interval": "15s", "tests": [{"interval": "15s"} | case]}
    (folder / "test.yaml").write_text(json.dumps(test))
    done = subprocess.run(
        [program, "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def fired(at: str, *alerts: str) -> dict[str, Any]:
    return {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": at,
        "exp_samples": [{"labels": f'{{alertname="{one}"}}', "value": 1} for one in alerts],
    }


def test_prometheus_evaluates_a_share_over_all_servers_with_its_time_and_its_cooldown(tmp_path: Path) -> None:
    """Two servers trade 19 of 20 orders of twap from minute 10 to 20, and one in two before and after."""

    def series(instance: str, strategy: str, action: str, values: str) -> dict[str, str]:
        labels = f'instance="{instance}", region="a", strategy="{strategy}", action="{action}"'
        return {"series": f"pretrade_strategy_decisions_total{{{labels}}}", "values": values}

    given = [
        one
        for instance in ("s:7003", "t:7003")
        for one in (
            series(instance, "twap", "TRADE", "0+10x40 419+19x40 1189+10x80"),
            series(instance, "twap", "NO_TRADE", "0+10x40 401+1x40 451+10x80"),
            series(instance, "vwap", "TRADE", "0+50x160"),
        )
    ]
    rule = read_rule(SHARE)
    summary = "TRADE share of strategy twap is 0.95: above 0.9 for 300 s"
    promtool(
        tmp_path,
        (rule,),
        {
            "input_series": given,
            "promql_expr_test": [
                fired("14m"),
                fired("20m", "twap-trades"),
                fired("30m", "twap-trades"),
                fired("36m"),
            ],
            "alert_rule_test": [
                {
                    "eval_time": "20m",
                    "alertname": "twap-trades",
                    "exp_alerts": [
                        {
                            "exp_labels": {"severity": "ticket", "rule": "user", "region": "a"},
                            "exp_annotations": {
                                "summary": summary,
                                "runbook_url": "docs/alerts.md#rules-of-your-own",
                            },
                        }
                    ],
                }
            ],
        },
    )


def test_prometheus_evaluates_a_feature_for_each_instrument(tmp_path: Path) -> None:
    def series(instrument: str, feature: str, values: str) -> dict[str, str]:
        labels = f'instance="s:7003", instrument="{instrument}", feature="{feature}"'
        return {"series": f"pretrade_feature_value{{{labels}}}", "values": values}

    given = [
        series("BTCUSDT.SIM", "spread_bps", "5x20 25x20 5x80"),
        series("ETHUSDT.SIM", "spread_bps", "5x120"),
        series("ETHUSDT.SIM", "rv_1s_bps", "-30x120"),
    ]
    named = read_rule({"name": "calm", "feature": "rv_1s_bps", "instrument": "ETHUSDT.SIM", "below": -20.5})
    promtool(
        tmp_path,
        (read_rule(SPREAD), named),
        {
            "input_series": given,
            "promql_expr_test": [fired("4m", "calm"), fired("8m", "calm", "wide"), fired("12m", "calm")],
            "alert_rule_test": [
                {
                    "eval_time": "8m",
                    "alertname": "wide",
                    "exp_alerts": [
                        {
                            "exp_labels": {"severity": "page", "rule": "user", "instrument": "BTCUSDT.SIM"},
                            "exp_annotations": {
                                "summary": "spread_bps of BTCUSDT.SIM is 25: above 20",
                                "runbook_url": "docs/alerts.md#rules-of-your-own",
                            },
                        }
                    ],
                }
            ],
        },
    )


def test_a_strategy_may_be_called_like_a_query_or_a_template(tmp_path: Path) -> None:
    strategy = 'a"b\\c{{ $x }}'
    rule = read_rule({"name": "odd", "action": "ABSTAIN", "strategy": strategy, "above": 0.5})
    labels = f'strategy={json.dumps(strategy)}, action="ABSTAIN"'
    given = [{"series": f"pretrade_strategy_decisions_total{{{labels}}}", "values": "0+10x40"}]
    told = {
        "exp_labels": {"severity": "ticket", "rule": "user"},
        "exp_annotations": {
            "summary": f"ABSTAIN share of strategy {strategy} is 1: above 0.5",
            "runbook_url": "docs/alerts.md#rules-of-your-own",
        },
    }
    asked = {"eval_time": "5m", "alertname": "odd", "exp_alerts": [told]}
    promtool(tmp_path, (rule,), {"input_series": given, "alert_rule_test": [asked]})
