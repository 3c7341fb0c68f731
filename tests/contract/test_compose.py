"""What compose.yaml promises: settings that the programs take, names that resolve, nothing open to the network."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support.pages import complaint_about

from feature_cache.bars.settings import PREFIX, BarsSettings
from local.stack.ports import is_free
from pretrade.client.credential_variables import TOKEN, TOKEN_FILE
from pretrade.client.operator_token import token_path
from pretrade.console.cli import PORT

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "compose.yaml").read_text()
SERVICES: Final[dict[str, dict[str, Any]]] = yaml.safe_load(TEXT)["services"]
OURS: Final = (
    "server",
    "console",
    "alert-rules",
    "worker",
    "market",
    "ingest",
    "bars",
    "primary",
    "secondary",
    "challenger",
)

OTEL: Final[dict[str, dict[str, Any]]] = {
    path.name: yaml.safe_load(path.read_text()) for path in (ROOT / "k8s/observability/otel").glob("*.yaml")
}


def default_of(value: str) -> str:
    """What a variable of the collector's configuration is where nobody sets it."""
    matched = re.fullmatch(r"\$\{env:\w+:-(.*)\}", value)
    assert matched, value
    return matched[1]


def settings(service: str, module: str) -> dict[str, Any]:
    """What a program of ours makes of its service's environment."""
    given = {name: value.replace(":?choose one", "") for name, value in SERVICES[service]["environment"].items()}
    given = {name: value.replace("${DATABASE_PASSWORD}", "word") for name, value in given.items()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
    code = f"from {module}.settings import load; print(load().model_dump_json())"
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_the_whole_system_is_there() -> None:
    assert {
        *OURS,
        "kafka",
        "redis",
        "postgres",
        "prometheus",
        "alertmanager",
        "grafana",
        "otel-collector",
        "loki",
        "jaeger",
    } == set(SERVICES)


def test_every_image_can_be_given_by_its_digest_and_none_is_the_latest() -> None:
    for name, service in SERVICES.items():
        matched = re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-([^}]+)\}", service["image"])
        assert matched, name
        assert ":" in matched[1], name
        assert not matched[1].endswith(":latest"), name


def test_no_port_is_open_to_the_network() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("service", OURS)
def test_what_is_ours_is_confined(service: str) -> None:
    assert SERVICES[service]["read_only"] is True
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]


def test_whoever_waits_for_health_waits_for_somebody_who_tells() -> None:
    of_the_image = {"primary", "secondary", "challenger", "server", "worker"}
    for service in SERVICES.values():
        for name, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert name in of_the_image or "test" in SERVICES[name]["healthcheck"], name


def test_no_password_is_in_the_file() -> None:
    for line in TEXT.splitlines():
        if re.search(r"password", line, re.IGNORECASE) and not line.startswith("#"):
            assert "${DATABASE_PASSWORD:?" in line, line


def test_the_server_takes_its_settings_and_finds_everybody() -> None:
    loaded = settings("server", "server")
    assert loaded["grpc"]["host"] == loaded["metrics"]["host"] == "0.0.0.0"
    assert f"127.0.0.1:{loaded['grpc']['port']}:{loaded['grpc']['port']}" in SERVICES["server"]["ports"]
    endpoints = [loaded["replicas"][each] for each in ("primary", "secondary", "challenger")]
    hosts = {each.split(":")[0] for each in (*endpoints, loaded["tracing"]["otlp_endpoint"])}
    assert hosts <= set(SERVICES)
    assert {each.split(":")[1] for each in endpoints} == {"7070"}
    (volume,) = SERVICES["server"]["volumes"]
    assert str(Path(loaded["journal"]["path"]).parent) == volume.split(":")[1]
    for variable in ("PRETRADE_REDIS_URL", "PRETRADE_DATABASE_URL"):
        assert re.search(r"(//|@)(redis|postgres):", SERVICES["server"]["environment"][variable])


