"""What Slack, PagerDuty and Opsgenie are sent: a real Alertmanager renders our templates and posts them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from support.dashboards import rules
from support.harness import eventually
from support.receivers import CONFIGURATION, Webhook, serving, started_alertmanager

RULES = {rule["alert"]: rule for rule in rules() if "alert" in rule}
SUMMARY = "server-0:7003 cannot write its audit journal: every answer is ABSTAIN"
RUNBOOK = "docs/runbook.md#journalunwritable"


class Posted(NamedTuple):
    """A request that a receiver got."""

    path: str
    authorization: str | None
    body: dict[str, Any]


class Service(Webhook):
    """A web server that answers as the three services do, and keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[Posted] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.posted.append(Posted(self.path, self.headers["Authorization"], body))
                self.send_response(202)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        self.server.server_close()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def of(self, prefix: str) -> list[Posted]:
        return [one for one in self.posted if one.path.startswith(prefix)]


def configuration(folder: Path, service: Service) -> Path:
    """The deployment's, with all three receivers for pages and their services at ours; shorter waits."""
    found: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    found["templates"] = [str(CONFIGURATION.parent / "templates" / "*.tmpl")]
    found["global"] = {"pagerduty_url": f"{service.url}pagerduty", "opsgenie_api_url": f"{service.url}opsgenie/"}
    secrets = {"slack-url": f"{service.url}slack/T0/B0", "pagerduty-key": "a-routing-key", "opsgenie-key": "a-key"}
    for name, secret in secrets.items():
        (folder / name).write_text(secret)
    wanted = ("slack", "pagerduty", "opsgenie")
    text = json.dumps([one for one in found["receivers"] if one["name"] in wanted])
    found["receivers"] = [{"name": "nobody"}, *json.loads(text.replace("/run/alert-secrets", str(folder)))]
    page = found["route"]["routes"][0]
    found["route"]["routes"] = [page | {"receiver": name, "continue": True} for name in wanted]
    for route in (found["route"], *found["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    path = folder / "alertmanager.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


@pytest.fixture
def told(tmp_path: Path) -> Iterator[tuple[str, Service]]:
    service = Service()
    with serving(service), started_alertmanager(tmp_path, configuration(tmp_path, service)) as url:
        yield url, service


def post(url: str, *, ended: bool = False) -> None:
    """What Prometheus posts when a page fires, or is over."""
    now, rule = datetime.now(UTC), RULES["JournalUnwritable"]
    alert = {
        "labels": {"alertname": "JournalUnwritable", "instance": "server-0:7003", "region": "a"} | rule["labels"],
        "annotations": rule["annotations"] | {"summary": SUMMARY},
        "startsAt": (now - timedelta(minutes=1)).isoformat(),
        "endsAt": (now if ended else now + timedelta(minutes=5)).isoformat(),
    }
    request = urllib.request.Request(
        f"{url}/api/v2/alerts", json.dumps([alert]).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10.0):
        pass


def test_a_page_reaches_slack_pagerduty_and_opsgenie_and_so_does_its_end(told: tuple[str, Service]) -> None:
    url, service = told
    post(url)
    eventually(lambda: {one.path.split("/")[1] for one in service.posted}, lambda seen: len(seen) == 3)
    title = "PAGE JournalUnwritable in region a"

    (slack,) = service.of("/slack")
    assert slack.path == "/slack/T0/B0"
    (message,) = slack.body["attachments"]
    assert (slack.body["channel"], message["title"], message["color"]) == ("#pretrade", title, "danger")
    assert SUMMARY in message["text"]
    assert RUNBOOK in message["text"]

    (pager,) = service.of("/pagerduty")
    assert (pager.body["routing_key"], pager.body["event_action"]) == ("a-routing-key", "trigger")
    assert (pager.body["payload"]["summary"], pager.body["payload"]["severity"]) == (title, "critical")
    assert SUMMARY in pager.body["payload"]["custom_details"]["alerts"]
    assert RUNBOOK in pager.body["payload"]["custom_details"]["alerts"]

    (opsgenie,) = service.of("/opsgenie")
    assert (opsgenie.path, opsgenie.authorization) == ("/opsgenie/v2/alerts", "GenieKey a-key")
    assert (opsgenie.body["message"], opsgenie.body["priority"]) == (title, "P1")
    assert SUMMARY in opsgenie.body["description"]
    assert RUNBOOK in opsgenie.body["description"]

    post(url, ended=True)
    eventually(lambda: len(service.posted), lambda count: count == 6)
    (over,) = service.of("/slack")[1].body["attachments"]
    assert (over["title"], over["color"]) == ("RESOLVED JournalUnwritable in region a", "good")
    resolved = service.of("/pagerduty")[1].body
    assert (resolved["event_action"], resolved["dedup_key"]) == ("resolve", pager.body["dedup_key"])
    closed = service.of("/opsgenie")[1].path
    assert closed.startswith(f"/opsgenie/v2/alerts/{opsgenie.body['alias']}/close")
