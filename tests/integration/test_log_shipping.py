"""A real OpenTelemetry collector reads our log lines from the files of Docker and of a kubelet, and ships them to Loki.

It is no package of ours: `OTELCOL` names its program, or it is on the path. It is given our own configuration, but for
the pipelines of metrics and traces, the file of read positions and the health check: a build with the filelog receiver
and the otlphttp exporter is enough. Loki is a stand-in that takes what Loki takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from support.harness import eventually
from support.loki import Line, Loki

CONFIGURATION: Final = Path(__file__).parents[2] / "k8s" / "observability" / "otel" / "collector.yaml"
TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
DECISION: Final = {
    "event": "decision",
    "level": "warning",
    "component": "server",
    "timestamp": "2026-11-25T12:00:00.123456Z",
    "cause": "degraded",
    "decision_id": "01a2051f-c1a7-7003-b3fc-320084d24e7f",
    "correlation_id": "basket-7",
    "trace_id": TRACE,
    "order_ref": "ref-1",
    "strategy": "twap",
    "instrument": "BTCUSDT.SIM",
    "used_us": 1500,
    "reasons": ["REASON_CODE_FEATURES_MISSING"],
}
"""As `server/telemetry/decision_log.py` writes it; test_logs.py holds what a real server writes."""


@pytest.fixture
def program() -> str:
    found = os.environ.get("OTELCOL") or shutil.which("otelcol-contrib") or shutil.which("otelcol")
    if found is None:
        pytest.skip("needs an OpenTelemetry collector: name it by OTELCOL")
    return found


@contextmanager
def shipping(program: str, directory: Path, loki: Loki) -> Iterator[None]:
    """A collector that reads what is below a directory."""
    whole = yaml.safe_load(CONFIGURATION.read_text())
    del whole["receivers"]["filelog"]["storage"]
    part: dict[str, Any] = {
        "receivers": {"filelog": whole["receivers"]["filelog"]},
        "processors": {"memory_limiter": whole["processors"]["memory_limiter"]},
        "exporters": {"otlphttp/loki": whole["exporters"]["otlphttp/loki"]},
        "service": {
            "telemetry": {"metrics": {"level": "none"}},
            "pipelines": {"logs": whole["service"]["pipelines"]["logs"]},
        },
    }
    path = directory / "collector.yaml"
    path.write_text(yaml.safe_dump(part))
    environment = os.environ | {"LOG_ROOT": str(directory), "LOKI_ENDPOINT": loki.endpoint}
    with (directory / "collector.log").open("w") as log:
        process = subprocess.Popen([program, f"--config={path}"], env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)
    assert '"level":"error"' not in (directory / "collector.log").read_text()


class Docker:
    """The log file of a container, as Docker's driver `json-file` writes it."""

    def __init__(self, directory: Path, container: str, service: str | None) -> None:
        self._path = directory / "var/lib/docker/containers" / container / f"{container}-json.log"
        self._path.parent.mkdir(parents=True)
        self._attrs = {} if service is None else {"attrs": {"com.docker.compose.service": service}}

    def write(self, *lines: str) -> None:
        with self._path.open("a") as file:
            for line in lines:
                pieces = [f"{line}\n"[at : at + 16_384] for at in range(0, len(line) + 1, 16_384)]
                for piece in pieces:
                    said = {"log": piece, "stream": "stderr", **self._attrs, "time": "2026-11-25T12:00:01.5Z"}
                    file.write(f"{json.dumps(said)}\n")


def write_pod(directory: Path, namespace: str, container: str, lines: Sequence[str]) -> None:
    """The log file of a container, as containerd writes it for a kubelet."""
    folder = directory / f"var/log/pods/{namespace}_server-0_0a1b2c3d-0000-4000-8000-000000000000/{container}"
    folder.mkdir(parents=True)
    (folder / "0.log").write_text("".join(f"2026-11-25T12:00:01.5Z stderr F {line}\n" for line in lines))


def of(loki: Loki, service: str) -> list[Line]:
    return [line for line in list(loki.lines) if line.resource.get("service.name") == service]


def nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 10**9 + moment.microsecond * 1_000


def test_a_line_of_ours_is_found_by_its_service_its_trace_and_its_decision(program: str, tmp_path: Path) -> None:
    text = json.dumps(DECISION)
    with Loki() as loki, shipping(program, tmp_path, loki):
        Docker(tmp_path, "a1", "server").write(text)
        write_pod(tmp_path, "pretrade-dev", "worker", [text])
        write_pod(tmp_path, "billing", "invoices", ["somebody else's"])
        Docker(tmp_path, "b2", None).write("somebody else's")
        eventually(lambda: (of(loki, "server"), of(loki, "worker")), all)
        (line,), (same,) = of(loki, "server"), of(loki, "worker")
    assert loki.paths == {"/otlp/v1/logs"}
    for one in (line, same):
        assert one.text.rstrip("\n") == text, "the line stays as it was written"
        assert one.nanoseconds == nanoseconds(datetime(2026, 11, 25, 12, 0, 0, 123456, UTC))
        assert (one.severity, one.trace_id) == ("WARN", TRACE)
        kept = {"component", "event", "cause", "decision_id", "correlation_id", "strategy", "instrument"}
        assert one.attributes == {name: DECISION[name] for name in kept}
    assert same.resource["k8s.namespace.name"] == "pretrade-dev"
    assert len(loki.lines) == 2, "nobody else's lines are read"


def test_every_level_and_a_line_of_a_whole_second_is_understood(program: str, tmp_path: Path) -> None:
    levels = {"debug": "DEBUG", "info": "INFO", "warning": "WARN", "error": "ERROR", "critical": "FATAL"}
    said = [{"event": name, "level": name, "timestamp": "2026-11-25T12:00:00Z"} for name in levels]
    with Loki() as loki, shipping(program, tmp_path, loki):
        Docker(tmp_path, "a1", "server").write(*map(json.dumps, said))
        eventually(lambda: loki.lines, lambda found: len(found) == len(levels))
    assert {line.attributes["event"]: line.severity for line in loki.lines} == levels
    assert {line.nanoseconds for line in loki.lines} == {nanoseconds(datetime(2026, 11, 25, 12, tzinfo=UTC))}


def test_what_is_no_json_and_what_docker_cut_into_pieces_comes_whole(program: str, tmp_path: Path) -> None:
    """TorchServe and the databases write text; a traceback may be longer than Docker's 16 KiB."""
    traceback = json.dumps({**DECISION, "event": "decision failed", "exception": "x" * 40_000})
    with Loki() as loki, shipping(program, tmp_path, loki):
        Docker(tmp_path, "a1", "primary").write("12:00:01 INFO model loaded", "{no json")
        Docker(tmp_path, "c3", "server").write(traceback)
        eventually(loki.texts, lambda texts: len(texts) == 3)
    assert [line.text.rstrip("\n") for line in of(loki, "primary")] == ["12:00:01 INFO model loaded", "{no json"]
    (line,) = of(loki, "server")
    assert line.text.rstrip("\n") == traceback
    assert line.attributes["event"] == "decision failed"
    assert {one.nanoseconds for one in of(loki, "primary")} == {
        nanoseconds(datetime(2026, 11, 25, 12, 0, 1, 500_000, UTC))
    }


def test_a_loki_that_is_away_gets_every_line_when_it_is_back(program: str, tmp_path: Path) -> None:
    """The files are the buffer: nobody who writes a line waits, and none is lost or told twice."""
    wanted = [f"line {number:04}" for number in range(3_000)]
    with Loki() as loki, shipping(program, tmp_path, loki):
        loki.away.set()
        file = Docker(tmp_path, "a1", "server")
        file.write(*wanted[:2_000])
        eventually(lambda: loki.refused, lambda times: times > 1)
        file.write(*wanted[2_000:])
        assert loki.lines == []
        loki.away.clear()
        eventually(loki.texts, lambda texts: len(texts) >= len(wanted), 120.0)
    assert sorted(text.rstrip("\n") for text in loki.texts()) == wanted
