"""`pretrade bench` from end to end, on the simulated market."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.generators import h2load
from loadtest.generators.load import plan


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_benchmark_measures_both_edges_next_to_what_else_there_is(tmp_path: Path) -> None:
    directory, report, profile = tmp_path / "stack", tmp_path / "figures.json", tmp_path / "profile.txt"
    local = [sys.executable, "-m", "local"]
    argv = [*local, "bench", "--quick", "--seconds", "0.5", "--dir", str(directory), "--json", str(report)]
    argv += ["--profile", str(profile)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=380, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(report.read_text())
    wanted = plan(quick=True, rounds=None, seconds=0.5, deadline_seconds=0.2)
    by_load: dict[str, dict[str, Any]] = {each["load"]: {} for each in found["results"]}
    for each in found["results"]:
        by_load[each["load"]][each["server"]] = each
    edges, echoes = {"grpc.aio", "Envoy"}, {"echo grpc.aio", "echo Envoy"}
    assert set(by_load) == {load.name for load in (*wanted.closed, *wanted.opened)}
    assert all(edges <= set(servers) for servers in by_load.values())
    unary = by_load["unary, 64 callers"]
    assert echoes <= set(unary)
    if h2load.is_installed():
        assert {"TorchServe", "FastAPI"} <= set(unary)
        assert unary["TorchServe"]["errors"] == unary["FastAPI"]["errors"] == 0
        assert all(unary[edge]["to_torchserve"] > 0 for edge in edges)
    for edge in edges:
        one = unary[edge]
        assert one["decisions_per_second"] > 0
        assert one["to_echo"] == pytest.approx(
            one["decisions_per_second"] / unary[f"echo {edge}"]["decisions_per_second"]
        )
        assert 0 < one["p50_ms"] <= one["p99_ms"]
        assert one["cpu_us"] > 0
        assert one["memory_mebibytes"] > 50
    assert {each["server"] for each in found["warm_ups"]} == set(unary)
    for edge in ("grpcio", "envoy"):
        assert "server/" in profile.with_stem(f"profile-{edge}").read_text()
    compared = subprocess.run(
        [*local, "bench-compare", str(report), str(directory / "bench.json")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "1.00" in compared.stdout
