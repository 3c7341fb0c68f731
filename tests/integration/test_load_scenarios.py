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

from loadtest.benchmark.echo import echo_server
from loadtest.generators import h2load
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

ROOT: Final = Path(__file__).parents[2]
RESPONSE: Final = pb.DecideResponse(decision=pb.Decision(action=pb.ACTION_TRADE, source=pb.SOURCE_PRIMARY))
PATIENCE_SECONDS: Final = 60.0


async def run(name: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs a program of the environment from the repository's root; returns its exit code and what it printed."""
    program = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if program is None:
        pytest.skip(f"needs {name}")
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


async def k6(script: str, summary: Path, **settings: str) -> tuple[int, str]:
    """Runs one of the k6 scenarios for two seconds, with a deadline that any machine meets unless told otherwise."""
    quiet = ("--no-usage-report", "--address", "", "--summary-export", str(summary))
    given = {"RATE": "50", "DURATION": "2s", "DEADLINE_MS": "10000", "WARM_UP": "0"} | settings
    return await run("k6", "run", *quiet, f"loadtest/k6/{script}", *(f"--env={key}={given[key]}" for key in given))


def metrics_in(summary: Path) -> dict[str, dict[str, float]]:
    metrics: dict[str, dict[str, float]] = json.loads(summary.read_text())["metrics"]
    return metrics


async def test_k6_sends_orders_at_the_rate_and_checks_every_decision(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    async with echo_server(RESPONSE) as target:
        code, output = await k6("decide.js", summary, TARGET=target)
    assert code == 0, output
    metrics = metrics_in(summary)
    assert metrics["iterations"]["count"] == pytest.approx(100, abs=2)
    assert metrics["decisions"]["count"] == metrics["iterations"]["count"]
    assert metrics["decisions{source:SOURCE_PRIMARY}"]["count"] == metrics["decisions"]["count"]
    assert metrics["checks"]["fails"] == 0
    assert metrics["checks"]["passes"] == metrics["iterations"]["count"]


@pytest.mark.long
@pytest.mark.parametrize("script", ["batch.js", "stream.js"])
async def test_k6_counts_every_order_of_baskets_and_streams(script: str, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    async with echo_server(RESPONSE) as target:
        code, output = await k6(script, summary, TARGET=target, RATE="200", BATCH="10", STREAMS="2", DURATION="4s")
    assert code == 0, output
    metrics = metrics_in(summary)
    assert metrics["decisions"]["count"] == pytest.approx(800, abs=10)  # the first call of a rate leaves at once
    assert metrics["checks"]["passes"] == metrics["decisions"]["count"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("profile", "phases"),
    [
        ("ramp", {"at_20": 40, "at_40": 80}),
        ("burst", {"before": 80, "open": 280, "after": 80}),
        ("failure", {"before": 80, "during": 80, "after": 80}),
    ],
)
async def test_k6_tells_the_phases_of_a_scenario_apart(profile: str, phases: dict[str, int], tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    settings = {"PROFILE": profile, "RATE": "40", "STEPS": "2", "TIMES": "5", "WARM_UP": "1"}
    settings["DURATION"] = "4s" if profile == "ramp" else "6s"
    async with echo_server(RESPONSE) as target:
        code, output = await k6("decide.js", summary, TARGET=target, **settings)
    assert code == 0, output
    metrics = metrics_in(summary)
    for phase, orders in phases.items():
        counted = metrics[f"checks{{scenario:{phase}}}"]
        assert counted["fails"] == 0
        assert counted["passes"] == pytest.approx(orders, rel=0.1, abs=4)
    if profile == "failure":
        assert "now take primary away for 2 s" in output


@pytest.mark.long
async def test_k6_fails_when_orders_get_no_decision(tmp_path: Path) -> None:
    """No server meets a deadline of a microsecond, and nothing listens on port 1."""
    late = tmp_path / "late.json"
    async with echo_server(RESPONSE) as target:
        code, output = await k6("decide.js", late, TARGET=target, DEADLINE_MS="0.001")
    assert code == 99, output  # k6's exit code for crossed thresholds
    metrics = metrics_in(late)
    assert metrics["failures{status:DeadlineExceeded}"]["count"] == metrics["failures"]["count"] > 0
    code, output = await k6("decide.js", tmp_path / "nobody.json", TARGET="127.0.0.1:1")
    assert code == 99, output


ENOUGH = """
import gevent
from locust import events

answers = []

@events.init.add_listener
def listen(environment, **_):
    @environment.events.request.add_listener
    def count(**answer):
        answers.append(answer)
        if len(answers) == 20:
            gevent.spawn(environment.runner.quit)
"""
"""Ends a run after twenty answers: in three seconds a busy machine may not have sent one order."""


async def locust(target: str, directory: Path, deadline_ms: str, *more: str) -> tuple[int, str]:
    """Runs it until it has its answers."""
    enough = directory / "enough.py"
    enough.write_text(ENOUGH)
    options = ("--headless", "--users", "3", "--spawn-rate", "3", "--run-time", "50s", *more)
    # Locust may live in another environment than the package.
    path = os.pathsep.join((str(ROOT), str(ROOT / "proto" / "gen")))
    return await run(
        "locust",
        "-f",
        f"loadtest/locust/locustfile.py,{enough}",
        *options,
        "--host",
        target,
        PYTHONPATH=path,
        DEADLINE_MS=deadline_ms,
    )


async def test_locust_reports_decisions_under_their_source(tmp_path: Path) -> None:
    async with echo_server(RESPONSE) as target:
        code, output = await locust(target, tmp_path, "10000", "--json-file", str(tmp_path / "fine"))
    assert code == 0, output
    (decided,) = json.loads((tmp_path / "fine.json").read_text())
    assert (decided["method"], decided["name"]) == ("gRPC", "Decide from PRIMARY")
    assert (decided["num_requests"] >= 20, decided["num_failures"]) == (True, 0)


async def test_locust_fails_when_orders_get_no_decision(tmp_path: Path) -> None:
    async with echo_server(RESPONSE) as target:
        code, output = await locust(target, tmp_path, "0.001")
    assert code == 1, output
    assert "DEADLINE_EXCEEDED" in output


@pytest.mark.long
async def test_locust_opens_a_market_and_calms_down(tmp_path: Path) -> None:
    settings = {"PHASE_SECONDS": "2", "QUIET_USERS": "1", "TIMES": "4", "DEADLINE_MS": "10000"}
    files = "loadtest/locust/locustfile.py,loadtest/locust/market_open.py"
    path = os.pathsep.join((str(ROOT), str(ROOT / "proto" / "gen")))
    async with echo_server(RESPONSE) as target:
        code, output = await run(
            *("locust", "-f", files, "--headless", "--host", target, "--csv", str(tmp_path / "open")),
            PYTHONPATH=path,
            **settings,
        )
    assert code == 0, output
    history = (tmp_path / "open_stats_history.csv").read_text().splitlines()[1:]
    users = [int(line.split(",")[1]) for line in history if line.split(",")[3] == "Aggregated"]
    assert max(users) == 4
    assert users[-1] <= 1


@pytest.mark.skipif(not h2load.is_installed(), reason="needs h2load (Debian: nghttp2-client)")
async def test_h2load_sends_a_body_that_a_server_understands() -> None:
    """`loadtest/h2load.sh` without a server to ask for its count."""
    async with echo_server(RESPONSE) as target:
        code, output = await run("sh", "loadtest/h2load.sh", target, "4", "1", PYTHON=sys.executable)
    assert code == 0, output
    assert " 0 failed, 0 errored" in output
    assert "status codes: 0 2xx" not in output
