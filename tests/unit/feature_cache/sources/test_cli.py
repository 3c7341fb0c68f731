"""The commands that feed the topic."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from feature_cache.sources.cli import app


def test_naming_the_commands_loads_no_client_of_brokers_or_exchanges() -> None:
    code = "import sys, feature_cache.sources.ingest_cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "feature_cache.sources.cli" in loaded
    assert not {"aiokafka", "httpx", "websockets", "numpy", "uvloop"}.intersection(loaded)


def test_an_instrument_that_was_not_recorded_is_refused_by_name(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "btcusdt_20240808.gz", "w"):
        pass
    wanted = ["--instruments", "BTCUSDT.BINANCE", "--instruments", "ETHUSDT.BINANCE"]
    ended = CliRunner().invoke(app, ["replay", str(tmp_path), *wanted], env={"COLUMNS": "200"})
    assert ended.exit_code == 2
    assert "no recording of ETHUSDT.BINANCE; there is BTCUSDT.BINANCE" in ended.output


def test_a_speed_that_is_none_is_refused(tmp_path: Path) -> None:
    for speed in ("0", "-1", "inf", "nan", "fast"):
        ended = CliRunner().invoke(app, ["replay", str(tmp_path), f"--speed={speed}"])
        assert (ended.exit_code, "positive number" in ended.output) == (2, True), ended.output


def test_files_that_say_of_which_venue_they_are_are_told_no_other(tmp_path: Path) -> None:
    wanted = ["replay", str(tmp_path), "--venue", "kraken", "--format", "tardis"]
    ended = CliRunner().invoke(app, wanted, env={"COLUMNS": "200"})
    assert (ended.exit_code, "tardis files say themselves" in ended.output) == (2, True), ended.output


def test_a_file_of_another_format_than_was_said_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "btcusdt_20240808.gz"
    path.write_bytes(b"")
    for given, said in (("tardis", "line 1"), ("lobster", "ticker and day"), ("recorder", "begins with the venue")):
        ended = CliRunner().invoke(app, ["replay", str(path), "--format", given], env={"COLUMNS": "400"})
        assert (ended.exit_code, said in ended.output, path.name in ended.output) == (2, True, True), ended.output
