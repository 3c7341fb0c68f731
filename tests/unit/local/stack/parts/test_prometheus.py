"""What Prometheus scrapes and tells on one machine is what it does in the deployment, at the stack's addresses."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from local.stack.parts import alertmanager, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.stack_file import Endpoints

NOTHING: dict[str, Any] = {each.name: None for each in fields(Endpoints)}
NOWHERE = Endpoints(**NOTHING)
STACK = replace(
    NOWHERE,
    metrics_url="http://127.0.0.1:7003",
    worker_url="http://127.0.0.1:9",
    alertmanager_url="http://127.0.0.1:9093",
)


def written(directory: Path, endpoints: Endpoints, processes: int | None = None, bars: str | None = None) -> Any:
    prometheus.write_configuration(directory, endpoints, processes, bars)
    return yaml.safe_load((directory / "prometheus.yaml").read_text())


def scraped(configuration: Any) -> dict[str, list[str]]:
    return {job["job_name"]: job["static_configs"][0]["targets"] for job in configuration["scrape_configs"]}


def test_every_part_that_runs_is_scraped_under_the_name_that_the_rules_go_by(tmp_path: Path) -> None:
    assert scraped(written(tmp_path, STACK)) == {
        "pretrade-server": ["127.0.0.1:7003"],
        "pretrade-worker": ["127.0.0.1:9"],
    }
    kept = scraped(written(tmp_path, replace(STACK, worker_url=None), bars="http://127.0.0.1:8"))
    assert set(kept) == {"pretrade-server", "pretrade-bars"}


def test_every_process_of_a_server_is_scraped(tmp_path: Path) -> None:
    found = scraped(written(tmp_path, STACK, processes=3))["pretrade-server"]
    assert found == ["127.0.0.1:7003", "127.0.0.1:7004", "127.0.0.1:7005"]


def test_its_rules_are_those_of_the_deployment_and_its_alertmanager_that_of_the_stack(tmp_path: Path) -> None:
    found = written(tmp_path, STACK)
    pattern, users = map(Path, found["rule_files"])
    assert users == tmp_path / "user.rules.yaml"
    assert {path.name for path in pattern.parent.glob(pattern.name)} == {"alerts.rules.yaml", "slo.rules.yaml"}
    (told,) = found["alerting"]["alertmanagers"]
    assert told["static_configs"][0]["targets"] == ["127.0.0.1:9093"]


@pytest.mark.parametrize("part", ["prometheus", "alertmanager"])
def test_a_program_that_is_not_installed_is_named_with_its_package(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus if part == "prometheus" else alertmanager, "program", lambda: None)
    other = alertmanager if part == "prometheus" else prometheus
    monkeypatch.setattr(other, "program", lambda: "/usr/bin/other")
    with pytest.raises(ValueError, match=f"needs {part}, which is not installed: Debian's packages are prometheus"):
        Stack(LocalSettings(dir=tmp_path, alerts=True))
    Stack(LocalSettings(dir=tmp_path))
