"""An alert rule of a user's own, as a form has it."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.console.acts import ACTS
from pretrade.console.forms import FormError
from pretrade.console.rules import as_form, set_request

_SHARE = pb.AlertRule(
    name="twap",
    share=pb.DecisionShare(action="TRADE", strategy="twap", window=Duration(seconds=300)),
    above=0.9,
    lasting=Duration(seconds=90),
    cooldown=Duration(seconds=7_200),
    severity="ticket",
)
_FEATURE = pb.AlertRule(
    name="wide", feature=pb.FeatureValue(name="spread_bps", instrument="BTCUSDT"), below=-0.25, severity="page"
)
_FORM = {"name": "twap", "condition": "TRADE", "threshold": "0.9"}


@pytest.mark.parametrize("rule", [_SHARE, _FEATURE], ids=["share", "feature"])
def test_a_rule_that_is_opened_and_sent_as_it_is_stays_as_it_is(rule: pb.AlertRule) -> None:
    assert set_request(as_form(rule)).rule == rule


def test_times_are_written_as_people_write_them() -> None:
    form = as_form(_SHARE)
    assert (form["window"], form["lasting"], form["cooldown"]) == ("5m", "90s", "2h")
    assert "lasting" not in as_form(_FEATURE), "none"


def test_what_a_form_leaves_open_the_server_fills_in() -> None:
    rule = set_request(_FORM).rule
    assert not rule.share.HasField("window")
    assert not rule.HasField("lasting")
    assert (rule.severity, rule.share.strategy) == ("", "")


def test_whoever_deletes_a_rule_is_told_what_that_is() -> None:
    act = ACTS["alert_rule_delete"]
    request = act.complete({"name": " twap ", "reason": "too loud"}, "ann")
    assert request == pb.DeleteAlertRuleRequest(name="twap", author="ann", reason="too loud")
    assert act.is_bound(request, pb.TRADING_STATE_ACTIVE)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": " "}, "Name: every rule has one"),
        ({"condition": "luck"}, "While: one of"),
        ({"threshold": "high"}, "Threshold: a number"),
        ({"instrument": "BTCUSDT"}, "Instrument: belongs to a rule on a feature"),
        ({"feature": "spread_bps"}, "Feature: belongs to a rule on a feature"),
        ({"condition": "feature", "feature": "spread_bps", "strategy": "twap"}, "Strategy: belongs to a rule on dec"),
        ({"condition": "feature"}, "Feature: one must be chosen"),
        ({"window": "soon"}, "Over: a number with its unit"),
        ({"lasting": "5"}, "For at least: a number with its unit"),
        ({"cooldown": "x"}, "Goes on for: a number with its unit"),
    ],
)
def test_a_form_that_makes_no_sense_says_which_field(fields: dict[str, str], said: str) -> None:
    with pytest.raises(FormError, match=said):
        set_request({**_FORM, **fields})
