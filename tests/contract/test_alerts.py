"""Rules and runbook: every alert is tested, and leads to a section that holds commands that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support.dashboards import DASHBOARDS, OBSERVABILITY, RULES, queries, rules, series_asked_for, series_that_exist
from support.healthy_hours import LOADS, RECORDINGS, STEP_SECONDS, hour
from support.pages import complaint_about
from support.server_group import EDGES

from local.stack.stack import PARTS

ROOT: Final = Path(__file__).parents[2]
RUNBOOK: Final = (ROOT / "docs" / "runbook.md").read_text()
LOCAL: Final = (ROOT / "docs" / "runbook-local.md").read_text()
SECTIONS: Final = {title.lower(): body for title, _, body in (s.partition("\n") for s in RUNBOOK.split("\n## ")[1:])}


ALERTS: Final = [rule for rule in rules() if "alert" in rule]
SLOS: Final = {rule["labels"]["slo"] for rule in rules() if rule.get("record") == "pretrade:slo_budget:ratio"}


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("needs promtool (Debian: prometheus)")
    done = subprocess.run([program, *arguments], cwd=RULES, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", *(path.name for path in RULES.glob("*.rules.yaml")))


@pytest.mark.long
def test_each_alert_fires_when_it_should_and_nothing_else_does() -> None:
    promtool("test", "rules", "alerts.test.yaml")


def in_region_a(case: dict[str, Any]) -> dict[str, Any]:
    """A case of alerts.test.yaml in which Prometheus labels every target with its region, as in Kubernetes."""
    series = [one | {"series": one["series"].replace("{", '{region="a", ', 1)} for one in case["input_series"]]
    fired = [
        {
            "expr": 'count by (alertname, region) (ALERTS{alertstate="firing"})',
            "eval_time": asked["eval_time"],
            "exp_samples": [
                one | {"labels": one["labels"].replace("}", ', region="a"}')} for one in asked["exp_samples"]
            ],
        }
        for asked in case.get("promql_expr_test", ())
        if asked["expr"] == 'count by (alertname) (ALERTS{alertstate="firing"})'
    ]
    rules = [
        {"eval_time": each["eval_time"], "alertname": each["alertname"]}
        | {"exp_alerts": [one | {"exp_labels": one["exp_labels"] | {"region": "a"}} for one in each["exp_alerts"]]}
        for each in case.get("alert_rule_test", ())
    ]
    kept = {name: case[name] for name in ("name", "interval")}
    return kept | {"input_series": series, "promql_expr_test": fired, "alert_rule_test": rules}


def fired_in(case: dict[str, Any]) -> set[str]:
    """The alerts that fire in a case."""
    sampled = str([asked["exp_samples"] for asked in case.get("promql_expr_test", ())])
    by_rule = {each["alertname"] for each in case.get("alert_rule_test", ()) if each["exp_alerts"]}
    return by_rule | set(re.findall(r'alertname="(\w+)"', sampled))


@pytest.mark.long
def test_each_alert_says_in_which_region_it_fires(tmp_path: Path) -> None:
    """Without the label, a lost region would not silence it, and two regions would be told as one."""
    cases = yaml.safe_load((RULES / "alerts.test.yaml").read_text())["tests"]
    # Those that are about lost regions and servers say so themselves.
    regional: list[dict[str, Any]] = []
    seen: set[str] = set()
    for case in cases:
        if not re.search('region=|"NoServer"', str(case)) and not fired_in(case) <= seen:  # one of each will do
            seen |= fired_in(case)
            regional.append(in_region_a(case))
    path = tmp_path / "regional.yaml"
    files = [str(RULES / "alerts.rules.yaml")]
    path.write_text(json.dumps({"rule_files": files, "evaluation_interval": "15s", "tests": regional}))
    promtool("test", "rules", str(path))
    named = {rule["alert"] for rule in ALERTS if not rule["alert"].startswith("BudgetBurns")}
    assert named - seen <= {*re.findall(r'alertname="(\w+)", region="', str(cases))}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_budgets_page_when_they_burn_and_not_for_few_calls() -> None:
    promtool("test", "rules", "slo.test.yaml")


@pytest.mark.long
@pytest.mark.parametrize("edge", EDGES)
def test_no_alert_fires_in_an_hour_in_which_nothing_is_wrong(edge: str, tmp_path: Path) -> None:
    """What a real stack's metrics did under each load, repeated for an hour: see `support.healthy_hours`."""
    recording = json.loads((RECORDINGS / f"{edge}.json").read_text())
    assert list(recording) == list(LOADS)
    asked = [{"eval_time": "1h", "expr": 'ALERTS{alertstate="firing"}', "exp_samples": []}]
    hours = [
        {"name": load, "interval": f"{STEP_SECONDS}s", "input_series": hour(series), "promql_expr_test": asked}
        for load, series in recording.items()
    ]
    files = [str(path) for path in RULES.glob("*.rules.yaml")]
    path = tmp_path / "healthy.yaml"
    path.write_text(json.dumps({"rule_files": files, "evaluation_interval": "30s", "tests": hours}))
    promtool("test", "rules", str(path))


