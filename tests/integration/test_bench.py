"""`pretrade bench` from end to end, on the simulated market."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.benchmark.targets import EMBEDDED, EMBEDDED_OS, ENVOY, GRPC_AIO
from loadtest.generators import h2load
from local.bench.phases import ECHO_ENVOY, ECHO_GRPC_AIO, FASTAPI, TORCHSERVE, phases


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_benchmark_measures_every_server_next_to_what_else_there_is(tmp_path: Path) -> None:
    directory, report, profile = tmp_path / "stack", tmp_path / "figures.json", tmp_path / "profile.txt"
    local = [sys.executable, "-m", "local"]
    argv = [*local, "bench", "--quick", "--seconds", "0.5", "--dir", str(directory), "--json", str(report)]
    argv += ["--profile", str(profile)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=580, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    (phase,) = phases(quick=True, rounds=None, seconds=0.5, deadline_seconds=0.2)
    by_load: dict[str, dict[str, Any]] = {each["load"]: {} for each in found["results"]}
    for each in found["results"]:
        by_load[each["load"]][each["server"]] = each
    assert set(by_load) == {load.name for load in (*phase.plan.closed, *phase.plan.opened)}
    many, lone = by_load["unary, 64 callers"], by_load["unary, 1 caller"]
    pairs = {ENVOY: ECHO_ENVOY, EMBEDDED: ECHO_ENVOY, GRPC_AIO: ECHO_GRPC_AIO}
    assert {*pairs, *pairs.values()} <= set(many)
    if h2load.is_installed():
        assert {TORCHSERVE, FASTAPI} <= set(many)
        assert many[TORCHSERVE]["errors"] == many[FASTAPI]["errors"] == 0
        assert all(many[server]["to_torchserve"] > 0 and many[server]["to_fastapi"] > 0 for server in pairs)
    for server, echo in pairs.items():
        one = many[server]
        assert one["decisions_per_second"] > 0
        assert one["to_echo"] == pytest.approx(one["decisions_per_second"] / many[echo]["decisions_per_second"])
        assert 0 < one["p50_ms"] <= one["p99_ms"]
        assert one["cpu_us"] > 0
        assert one["memory_mebibytes"] > 50
    assert {ENVOY, EMBEDDED, EMBEDDED_OS} <= set(lone)
    assert {each["server"] for each in found["warm_ups"]} == set(phase.servers)
    for server in (ENVOY, EMBEDDED):
        used = found["cpu"][server]
        assert 0 < used["event loop"] < used["deciding"] < used["all"]
        assert used["shipping"] > 0
        assert "server/" in profile.with_stem(f"profile-{server.replace(' ', '-')}").read_text()
    assert "targets are met" in ended.stdout
    compared = subprocess.run(
        [*local, "bench-compare", str(report), str(directory / "bench.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "1.00" in compared.stdout
