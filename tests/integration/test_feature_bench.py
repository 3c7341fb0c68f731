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
        [*argv, "--seconds", "5", "--rate", "500"], capture_output=True, text=True, timeout=380, check=False
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(report.read_text())
    assert {step["name"] for step in figures["steps"]["simulated"]} >= {"parse", "features and encode"}
    (throughput,) = figures["throughput"]
    assert throughput["events"] > 10_000
    assert throughput["worker_cpu_seconds"] > 0
    assert figures["freshness"]["events"] > 1_000
    assert 0 < figures["freshness"]["median_ms"] <= figures["freshness"]["p99_ms"]