@pytest.mark.long
def test_the_console_reaches_the_admin_port_and_is_published_on_loopback_without_credentials() -> None:
    service = SERVICES["console"]
    assert service["network_mode"] == "service:server"
    assert service["image"] == SERVICES["server"]["image"]
    assert "build" not in service, "the server's build makes it"
    assert f"127.0.0.1:{PORT}:{PORT}" in SERVICES["server"]["ports"]
    given = service["environment"]
    admin = settings("server", "server")["admin"]
    assert given["PRETRADE_ADMIN_TARGET"] == f"{admin['host']}:{admin['port']}"
    assert given["PRETRADE_ALERTMANAGER_URL"] == "http://alertmanager:9093"
    assert not set(given) & {TOKEN, TOKEN_FILE}
    assert "volumes" not in service, "the operator token is not its own"
    # It starts as it is told to: the port of a machine is taken, so it says where it would listen.
    with socket.create_server(("0.0.0.0", PORT)) if is_free(PORT) else nullcontext():
        command = [sys.executable, "-m", "local", *service["entrypoint"][1:]]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
        done = subprocess.run(command, env=clean | given, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"cannot listen on 0.0.0.0:{PORT}" in done.stderr


def test_the_worker_takes_its_settings_and_finds_everybody() -> None:
    loaded = settings("worker", "feature_cache.worker")
    assert loaded["kafka_bootstrap_servers"].split(":")[0] in SERVICES
    assert loaded["metrics_host"] == "0.0.0.0"


def test_the_keeper_of_bars_is_only_there_when_asked_for_takes_its_settings_and_finds_everybody() -> None:
    service = SERVICES["bars"]
    assert service["profiles"] == ["bars"]
    assert service["entrypoint"] == ["python", "-m", "feature_cache.bars"]
    given = {name.removeprefix(PREFIX).lower(): value for name, value in service["environment"].items()}
    given["database_url"] = given["database_url"].replace("${DATABASE_PASSWORD:?choose one}", "word")
    taken = BarsSettings.model_validate(given)
    assert taken.kafka_bootstrap_servers.split(":")[0] in SERVICES
    assert "@postgres:" in taken.database_url.get_secret_value()
    assert taken.metrics_host == "0.0.0.0"


def test_the_market_feeds_the_instruments_that_are_decided() -> None:
    market = SERVICES["market"]
    done = subprocess.run(
        [sys.executable, *market["entrypoint"][1:], *market["command"], "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    from feature_cache.sources.simulator import INSTRUMENTS  # noqa: PLC0415 - beside what it is compared with

    simulated = {each if isinstance(each, str) else each.name for each in INSTRUMENTS}
    assert set(settings("server", "server")["instruments"]) == simulated


def test_the_collector_scrapes_the_ports_on_which_metrics_are_served_and_writes_to_prometheus() -> None:
    loaded = OTEL["scrape-compose.yaml"]["receivers"]["prometheus"]["config"]
    jobs = {job["job_name"]: job for job in loaded["scrape_configs"]}
    live = jobs.pop("pretrade-ingest")["dns_sd_configs"][0]
    assert live["names"] == ["ingest"]
    assert f"--metrics-port={live['port']}" in SERVICES["ingest"]["command"]
    kept = jobs.pop("pretrade-bars")["dns_sd_configs"][0]
    assert kept["names"] == ["bars"]
    assert str(kept["port"]) == SERVICES["bars"]["environment"]["PRETRADE_BARS_METRICS_PORT"]
    assert {name: job["static_configs"][0]["targets"] for name, job in jobs.items()} == {
        "pretrade-server": [f"server:{settings('server', 'server')['metrics']['port']}"],
        "pretrade-worker": [f"worker:{settings('worker', 'feature_cache.worker')['metrics_port']}"],
    }
    written = OTEL["collector.yaml"]["exporters"]["prometheusremotewrite"]
    assert default_of(written["endpoint"]) == "http://prometheus:9090/api/v1/write"
    assert "--web.enable-remote-write-receiver" in SERVICES["prometheus"]["command"]
    assert written["remote_write_queue"]["num_consumers"] == 1, "samples come in order"
    assert written["add_metric_suffixes"] is False, "a metric has the name that it was scraped under"


def test_prometheus_looks_itself_whether_the_collector_lives() -> None:
    config = yaml.safe_load((ROOT / "k8s/observability/prometheus/prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    readers = OTEL["collector.yaml"]["service"]["telemetry"]["metrics"]["readers"]
    port = readers[0]["pull"]["exporter"]["prometheus"]["port"]
    assert (job["job_name"], job["static_configs"]) == (
        "pretrade-collector",
        [{"targets": [f"otel-collector:{port}"]}],
    )


def test_the_writer_of_alert_rules_writes_where_prometheus_reads_and_asks_it_to() -> None:
    writer, read = SERVICES["alert-rules"], SERVICES["prometheus"]
    admin = settings("server", "server")
    given = writer["environment"]
    assert writer["network_mode"] == "service:server"
    assert given["PRETRADE_ADMIN_TARGET"] == f"{admin['admin']['host']}:{admin['admin']['port']}"
    assert given[TOKEN_FILE] == str(token_path(Path(admin["journal"]["path"])))
    command = [*writer["entrypoint"][1:], *writer["command"]]
    assert complaint_about(command) is None
    file = Path(command[3])
    patterns = yaml.safe_load((ROOT / "k8s/observability/prometheus/prometheus.yaml").read_text())["rule_files"]
    assert any(fnmatch(str(file), pattern) for pattern in patterns)
    assert f"alert-rules:{file.parent}" in writer["volumes"]
    assert f"alert-rules:{file.parent}:ro" in read["volumes"]
    assert f"--prometheus=http://prometheus:{read['ports'][0].rpartition(':')[2]}" in command
    assert "--web.enable-lifecycle" in read["command"]
    # The server's user writes it, in a volume that belongs to that user from the beginning.
    assert "uid=10001" in yaml.safe_load(TEXT)["volumes"]["alert-rules"]["driver_opts"]["o"]
    assert "USER 10001:10001" in (ROOT / "k8s/docker/server.Dockerfile").read_text()


def test_prometheus_tells_alertmanager_which_finds_its_configuration_and_the_users_secrets() -> None:
    told = yaml.safe_load((ROOT / "k8s/observability/prometheus/prometheus.yaml").read_text())["alerting"]
    (addresses,) = told["alertmanagers"][0]["static_configs"]
    (port,) = SERVICES["alertmanager"]["ports"]
    assert addresses["targets"] == [f"alertmanager:{port.rpartition(':')[2]}"]
    folder, secrets, _ = SERVICES["alertmanager"]["volumes"]
    source, mounted, _ = folder.split(":")
    path, _, name = SERVICES["alertmanager"]["command"][0].removeprefix("--config.file=").rpartition("/")
    assert path == mounted
    configuration = (ROOT / source / name).read_text()
    where = secrets.rpartition(":ro")[0].rpartition(":")[2]
    assert set(re.findall(r"_file: ([^\s}]+)/", configuration)) == {where}


def test_a_live_feed_is_only_there_when_asked_for_and_takes_its_arguments() -> None:
    feed = SERVICES["ingest"]
    assert feed["profiles"] == ["live"]
    arguments = [each.replace("=kafka:9092", "=127.0.0.1:1") for each in feed["command"]]
    python = [sys.executable, *feed["entrypoint"][1:], *arguments]
    done = subprocess.run(python, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(": ")[0]) == (1, "127.0.0.1:1"), done.stderr


def test_every_file_that_is_mounted_exists_and_is_where_the_programs_look() -> None:
    mounted = [v for service in SERVICES.values() for v in service.get("volumes", ()) if v.startswith("./")]
    assert mounted
    for volume in mounted:
        source, _, mode = volume.split(":")
        assert (ROOT / source).is_dir()
        assert mode == "ro"
    provider = yaml.safe_load((ROOT / "k8s/observability/grafana/provisioning/dashboards/pretrade.yaml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert f"./k8s/observability/grafana/dashboards:{path}:ro" in SERVICES["grafana"]["volumes"]


def test_the_collector_reads_its_configuration_and_finds_everybody() -> None:
    collector = SERVICES["otel-collector"]
    files = [argument.removeprefix("--config=") for argument in collector["command"]]
    assert files == ["/etc/otel/collector.yaml", "/etc/otel/scrape-compose.yaml"]
    assert "./k8s/observability/otel:/etc/otel:ro" in collector["volumes"]
    exporters = OTEL["collector.yaml"]["exporters"]
    endpoints = {default_of(one["endpoint"]) for one in exporters.values()}
    assert {re.sub(r"^\w+://", "", one).split(":")[0] for one in endpoints} == {"loki", "jaeger", "prometheus"}
    assert {"loki", "jaeger", "prometheus"} <= set(SERVICES)
    assert settings("server", "server")["tracing"]["otlp_endpoint"] == "otel-collector:4317"


def test_the_lines_of_all_are_shipped_but_of_those_who_ship_and_keep_them() -> None:
    """What Docker writes to each line is what the collector tells our containers from others by."""
    shipped = {name for name, service in SERVICES.items() if service["logging"]["options"].get("labels")}
    assert set(SERVICES) - shipped == {"otel-collector", "loki"}, "each line of theirs would make another one"
    for service in SERVICES.values():
        assert service["logging"]["driver"] == "json-file"
        assert {"max-size", "max-file"} <= set(service["logging"]["options"]), "a disk has an end"
    (label,) = {SERVICES[name]["logging"]["options"]["labels"] for name in shipped}
    assert f'attributes.attrs["{label}"]' in str(OTEL["collector.yaml"]["receivers"]["filelog"]["operators"])
    volumes = SERVICES["otel-collector"]["volumes"]
    assert "/var/lib/docker/containers:/var/lib/docker/containers:ro" in volumes
    kept = default_of(OTEL["collector.yaml"]["extensions"]["file_storage"]["directory"])
    assert f"otel-collector:{kept}" in volumes


def test_loki_keeps_what_it_is_sent_on_a_volume_and_is_open_to_nobody() -> None:
    loki = SERVICES["loki"]
    assert "ports" not in loki
    assert loki["command"] == ["-config.file=/etc/loki/loki.yaml"]
    assert "./k8s/observability/loki:/etc/loki:ro" in loki["volumes"]
    loaded = yaml.safe_load((ROOT / "k8s/observability/loki/loki.yaml").read_text())
    assert f"loki:{loaded['common']['path_prefix']}" in loki["volumes"]
    endpoint = default_of(OTEL["collector.yaml"]["exporters"]["otlphttp/loki"]["endpoint"])
    assert endpoint == f"http://loki:{loaded['server']['http_listen_port']}/otlp"
    assert loaded["limits_config"]["allow_structured_metadata"], "or it takes no line that has a trace"


def test_grafana_leads_from_a_line_to_its_trace_and_back() -> None:
    file = ROOT / "k8s/observability/grafana/provisioning/datasources/pretrade.yaml"
    sources = {one["uid"]: one for one in yaml.safe_load(file.read_text())["datasources"]}
    assert (
        {re.sub(r"^http://", "", one["url"]).split(":")[0] for one in sources.values()} == set(sources) <= set(SERVICES)
    )
    (field,) = sources["loki"]["jsonData"]["derivedFields"]
    assert (field["matcherRegex"], field["datasourceUid"]) == ("trace_id", "jaeger")
    back = sources["jaeger"]["jsonData"]["tracesToLogsV2"]
    assert back["datasourceUid"] == "loki"
    assert 'trace_id="$${__trace.traceId}"' in back["query"]
