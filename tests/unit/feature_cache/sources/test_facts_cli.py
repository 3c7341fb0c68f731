from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from feature_cache.sources.facts_cli import app
from feature_cache.sources.market_facts import FACTS


def run(*arguments: str, columns: int = 80) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})
    return result.exit_code, result.output


def test_every_statistic_is_a_row_of_80_columns_that_says_whether_it_is_met() -> None:
    code, output = run("--seeds", "2", "--seconds", "60")
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    for fact in FACTS:
        (row,) = (line for line in output.splitlines() if line.startswith(f"{fact.name} "))
        assert ("met" in row) != ("missed" in row)
    assert f"of {len(FACTS)} met by the median of 2 sessions" in output


def test_a_picture_of_no_recording_is_refused() -> None:
    code, output = run("--svg", "facts.svg")
    assert code == 2
    assert "give --data" in output


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    code, output = run("--data", str(tmp_path / "none"), columns=300)
    assert code == 2
    assert "no such file or folder" in output
