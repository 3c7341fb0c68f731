"""Who is told of an alert, and of which ones nobody is because another alert explains them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support.dashboards import OBSERVABILITY, rules

FOLDER: Final = OBSERVABILITY / "alertmanager"
CONFIG: Final = FOLDER / "alertmanager.yaml"
LOADED: Final[dict[str, Any]] = yaml.safe_load(CONFIG.read_text())
ALERTS: Final = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECEIVERS: Final = {"nobody", "webhook", "e-mail", "slack", "pagerduty", "opsgenie"}


def amtool(*arguments: str) -> str:
    program = shutil.which("amtool")
    if program is None:
        pytest.skip("needs amtool (Debian: prometheus-alertmanager)")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def receiver_of(config: Path, **labels: str) -> str:
    told = (f"{name}={value}" for name, value in labels.items())
    return amtool("config", "routes", "test", f"--config.file={config}", *told).strip()


def test_alertmanager_takes_the_configuration_and_its_templates() -> None:
    said = amtool("check-config", str(CONFIG))
    assert f"{len(RECEIVERS)} receivers" in said
    assert "1 templates" in said


def test_nobody_is_told_until_receivers_are_chosen() -> None:
    assert {receiver_of(CONFIG, severity=severity) for severity in ("page", "ticket", "none")} == {"nobody"}


def test_pages_and_tickets_go_to_the_receivers_that_were_chosen_for_them(tmp_path: Path) -> None:
    chosen = LOADED | {"templates": [str(FOLDER / "templates/*.tmpl")]}
    for route, receiver in zip(chosen["route"]["routes"], ("pagerduty", "e-mail"), strict=True):
        route["receiver"] = receiver
    config = tmp_path / "alertmanager.yaml"
    config.write_text(yaml.safe_dump(chosen))
    assert {rule["labels"]["severity"] for rule in ALERTS.values()} == {"page", "ticket"}
    assert receiver_of(config, alertname="NoServer", severity="page") == "pagerduty"
    assert receiver_of(config, alertname="ReplicaDown", severity="ticket") == "e-mail"


def test_there_is_a_receiver_for_each_way_to_reach_somebody_and_it_tells_when_all_is_well_again() -> None:
    assert {each["name"] for each in LOADED["receivers"]} == RECEIVERS
    for receiver in LOADED["receivers"]:
        for kind, (settings,) in ((kind, value) for kind, value in receiver.items() if kind != "name"):
            assert settings["send_resolved"] is True, kind


def test_every_secret_is_in_a_file() -> None:
    named = re.findall(r"^\s*(?:- )?(\w*(?:password|key|url|credentials|secret)\w*): *(\S*)", CONFIG.read_text(), re.M)
    named += re.findall(r"\{(credentials\w*): (\S+)\}", CONFIG.read_text())
    secrets = {name: value for name, value in named if name != "url"}
    assert {"smtp_auth_password_file", "api_url_file", "routing_key_file", "api_key_file", "credentials_file"} <= set(
        secrets
    )
    for name, value in secrets.items():
        assert name.endswith("_file"), name
        assert value.startswith("/run/alert-secrets/"), name


@pytest.mark.parametrize("rule", LOADED["inhibit_rules"], ids=lambda rule: " ".join(rule["source_matchers"]))
def test_what_silences_and_what_is_silenced_are_alerts_that_there_are(rule: dict[str, Any]) -> None:
    for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
        _, quoted = re.split(r"[!=]=?~?|!~", matcher, maxsplit=1)
        assert set(quoted.strip('"').split("|")) <= set(ALERTS), matcher
    assert "region" in rule["equal"], "what happens in one region explains nothing in another"


def test_a_notification_is_about_one_kind_of_alert() -> None:
    assert LOADED["route"]["group_by"] == ["alertname", "region", "slo", "model"]
