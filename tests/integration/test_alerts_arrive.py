"""A real Alertmanager with the deployment's configuration tells a webhook and a mailbox; the CLI silences it."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
from support.dashboards import rules
from support.harness import eventually
from support.receivers import Mailbox, Webhook, running_alertmanager, serving
from typer.testing import CliRunner

from local.stack.parts import alertmanager, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.cli.main import app

RULES = {rule["alert"]: rule for rule in rules() if "alert" in rule}


class Told(NamedTuple):
    """An Alertmanager and those whom it tells."""

    url: str
    pages: Webhook
    mails: Mailbox

    def post(self, alert: str, *instances: str, ended: bool = False, **labels: str) -> None:
        """What Prometheus posts when a rule fires for some instances, or does not any more."""
        now, rule = datetime.now(UTC), RULES[alert]
        ends = now if ended else now + timedelta(minutes=5)
        common = {"alertname": alert, **rule["labels"], **labels}
        alerts = [
            {
                "labels": common | {"instance": instance},
                "annotations": rule["annotations"],
                "startsAt": now.isoformat(),
                "endsAt": ends.isoformat(),
            }
            for instance in instances or ("s:7003",)
        ]
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts", json.dumps(alerts).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10.0):
            pass

    def run(self, *arguments: str) -> str:
        """What `pretrade alerts` prints."""
        done = CliRunner().invoke(app, ["alerts", *arguments, "--alertmanager", self.url], env={"COLUMNS": "300"})
        assert done.exit_code == 0, done.output
        return done.stdout


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    pages, mails = Webhook(), Mailbox()
    with serving(pages, mails), running_alertmanager(tmp_path, pages, mails) as url:
        yield Told(url, pages, mails)


def test_a_page_of_three_servers_is_told_once_by_webhook_and_mail_and_once_more_when_it_is_over(told: Told) -> None:
    servers = [f"server-{number}:7003" for number in range(3)]
    told.post("JournalUnwritable", *servers)
    (page,) = eventually(lambda: told.pages.received, bool)[:1]
    assert [alert["labels"]["instance"] for alert in page["alerts"]] == servers
    assert told.pages.authorizations == {"Bearer the token"}
    eventually(told.mails.subjects, lambda subjects: subjects == ["PAGE JournalUnwritable (3)"])
    (part,) = told.mails.received[0].iter_parts()
    text = part.get_content()
    assert "docs/runbook.md#journalunwritable" in text
    told.post("JournalUnwritable", *servers, ended=True)
    eventually(lambda: told.pages.told("JournalUnwritable"), lambda seen: seen == ["firing", "resolved"])
    eventually(told.mails.subjects, lambda subjects: len(subjects) == 2)
    assert told.mails.subjects()[1] == "RESOLVED JournalUnwritable (3)"


def test_a_lost_region_silences_its_parts_and_none_of_another_one(told: Told) -> None:
    told.post("RegionLost", region="a")
    for region in ("a", "b"):
        told.post("ServerDown", f"{region}:7003", region=region)
        told.post("ReplicaDown", f"{region}:7003", region=region, replica="primary")
    eventually(told.mails.subjects, lambda subjects: len(subjects) == 2)
    assert set(told.mails.subjects()) == {"PAGE RegionLost in region a", "PAGE ServerDown in region b"}
    listed = told.run("list")
    assert len(re.findall(r"no, another alert explains it", listed)) == 3


def test_a_silence_tells_nobody_until_it_is_ended(told: Told) -> None:
    silence = told.run("silence", "ReplicaDown", "replica=~prim.*", "--for", "1h", "--reason", "new kernel").strip()
    told.post("ReplicaDown", replica="primary")
    told.post("JournalFull")
    eventually(told.mails.subjects, bool)
    assert told.mails.subjects() == ["PAGE JournalFull"], "which came later"
    listed = told.run("list")
    assert f"silenced by {silence}" in listed
    assert "alertname=ReplicaDown replica=~prim.*" in listed
    assert "new kernel" in listed
    assert listed.index("JournalFull") < listed.index("ReplicaDown"), "the most urgent first"
    told.run("unsilence", silence)
    eventually(told.mails.subjects, lambda subjects: subjects == ["PAGE JournalFull", "TICKET ReplicaDown"])
    found = json.loads(told.run("list", "--json"))
    assert (len(found["alerts"]), found["silences"]) == (2, [])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("silence", "replica primary", "--for", "1h", "--reason", "x"), 2, "neither the name of an alert nor"),
        (("silence", "replica=~(", "--for", "1h", "--reason", "x"), 2, "no regular expression"),
        (("silence", "ReplicaDown", "--for", "soon", "--reason", "x"), 2, "span of time"),
        (("unsilence", "nonsense"), 1, "Alertmanager refuses it"),
    ],
)
def test_what_is_wrong_is_said(told: Told, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = CliRunner().invoke(app, ["alerts", *arguments, "--alertmanager", told.url], env={"COLUMNS": "300"})
    assert (done.exit_code, said in done.output) == (code, True), done.output


def test_a_stack_runs_both_and_its_alerts_are_listed(tmp_path: Path) -> None:
    if prometheus.program() is None:
        pytest.skip("needs prometheus (Debian: prometheus)")
    if alertmanager.program() is None:
        pytest.skip("needs prometheus-alertmanager (Debian's package)")
    settings = LocalSettings(dir=tmp_path, alerts=True)
    with Stack(settings, parts={"prometheus", "alertmanager"}) as stack:

        def told() -> list[str]:
            with urllib.request.urlopen(
                f"{stack.endpoints.prometheus_url}/api/v1/alertmanagers", timeout=10.0
            ) as found:
                return [one["url"] for one in json.load(found)["data"]["activeAlertmanagers"]]

        eventually(told, lambda urls: urls == [f"{stack.endpoints.alertmanager_url}/api/v2/alerts"])
        done = CliRunner().invoke(app, ["alerts", "list", "--dir", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, "no alert fires\n"), done.output


def test_an_alertmanager_that_is_not_there_is_named() -> None:
    done = CliRunner().invoke(app, ["alerts", "list", "--alertmanager", "http://127.0.0.1:1"])
    assert done.exit_code == 3
    assert "http://127.0.0.1:1 does not answer as an Alertmanager" in done.output
