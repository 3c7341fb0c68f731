"""The scenarios of other load generators, run by the real programs against a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from loadtest.bench import echo_server
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

ROOT: Final = Path(__file__).parents[2]
RESPONSE: Final = pb.DecideResponse(decision=pb.Decision(action=pb.ACTION_TRADE, source=pb.SOURCE_PRIMARY))
PATIENCE_SECONDS: Final = 60.0


async def run(name: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs a program of the environment from the repository's root; returns its exit code and what it printed."""
    program = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if program is None:
        pytest.skip(f"{name} is not installed")
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        cwd=ROOT,
        env=os.environ | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode()


async def k6(target: str, summary: Path, deadline_ms: str) -> tuple[int, str]:
    quiet = ("--no-usage-report", "--address", "", "--summary-export", str(summary))
    settings = {"TARGET": target, "RATE": "50", "DURATION": "2s", "DEADLINE_MS": deadline_ms}
    return await run(
        "k6", "run", *quiet, "loadtest/k6/decide.js", *(f"--env={name}={value}" for name, value in settings.items())
    )


async def test_k6_sends_orders_at_the_rate_and_checks_every_decision(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    async with echo_server(RESPONSE) as target:
        code, output = await k6(target, summary, deadline_ms="10000")
    assert code == 0, output
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["iterations"]["count"] == pytest.approx(100, abs=2)
    assert metrics["decisions"]["count"] == metrics["iterations"]["count"]
    assert metrics["decisions{source:SOURCE_PRIMARY}"]["count"] == metrics["decisions"]["count"]
    assert metrics["checks"]["fails"] == 0
    assert metrics["checks"]["passes"] == 2 * metrics["iterations"]["count"]


@pytest.mark.long
async def test_k6_fails_when_orders_get_no_decision(tmp_path: Path) -> None:
    """No server meets a deadline of a microsecond, and nothing listens on port 1."""
    async with echo_server(RESPONSE) as target:
        code, output = await k6(target, tmp_path / "late.json", deadline_ms="0.001")
    assert code == 99, output  # k6's exit code for crossed thresholds
    code, output = await k6("127.0.0.1:1", tmp_path / "nobody.json", deadline_ms="10000")
    assert code == 99, output


async def locust(target: str, csv: Path, deadline_ms: str) -> tuple[int, str]:
    options = ("--headless", "--users", "3", "--spawn-rate", "3", "--run-time", "3s", "--csv", str(csv))
    # Locust may live in another environment than the package.
    path = os.pathsep.join((str(ROOT), str(ROOT / "proto" / "gen")))
    return await run(
        "locust",
        "-f",
        "loadtest/locustfile.py",
        *options,
        "--host",
        target,
        PYTHONPATH=path,
        DEADLINE_MS=deadline_ms,
    )


async def test_locust_reports_decisions_under_their_source(tmp_path: Path) -> None:
    async with echo_server(RESPONSE) as target:
        code, output = await locust(target, tmp_path / "fine", deadline_ms="10000")
    assert code == 0, output
    stats = (tmp_path / "fine_stats.csv").read_text().splitlines()
    (decided,) = [line for line in stats if line.startswith("gRPC,")]
    method, name, requests, failures = decided.split(",")[:4]
    assert (method, name, failures) == ("gRPC", "Decide from PRIMARY", "0")
    assert int(requests) > 0


async def test_locust_fails_when_orders_get_no_decision(tmp_path: Path) -> None:
    async with echo_server(RESPONSE) as target:
        code, output = await locust(target, tmp_path / "late", deadline_ms="0.001")
    assert code == 1, output
    assert "DEADLINE_EXCEEDED" in (tmp_path / "late_failures.csv").read_text()
