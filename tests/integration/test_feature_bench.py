"""`pretrade bench-features` from end to end, on the simulated market."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.stack
@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_feature_benchmark_measures_steps_throughput_and_freshness(tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    argv = [sys.executable, "-m", "local", "bench-features", "--dir", str(tmp_path / "stack"), "--json", str(report)]
    ended = subprocess.run(
        [*argv, "--seconds", "3", "--rounds", "2", "--rate", "500"],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(report.read_text())
    assert {step["name"] for step in figures["steps"]["simulated"]} >= {"parse", "features and encode"}
    (throughput,) = figures["throughput"]
    assert throughput["events"] > 10_000
    assert throughput["worker_cpu_seconds"] > 0
    assert len(figures["freshness"]) == 2
    for one in figures["freshness"]:
        assert one["events"] > 500
        for step in ("acknowledged", "read", "written", "copied"):
            assert 0 < one[step]["median_ms"] <= one[step]["p99_ms"]
        assert one["acknowledged"]["median_ms"] < one["copied"]["median_ms"] <= one["worst_ms"]
