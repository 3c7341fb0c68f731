"""`pretrade capacity` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.capacity import Demand, plan
from loadtest.costs import Costs
from local.cli import app

RUNNER = CliRunner()


def test_a_plan_is_shown_and_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = ["capacity", "--rate", "5000", "--deadline-ms", "100", "--cores", "16", "--events", "10000"]
    result = RUNNER.invoke(app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    expected = plan(Costs.read(), Demand(rate=5_000, deadline_ms=100, cores=16, events=10_000))
    written = json.loads(path.read_text())
    assert written["plan"]["processes"] == expected.processes
    assert written["plan"]["load"]["p99_ms"] == expected.load.p99_ms
    assert f"p99 {expected.load.p99_ms:.1f} ms" in result.output
    assert "feature workers" in result.output


def test_what_no_machines_can_do_is_said() -> None:
    result = RUNNER.invoke(app, ["capacity", "--rate", "5000", "--deadline-ms", "1", "--cores", "16"])
    assert result.exit_code == 1
    assert "no number of such machines does it" in result.output


def test_costs_of_ones_own_are_taken(tmp_path: Path) -> None:
    costs = Costs.read()
    dear = costs.model_copy(update={"server": costs.server.model_copy(update={"row_us": 50_000.0})})
    dear.write(tmp_path / "costs.toml", "a dear machine")
    arguments = ["capacity", "--rate", "1000", "--deadline-ms", "200", "--cores", "16"]
    assert (
        RUNNER.invoke(app, arguments).output
        != RUNNER.invoke(app, [*arguments, "--costs", str(tmp_path / "costs.toml")]).output
    )


@pytest.mark.parametrize("text", ["", "[replica]\nbatch_ms = 1\n", "no toml"])
def test_a_file_that_holds_no_costs_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    result = RUNNER.invoke(app, ["capacity", "--rate", "1000", "--costs", str(path)])
    assert result.exit_code == 2
    assert "--costs" in result.output
