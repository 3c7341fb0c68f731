"""What the console makes of what Alertmanager says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pretrade.client.cli.alertmanager import Alertmanager, Matcher, UnreachableError, by_urgency
from pretrade.console.alerts import AlertWatch, OpenAlert, conditions_of
from pretrade.console.forms import FormError

_ALERT: dict[str, Any] = {
    "labels": {"alertname": "ReplicaDown", "severity": "ticket", "replica": "primary", "instance": "s:7003"},
    "annotations": {"summary": "primary is down", "runbook_url": "docs/runbook.md#replicadown"},
    "startsAt": "2026-11-24T10:00:00.000Z",
    "status": {"silencedBy": [], "inhibitedBy": []},
}


class Asked(Alertmanager):
    """Answers with one alert, and counts."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self.asked = 0
        self.problem = ""

    def alerts(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.problem:
            raise UnreachableError(self.problem)
        return [_ALERT]

    def silences(self) -> list[dict[str, Any]]:
        return []


async def test_whoever_looks_at_the_same_time_asks_once() -> None:
    now, alertmanager = 0.0, Asked()
    watch = AlertWatch(alertmanager, lambda: now)
    seen = await asyncio.gather(*(watch.look() for _ in range(10)))
    assert {one.alerts[0].name for one in seen} == {"ReplicaDown"}
    assert alertmanager.asked == 1
    now += 2.0
    await watch.look()
    assert alertmanager.asked == 2
    watch.forget()
    await watch.look()
    assert alertmanager.asked == 3


async def test_an_alertmanager_that_is_away_is_no_sign_that_all_is_well() -> None:
    now, alertmanager = 0.0, Asked()
    watch = AlertWatch(alertmanager, lambda: now)
    await watch.look()
    alertmanager.problem = "nobody answers"
    now += 5.0
    assert (await watch.look()).problem == "nobody answers"
    await watch.look()
    assert alertmanager.asked == 2, "it is not asked again at once"
    alertmanager.problem = ""
    now += 5.0
    assert (await watch.look()).problem == ""


def test_the_most_urgent_comes_first_and_what_explains_others_before_these() -> None:
    def alert(name: str, severity: str, minute: int, *explained_by: str) -> dict[str, Any]:
        labels = {"alertname": name, "severity": severity}
        status = {"silencedBy": [], "inhibitedBy": list(explained_by)}
        return {"labels": labels, "startsAt": f"2026-11-24T10:0{minute}:00.000Z", "status": status}

    found = by_urgency(
        [
            alert("Flapping", "ticket", 1, "some fingerprint"),
            alert("Down", "ticket", 2),
            alert("Behind", "ticket", 3),
            alert("Full", "page", 4),
            alert("Strange", "whisper", 0),
        ]
    )
    assert [one["labels"]["alertname"] for one in found] == ["Full", "Down", "Behind", "Flapping", "Strange"]


def test_an_alert_leads_to_its_section_and_to_a_silence_of_itself_alone() -> None:
    found = OpenAlert.of(_ALERT)
    assert found.runbook == "/runbook#replicadown"
    assert found.others == ["replica=primary", "instance=s:7003"]
    assert conditions_of({"conditions": found.conditions}) == [
        Matcher("alertname", "ReplicaDown"),
        Matcher("instance", "s:7003"),
        Matcher("replica", "primary"),
        Matcher("severity", "ticket"),
    ]


def test_an_alert_of_somebody_elses_rule_may_lack_what_ours_have() -> None:
    found = OpenAlert.of(_ALERT | {"labels": {}, "annotations": {}})
    assert (found.name, found.severity, found.what, found.runbook) == ("?", "", "", "")


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (" \n ", "at least one"),
        ("a b", "neither the name"),
        ("x=~(", "no regular expression"),
        ("a=b\n" * 21, "at most"),
    ],
)
def test_conditions_that_cannot_be_understood_are_named(conditions: str, said: str) -> None:
    with pytest.raises(FormError, match=said):
        conditions_of({"conditions": conditions})
