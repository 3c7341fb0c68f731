"""The alert rules of users as operators see and set them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from support.control_files import that_trades

from feature_cache.features import MF1
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2 as pb
from server.control.alert_rules import UserAlerts
from server.control.metrics import of_alerts
from server.control.state import ControlSettings, ControlState
from server.control.subjects import ALERT_RULES, alert_rule_subjects
from server.errors import ControlChangedError, InvalidChangeError, UnknownSubjectError
from server.journal.journal import Journal, JournalSettings
from server.rpc.alerts import AlertSteering


class Steered:
    """Alert rules that are steered."""

    def __init__(self, control: ControlState) -> None:
        self.control, self.alerts = control, UserAlerts()
        control.steer(alert_rule_subjects(self.alerts))
        self.steering = AlertSteering(control, self.alerts)

    async def set(self, rule: pb.AlertRule, **how: Any) -> pb.SetAlertRuleResponse:
        return await self.steering.set(pb.SetAlertRuleRequest(rule=rule, reason="the desk asked", **how), "ann")

    async def delete(self, name: str, **how: Any) -> pb.DeleteAlertRuleResponse:
        return await self.steering.delete(pb.DeleteAlertRuleRequest(name=name, reason="done", **how), "ann")


@asynccontextmanager
async def steered(path: Path) -> AsyncIterator[Steered]:
    ids = (f"change-{number}" for number in itertools.count())
    async with Journal(JournalSettings(path=path / "journal.db")) as journal:
        control = ControlState(
            ControlSettings(),
            that_trades(path / "control.json"),
            {},
            journal,
            "one",
            lambda: next(ids),
            time.time_ns,
            time.monotonic,
        )
        yield Steered(control)


def twap(above: float = 0.9) -> pb.AlertRule:
    share = pb.DecisionShare(action="TRADE", strategy="twap", window=Duration(seconds=300))
    return pb.AlertRule(
        name="twap", share=share, above=above, lasting=Duration(seconds=300), cooldown=Duration(seconds=60)
    )


def wide() -> pb.AlertRule:
    return pb.AlertRule(name="wide", feature=pb.FeatureValue(name="spread_bps"), above=20, severity="page")


async def test_rules_are_added_replaced_and_deleted_by_name_and_each_change_says_what_differs(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        before = s.control.version
        made = (await s.set(wide())).change
        assert (made.subject, made.author, made.version) == ("alert_rules", "ann", before + 1)
        assert made.diff == [
            "alert_rules: none → wide: spread_bps of any instrument above 20 (page)",
            "+ wide: spread_bps of any instrument above 20 (page)",
        ]
        await s.set(twap())
        listed = s.steering.list()
        ticket = twap()
        ticket.severity = "ticket"
        assert list(listed.rules) == [ticket, wide()]
        assert listed.control_version == before + 2
        assert [one["alert"] for one in json.loads(listed.rules_file)["groups"][0]["rules"]] == ["twap", "wide"]
        assert (await s.set(twap(0.8))).change.diff[1:] == [
            "- twap: TRADE share of strategy twap above 0.9 for 300 s (ticket)",
            "+ twap: TRADE share of strategy twap above 0.8 for 300 s (ticket)",
        ]
        assert [one.name for one in (await s.delete("twap")).rules] == ["wide"]
        await s.delete("wide")
        assert s.alerts.rules == ()


async def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        would = (await s.set(wide(), dry_run=True)).change
        assert would.dry_run
        assert would.diff
        assert s.alerts.rules == ()


async def test_a_change_of_another_version_is_refused_so_that_no_rule_is_lost(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        await s.set(wide())
        with pytest.raises(ControlChangedError):
            await s.set(twap(), expected_control_version=s.control.version - 1)
        assert [one.name for one in s.alerts.rules] == ["wide"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (pb.AlertRule(), "rule.name: must be 1 to 48 lower-case letters"),
        (pb.AlertRule(name="x", above=1), "rule.condition: must be either"),
        (pb.AlertRule(name="x", share=pb.DecisionShare(action="TRADE")), "rule.threshold: must be either"),
        (
            pb.AlertRule(name="x", share=pb.DecisionShare(action="TRADE"), above=7),
            "rule.threshold: must be from 0 to 1",
        ),
        (pb.AlertRule(name="x", feature=pb.FeatureValue(name="moon"), above=7), "rule.feature: must be one of"),
        (
            pb.AlertRule(name="x", share=pb.DecisionShare(action="BUY"), above=0.5),
            "rule.action: Input should be",
        ),
        (
            pb.AlertRule(name="x", share=pb.DecisionShare(action="TRADE"), above=0.5, lasting=Duration(nanos=5)),
            "rule.lasting: must be whole seconds",
        ),
    ],
)
async def test_a_rule_that_makes_no_sense_is_refused_with_a_sentence(
    tmp_path: Path, rule: pb.AlertRule, said: str
) -> None:
    async with steered(tmp_path) as s:
        with pytest.raises(InvalidChangeError) as refused:
            await s.set(rule)
        assert said in str(refused.value)


async def test_what_is_not_there_cannot_be_deleted_and_there_are_100_at_most(tmp_path: Path) -> None:
    async with steered(tmp_path) as s:
        with pytest.raises(UnknownSubjectError, match="no alert rule 'wide'"):
            await s.delete("wide")
        rules = [{"name": f"r{number}", "feature": "spread_bps", "above": 1} for number in range(100)]
        alert_rule_subjects(s.alerts)[ALERT_RULES].apply(json.dumps(rules), None)
        with pytest.raises(InvalidChangeError, match="there are 100 already"):
            await s.set(wide())


def test_a_value_of_another_release_is_checked_before_it_is_applied() -> None:
    subject = alert_rule_subjects(UserAlerts())[ALERT_RULES]
    assert subject.check('[{"name": "x", "colour": "red"}]')
    assert not subject.check("")
    assert subject.words("") == "none"


async def test_the_features_that_rules_name_are_exported_and_no_others(tmp_path: Path) -> None:
    values = np.arange(len(MF1), dtype=np.float32)
    undefined = np.full(len(MF1), np.nan, dtype=np.float32)
    snapshots = {
        "KNOWN": SimpleNamespace(values=values, state=BookState.VALID),
        "UNDEFINED": SimpleNamespace(values=undefined, state=BookState.VALID),
        "UNKNOWN": SimpleNamespace(values=values, state=BookState.UNKNOWN),
    }
    cache: Any = {name: SimpleNamespace(snapshot=one) for name, one in snapshots.items()}

    def exported(alerts: UserAlerts) -> list[tuple[str, dict[str, str], float]]:
        names = ("KNOWN", "UNDEFINED", "UNKNOWN", "MISSING")
        return [
            (one.name, one.labels, one.value) for family in of_alerts(alerts, cache, names) for one in family.samples
        ]

    async with steered(tmp_path) as s:
        assert exported(s.alerts) == [("pretrade_alert_rules", {}, 0)]
        await s.set(wide())
        labels = {"instrument": "KNOWN", "feature": "spread_bps"}
        assert exported(s.alerts) == [
            ("pretrade_alert_rules", {}, 1),
            ("pretrade_feature_value", labels, float(MF1.index["spread_bps"])),
        ]
