"""The collector and Loki: one configuration beside Compose and in Kubernetes, which our own log lines fit."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
import yaml
from support.overlays import K8S, Object, assert_valid, named, settings_of

from feature_cache import logs
from pretrade.decision.v1 import decision_pb2 as pb

FOLDER: Final = K8S / "observability"
FILES: Final = {path.name: path for path in (FOLDER / "otel").glob("*.yaml")}
COLLECTOR: Final[dict[str, Any]] = yaml.safe_load(FILES["collector.yaml"].read_text())
LINE: Final = next(one for one in COLLECTOR["receivers"]["filelog"]["operators"] if one.get("id") == "line")
RETAINED: Final = COLLECTOR["receivers"]["filelog"]["operators"][-1]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    kubectl = str(Path(sys.executable).with_name("kubectl"))
    done = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def pod_of(workload: Object) -> Object:
    found: Object = workload["spec"]["template"]["spec"]
    return found


def workloads(objects: list[Object]) -> list[Object]:
    return [named(objects, "DaemonSet", "otel-collector"), named(objects, "StatefulSet", "loki")]


# --- the configuration


@pytest.mark.parametrize("scrape", ["scrape-compose.yaml", "scrape-pods.yaml"])
def test_the_collector_uses_only_what_it_declares_for_logs_metrics_and_traces(scrape: str) -> None:
    more = yaml.safe_load(FILES[scrape].read_text())
    declared = {
        kind: set(COLLECTOR[kind]) | set(more.get(kind, {})) for kind in ("receivers", "processors", "exporters")
    }
    pipelines = COLLECTOR["service"]["pipelines"] | more["service"]["pipelines"]
    assert set(pipelines) == {"logs", "metrics", "traces"}
    for kind, names in declared.items():
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == names, "what is declared is used, and the other way round"
    assert set(COLLECTOR["service"]["extensions"]) == set(COLLECTOR["extensions"])
    assert COLLECTOR["receivers"]["filelog"]["storage"] in COLLECTOR["extensions"]
    assert all(pipeline["processors"][0] == "memory_limiter" for pipeline in pipelines.values())


def test_a_token_for_loki_is_in_a_file_alone_and_takes_nothing_else_away() -> None:
    more = yaml.safe_load(FILES["loki-token.yaml"].read_text())
    (name,) = more["extensions"]
    assert more["extensions"][name] == {"filename": "/run/telemetry-secrets/loki-token"}
    (exporter,) = more["exporters"]
    assert exporter in COLLECTOR["exporters"]
    assert more["exporters"][exporter]["auth"]["authenticator"] == name
    # A list of a later file replaces the earlier one.
    assert more["service"]["extensions"] == [*COLLECTOR["service"]["extensions"], name]


def test_no_line_is_given_up_while_loki_is_away() -> None:
    """The files are the buffer. `batch` would take lines from them that nobody has."""
    assert COLLECTOR["service"]["pipelines"]["logs"]["processors"] == ["memory_limiter"]
    for one in (COLLECTOR["receivers"]["filelog"], COLLECTOR["exporters"]["otlphttp/loki"]):
        assert one["retry_on_failure"]["max_elapsed_time"] == "0s"


def test_the_scraper_of_pods_gives_the_job_names_that_the_rules_go_by() -> None:
    loaded = yaml.safe_load(FILES["scrape-pods.yaml"].read_text())
    (job,) = loaded["receivers"]["prometheus"]["config"]["scrape_configs"]
    kept, named_by, region = job["relabel_configs"]
    assert (kept["action"], kept["regex"]) == ("keep", "metrics")
    assert (named_by["target_label"], named_by["replacement"]) == ("job", "pretrade-$$1")
    assert region["target_label"] == "region"
    text = (FOLDER / "prometheus" / "alerts.rules.yaml").read_text()
    asked = set(re.findall(r'job="([\w-]+)"', text)) - {"pretrade-collector"}
    pods = [one for path in K8S.glob("*/**/*.yaml") for one in yaml.safe_load_all(path.read_text()) if is_workload(one)]
    scraped = {
        f"pretrade-{one['spec']['template']['metadata']['labels']['app.kubernetes.io/name']}"
        for one in pods
        for container in one["spec"]["template"]["spec"]["containers"]
        if any(port.get("name") == "metrics" for port in container.get("ports", ()))
    }
    assert asked <= scraped


def is_workload(one: Any) -> bool:
    return isinstance(one, dict) and one.get("kind") in {"Deployment", "StatefulSet"} and "template" in one["spec"]


# --- our lines, as the collector reads them


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A line of each level, and a traceback."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    before = structlog.get_config()
    try:
        logs.configure("debug", "server")
        log = structlog.get_logger("test")
        for level in ("debug", "info", "warning", "error", "critical"):
            getattr(log, level)(level)
        try:
            raise ValueError("why")
        except ValueError:
            log.exception("raised")
    finally:
        structlog.configure(**before)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_line_has_a_time_and_a_level_that_the_collector_understands(written: list[dict[str, Any]]) -> None:
    assert [line["event"] for line in written] == ["debug", "info", "warning", "error", "critical", "raised"]
    severity = LINE["severity"]
    understood = {"trace", "debug", "info", "warn", "error", "fatal"} | set(severity["mapping"].values())
    timestamp = LINE["timestamp"]
    assert (timestamp["layout_type"], timestamp["layout"]) == ("gotime", "2006-01-02T15:04:05Z07:00")
    for line in written:
        assert line[severity["parse_from"].removeprefix("attributes.")] in understood
        # Go takes a fraction of a second where the layout names none.
        at = line[timestamp["parse_from"].removeprefix("attributes.")]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", at)
        assert datetime.fromisoformat(at).tzinfo is not None


def test_what_lines_are_searched_by_is_in_the_canonical_line(written: list[dict[str, Any]]) -> None:
    """The names are those of the log of decisions, and of every line."""
    source = (K8S.parent / "server/telemetry/decision_log.py").read_text()
    fields = set(re.findall(r'(?:fields\[)?"(\w+)"[\]:]', source)) | set(written[0])
    retained = {field.removeprefix("attributes.") for field in RETAINED["fields"]}
    assert RETAINED["type"] == "retain"
    assert retained <= fields
    assert {"decision_id", "correlation_id", "event", "component"} <= retained
    assert LINE["trace"]["trace_id"]["parse_from"].removeprefix("attributes.") in fields
    secret = {field.name for field in pb.Order.DESCRIPTOR.fields} - {"strategy", "instrument"}
    assert not retained & secret, "what somebody is about to trade is in no log"


# --- Kubernetes


def test_every_object_is_valid_for_kubernetes(objects: list[Object], tmp_path: Path) -> None:
    assert_valid(objects, tmp_path)


def test_the_configurations_are_those_of_compose(objects: list[Object]) -> None:
    wanted = {name: FILES[name].read_text() for name in ("collector.yaml", "scrape-pods.yaml")}
    assert settings_of(objects, "otel-collector") == wanted
    assert settings_of(objects, "loki") == {"loki.yaml": (FOLDER / "loki" / "loki.yaml").read_text()}
    services = yaml.safe_load((K8S.parent / "compose.yaml").read_text())["services"]
    for workload in workloads(objects):
        (container,) = pod_of(workload)["containers"]
        assert f":-{container['image']}}}" in services[container["name"]]["image"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for argument in container["args"]:
            path = Path(argument.partition("=")[2])
            assert str(path.parent) == mounted["configuration"]
            assert path.name in settings_of(objects, container["name"])


def test_whoever_sends_finds_the_collector_and_the_collector_finds_loki(objects: list[Object]) -> None:
    settings = (K8S / "base" / "server.env").read_text()
    (collector,) = re.findall(r"OTLP_ENDPOINT=(\S+)\.monitoring:(\d+)", settings)
    ports = {str(port["port"]) for port in named(objects, "Service", collector[0])["spec"]["ports"]}
    assert collector[1] in ports
    (endpoint,) = re.findall(r":-http://(\w+):(\d+)/otlp", FILES["collector.yaml"].read_text())
    assert endpoint[1] in {str(port["port"]) for port in named(objects, "Service", endpoint[0])["spec"]["ports"]}
    (container,) = pod_of(workloads(objects)[0])["containers"]
    given = {one["name"] for one in container["env"]}
    used = set(
        re.findall(
            r"\$\{env:(\w+)", "".join(FILES[name].read_text() for name in settings_of(objects, "otel-collector"))
        )
    )
    assert given <= used, "a variable that nobody reads"
    assert "NODE_NAME" in given, "it has no default"
    for workload in workloads(objects):
        (container,) = pod_of(workload)["containers"]
        there = {port["name"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in there


def test_the_operator_scrapes_the_collectors_where_it_scrapes_the_rest(objects: list[Object]) -> None:
    monitors = yaml.safe_load_all((K8S / "components" / "monitoring" / "scrape.yaml").read_text())
    (monitor,) = (one["spec"] for one in monitors if one["metadata"]["name"] == "pretrade-collector")
    service = named(objects, "Service", "otel-collector")
    assert monitor["namespaceSelector"] == {"matchNames": [service["metadata"]["namespace"]]}
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["relabelings"] == [{"targetLabel": "job", "action": "replace", "replacement": "pretrade-collector"}]


def test_both_are_confined_and_the_collector_reads_the_kubelets_files_alone(objects: list[Object]) -> None:
    for workload in workloads(objects):
        (container,) = pod_of(workload)["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod_of(workload)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "memory" in container["resources"]["limits"]
    collector, loki = workloads(objects)
    hosts = {one["name"]: one["hostPath"]["path"] for one in pod_of(collector)["volumes"] if "hostPath" in one}
    assert hosts == {"pods": "/var/log/pods"}
    (container,) = pod_of(collector)["containers"]
    assert next(one for one in container["volumeMounts"] if one["name"] == "pods")["readOnly"] is True
    assert not [one for one in pod_of(loki)["volumes"] if "hostPath" in one]
    rules = named(objects, "ClusterRole", "pretrade-otel-collector")["rules"]
    assert rules == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def test_only_servers_prometheus_and_grafana_reach_them(objects: list[Object]) -> None:
    spans, metrics = named(objects, "NetworkPolicy", "otel-collector")["spec"]["ingress"]
    assert spans["ports"] == [{"port": 4317}]
    assert spans["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "server"
    assert metrics == {"from": [{"podSelector": {}}], "ports": [{"port": 8888}]}
    policy = named(objects, "NetworkPolicy", "loki")["spec"]
    assert policy["egress"] == []
    (asked,) = policy["ingress"]
    names = {one["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for one in asked["from"]}
    assert (names, asked["ports"]) == ({"otel-collector", "grafana"}, [{"port": 3100}])
    assert not [one for one in objects if one["kind"] in {"Secret", "Ingress"}]