def test_no_alert_is_untested() -> None:
    tested = "".join(path.read_text() for path in RULES.glob("*.test.yaml"))
    missing = [rule["alert"] for rule in ALERTS if f'{{alertname="{rule["alert"]}"' not in tested]
    assert not missing
    assert [slo for slo in SLOS if f'slo="{slo}"' not in tested] == []


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_urgent_it_is_and_leads_to_its_section(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert page == "docs/runbook.md"
    assert (SLOS if anchor == "{{ $labels.slo }}" else {anchor}) <= set(SECTIONS)


def test_no_section_is_about_an_alert_that_is_gone() -> None:
    assert set(SECTIONS) == {"quick card", *SLOS} | {
        rule["alert"].lower() for rule in ALERTS if not rule["alert"].startswith("BudgetBurns")
    }


def test_the_page_about_alerts_has_the_promises_with_the_budgets_that_the_rules_have() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    listed = {
        slo: float(budget) / 100 for slo, budget in re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+) % \|$", page, re.M)
    }
    budgets = [rule for rule in rules() if rule.get("record") == "pretrade:slo_budget:ratio"]
    assert {(rule["labels"]["slo"], float(rule["expr"][len("vector(") : -1])) for rule in budgets} == set(
        listed.items()
    )
    asked = " ".join(rule["expr"] for rule in rules() if rule.get("record") == "pretrade:slo_bad:rate5m")
    thresholds = {float(edge) * 1000 for edge in re.findall(r'le="([\d.]+)"', asked)}
    assert thresholds == {
        float(found) for found in re.findall(r"(\d+) ms", page.split("`answered-fast` |")[1].split("\n")[0])
    }


def test_every_link_within_the_runbook_leads_somewhere() -> None:
    assert set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK)) <= set(SECTIONS)


@pytest.mark.parametrize("line", sorted(set(re.findall(r"\$ (pretrade [^\n`]+)", RUNBOOK + LOCAL))))
def test_a_command_of_the_runbook_is_one_that_the_tool_takes(line: str) -> None:
    complaint = complaint_about(shlex.split(line)[1:])
    assert complaint is None, complaint


def test_the_page_for_one_machine_names_the_log_of_every_part() -> None:
    assert set(re.findall(r"`\.pretrade/logs/(\w+)\.log`", LOCAL)) == set(PARTS)
    for kind in re.findall(r"kubectl (?:--\S+ \S+ )*(\w+)", RUNBOOK):
        assert f"kubectl {kind}" in LOCAL or kind in ("top",), "what is to be typed here instead"


def test_a_command_that_the_tool_does_not_take_is_noticed() -> None:
    assert complaint_about(["breaker", "primary", "ajar"]) is not None
    assert complaint_about(["audit", "list", "--status", "unconfirmed"]) is not None
    assert complaint_about(["reboot"]) is not None


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    assert series_asked_for(" ".join(rule["expr"] for rule in rules())) <= series_that_exist()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_metrics_that_there_are(path: Path) -> None:
    asked = [query for query in queries() if query.dashboard == path.stem]
    assert asked
    for query in asked:
        assert series_asked_for(query.expression) <= series_that_exist(), query


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_finds_the_data_source_and_room_for_every_panel(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    sources = yaml.safe_load((OBSERVABILITY / "grafana/provisioning/datasources/pretrade.yaml").read_text())
    known = {source["uid"] for source in sources["datasources"]}
    places: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} <= known
        box = panel["gridPos"]
        cells = {(x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])}
        assert box["x"] + box["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
    assert len({json.loads(each.read_text())["uid"] for each in DASHBOARDS}) == len(DASHBOARDS)


def test_what_the_status_names_as_the_worst_thing_has_its_section() -> None:
    source = (ROOT / "client/pretrade/client/cli/worst.py").read_text()
    named = set(re.findall(r'"([A-Z][a-z]+(?:[A-Z][a-z]+)+)"', source))
    assert {"ReplicaDown", "TradingHalted", "JournalFull"} <= named
    assert {section.lower() for section in named} <= set(SECTIONS)
