"""The server that `bench-costs` compares with counts nothing, of orders alone and of those in columns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local.bench.observing import uncounted

_COUNTED = """
import asyncio, sys
from pathlib import Path
from support.both_ways import Asked, Circumstances, decided, least_in_block
with least_in_block(4):
    for way in ("columns", "alone"):
        counted = decided(way, [Asked()] * 8, Circumstances(), together=True).counted
        print("COUNTED", sum(counted["decisions"].values()), counted["latency"][1], sum(counted["reasons"].values()))
"""


@pytest.mark.parametrize("counts", [True, False], ids=["everything", "unobserved"])
def test_an_unobserved_server_counts_nothing(counts: bool, tmp_path: Path) -> None:
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[3])])
    env = {**os.environ, "PYTHONPATH": path}
    if not counts:
        env["PYTHONPATH"] = os.pathsep.join([uncounted(tmp_path)["PYTHONPATH"], path])
    done = subprocess.run([sys.executable, "-c", _COUNTED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("COUNTED")]
    assert found == [(8.0, 8.0, 8.0) if counts else (0.0, 0.0, 0.0)] * 2
