"""`make demo`, as a user would run it, on the recorded session where it is there."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.figures import Figure

pytestmark = pytest.mark.stack

RECORDED = Path(__file__).parents[3] / "shared/data/binance_spot"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "data",
    [
        None,
        pytest.param(
            RECORDED,
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not RECORDED.exists(), reason="the recorded sessions are not there"),
            ],
        ),
    ],
    ids=["simulated", "recorded"],
)
def test_the_demo_decides_and_audits_every_order_through_a_replica_failure(
    tmp_path: Path, data: Path | None, model_store: Path, figure: Figure
) -> None:
    summary_path = tmp_path / "summary.json"
    argv = [sys.executable, "-m", "local", "demo", "--duration", "8"]
    argv += ["--dir", str(tmp_path / "stack"), "--json", str(summary_path), "--svg", str(tmp_path / "demo.svg")]
    # Training on an hour of simulated market takes minutes on a busy machine; that of a recording is a test of its own.
    made = {} if data is not None else {"PRETRADE_LOCAL_MODEL_STORE": str(model_store)}
    if data is not None:
        argv += ["--data", str(data)]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, **made})
    assert summary_path.exists(), run.stdout + run.stderr
    summary = json.loads(summary_path.read_text())
    picture = html.unescape((tmp_path / "demo.svg").read_text()).replace("\xa0", " ")
    assert "was killed with SIGKILL" in picture
    assert f"{summary['audit_rows']:,}" in picture
    assert {
        "decisions",
        "answered_in_deadline",
        "p50_ms",
        "p99_ms",
        "p999_ms",
        "by_source",
        "audit_rows",
        "feature_age_p99_ms",
        "events_consumed",
    } <= set(summary)
    assert summary["orders"] > 500
    assert summary["decisions"] + sum(summary["errors"].values()) == summary["orders"]
    assert summary["audit_rows"] == summary["decisions"]
    all_decided = summary["decisions"] == summary["orders"]
    assert run.returncode == (0 if all_decided else 1), run.stdout + run.stderr
    assert ("got no decision in 200 ms" in run.stdout) != all_decided
    figure(all_decided, f"every order of the demo is decided in 200 ms: {summary['decisions']} of {summary['orders']}")
    figure({"PRIMARY", "SECONDARY"} <= summary["by_source"].keys(), "both champions answer orders of the demo")
    assert summary["events_consumed"] > 0
    assert ("simulated" in run.stdout) == (data is None)
    assert "redis_followed" not in run.stdout + run.stderr, "a log line among what is for people"
    news = [line for line in run.stdout.splitlines() if "orders decided" in line]
    assert news
    assert len(set(news)) == len(news), "a line that says nothing new"
