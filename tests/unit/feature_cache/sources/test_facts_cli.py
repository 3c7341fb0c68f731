from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from feature_cache.sources.facts_cli import app
from feature_cache.sources.market_facts import FACTS


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_every_statistic_is_a_row_that_says_whether_it_is_met() -> None:
    code, output = run("--seeds", "2", "--seconds", "60")
    assert code == 0
    for fact in FACTS:
        (row,) = (line for line in output.splitlines() if f" {fact.name} " in line)
        assert ("met" in row) != ("missed" in row)
    assert f"of {len(FACTS)} met by the median of 2 sessions" in output


def test_a_picture_of_no_recording_is_refused() -> None:
    code, output = run("--svg", "facts.svg")
    assert code == 2
    assert "give --data" in output


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, output = run("--data", str(tmp_path / "none"))
    assert code == 2
    assert "no such file or folder" in output
