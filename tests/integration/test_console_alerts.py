"""Open alerts and silences in the console, as a real Alertmanager has them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from grpc import StatusCode
from support.console import RunningConsole, Visitor, clean_environment, running_console
from support.harness import eventually
from support.receivers import Mailbox, Webhook, running_alertmanager, serving
from support.secure_server import SecureServer, refused, status

from pretrade.client.cli.alertmanager import Alertmanager

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with SecureServer(tmp_path_factory.mktemp("server"), "token").running() as server:
        yield server


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """An Alertmanager in which one alert fires."""
    pages, mails = Webhook(), Mailbox()
    with serving(pages, mails), running_alertmanager(tmp_path, pages, mails) as url:
        fire(url, "ReplicaDown", replica="primary")
        yield url


@pytest.fixture
def console(server: SecureServer, url: str) -> Iterator[RunningConsole]:
    with running_console(clean_environment(server), "--target", server.admin, "--alertmanager", url) as console:
        yield console


def fire(url: str, alert: str, **labels: str) -> None:
    ends = datetime.now(UTC) + timedelta(minutes=5)
    annotations = {"summary": f"<b>{alert}</b>", "runbook_url": f"docs/runbook.md#{alert.lower()}"}
    body = [
        {
            "labels": {"alertname": alert, "severity": "page", **labels},
            "annotations": annotations,
            "endsAt": ends.isoformat(),
        }
    ]
    request = urllib.request.Request(
        f"{url}/api/v2/alerts", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10.0):
        pass


def logged_in(console: RunningConsole, server: SecureServer, role: str, name: str) -> Visitor:
    visitor = Visitor(console.url)
    assert visitor.log_in(server.token(role, sub=name)).status_code == 303
    return visitor


def test_an_operator_silences_an_alert_and_ends_the_silence_by_name(
    server: SecureServer, url: str, console: RunningConsole
) -> None:
    with logged_in(console, server, "operator", "olga") as olga:
        shown = olga.part("/overview/alerts")
        assert "ReplicaDown" in shown
        assert "&lt;b&gt;ReplicaDown&lt;/b&gt;" in shown, "what a rule says is no markup"
        assert 'href="/runbook#replicadown"' in shown
        assert 'href="/alerts"' in olga.get("/").text
        (link,) = re.findall(r'href="(/alerts/silence\?conditions=[^"]+)"', olga.part("/alerts/live"))
        page = olga.get(link).text
        conditions = re.search(r"<textarea[^>]+>([^<]+)</textarea>", page)
        assert conditions is not None
        assert conditions[1].split() == ["alertname=ReplicaDown", "replica=primary", "severity=page"]
        form = {"conditions": conditions[1], "span": "2h", "reason": "new kernel"}
        preview = olga.post("/alerts/silence/preview", form, **{"hx-request": "true"}).text
        assert "Nobody is told of" in preview
        assert "For 2 h" in preview
        made = olga.post("/alerts/silence", form)
        assert (made.status_code, made.headers["location"]) == (303, "/alerts")
        assert "nobody is told of" in olga.get("/alerts").text
        shown = eventually(lambda: olga.part("/alerts/live"), lambda text: "silenced by" in text)
        (silence,) = Alertmanager(url).silences()
        assert (silence["createdBy"], silence["comment"]) == ("olga", "new kernel")
        assert "new kernel" in shown
        assert "olga" in olga.get(f"/alerts/silences/{silence['id']}").text
        assert olga.post(f"/alerts/silences/{silence['id']}").status_code == 303
        assert not Alertmanager(url).silences()


@pytest.mark.long
def test_a_viewer_sees_alerts_and_silences_none_and_a_trader_sees_none(
    server: SecureServer, url: str, console: RunningConsole
) -> None:
    form = {"conditions": "ReplicaDown", "span": "2h", "reason": "may I?"}
    with logged_in(console, server, "viewer", "vic") as vic:
        assert "ReplicaDown" in vic.part("/alerts/live")
        assert "/alerts/silence" not in vic.get("/alerts").text + vic.part("/alerts/live")
        assert vic.get("/alerts/silence").status_code == 403
        assert vic.post("/alerts/silence", form).status_code == 403
        assert vic.post("/alerts/silence/preview", form).status_code == 403
        assert vic.post("/alerts/silences/any").status_code == 403
    with logged_in(console, server, "trader", "tim") as tim:
        for path in ("/alerts", "/alerts/live", "/alerts/rules", "/overview/alerts"):
            assert tim.get(path).status_code == 403, path
        assert "/alerts" not in tim.get("/").text
    assert not Alertmanager(url).silences()


@pytest.mark.long
def test_who_is_denied_silences_nothing_any_more_although_the_console_knew_him(
    server: SecureServer, url: str, console: RunningConsole
) -> None:
    form = {"conditions": "ReplicaDown", "span": "2h", "reason": "still here"}
    with logged_in(console, server, "operator", "otto") as otto:
        otto.get("/alerts")
        with server.channel(server.admin) as channel:
            token = server.token("operator", sub="otto")
            server.path("policy.json").write_text(json.dumps({"denied": ["sub:otto"]}))
            try:

                def is_denied() -> bool:
                    with suppress(AssertionError):  # it is answered until the server has read the file
                        return refused(status, channel, token) is StatusCode.UNAUTHENTICATED
                    return False

                eventually(is_denied, bool)
                answer = otto.post("/alerts/silence", form)
            finally:
                server.path("policy.json").write_text("{}")
    assert answer.headers.get("location") != "/alerts", "what was known of him is some seconds old, and not asked"
    assert not Alertmanager(url).silences()


@pytest.mark.long
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"conditions": "", "span": "2h", "reason": "x"}, "Conditions: at least one"),
        ({"conditions": "ReplicaDown", "span": "", "reason": "x"}, "A silence ends by itself"),
        ({"conditions": "ReplicaDown", "span": "2h", "reason": " "}, "Say why"),
        ({"conditions": "replica=~.*", "span": "2h", "reason": "x"}, "Alertmanager refuses it"),
    ],
)
def test_a_silence_that_cannot_be_made_says_why(
    server: SecureServer, url: str, console: RunningConsole, fields: dict[str, str], said: str
) -> None:
    with logged_in(console, server, "operator", "olga") as olga:
        olga.get("/alerts")
        answer = olga.post("/alerts/silence", fields)
        assert answer.status_code >= 400
        assert said in answer.text
        assert not Alertmanager(url).silences()


def test_an_alertmanager_that_is_away_takes_nothing_else_with_it(server: SecureServer) -> None:
    away = ("--target", server.admin, "--alertmanager", "http://127.0.0.1:1")
    with (
        running_console(clean_environment(server), *away) as console,
        logged_in(console, server, "operator", "olga") as olga,
    ):
        assert "does not answer as an Alertmanager" in olga.part("/overview/alerts")
        assert "primary" in olga.part("/overview/status")
        form = {"conditions": "ReplicaDown", "span": "2h", "reason": "x"}
        assert olga.post("/alerts/silence", form).status_code == 502
        assert "does not answer" in olga.get("/alerts/silences/any").text


@pytest.mark.long
def test_without_an_alertmanager_the_page_of_alerts_has_the_rules_alone(server: SecureServer) -> None:
    with (
        running_console(clean_environment(server), "--target", server.admin) as console,
        logged_in(console, server, "operator", "olga") as olga,
    ):
        page = olga.get("/alerts").text
        assert "What fires is not shown" in page
        assert "/alerts/silence" not in page
        assert "There are none" in olga.part("/alerts/rules")
        assert olga.get("/alerts/live").status_code == 404
        assert olga.get("/alerts/silence").status_code == 404
