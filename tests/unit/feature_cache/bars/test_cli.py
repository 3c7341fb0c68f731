from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.cli import VARIABLE, app
from feature_cache.bars.store import BarStore

NAME: Final = "BTCUSDT.TEST"


def bar(second: int, trades: int = 2, lacks: Lacks = Lacks.NOTHING) -> Bar:
    price = 10_000 + second if trades else None
    return Bar(
        instrument=NAME,
        start_ns=(1_700_000_100 + second) * SECOND_NS,
        width_ns=SECOND_NS,
        price_decimals=2,
        size_decimals=3,
        open=price,
        high=price and price + 5,
        low=price and price - 5,
        close=price and price + 1,
        trades=trades,
        bought=trades,
        sold=0,
        lots=trades,
        notional=trades * (price or 0),
        mid_open=20_000,
        mid_high=20_000,
        mid_low=20_000,
        mid_close=20_000,
        lacks=lacks,
    )


@pytest.fixture
def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'bars.db'}"
    store = BarStore(url)
    store.prepare()
    store.write([bar(0, lacks=Lacks.BEGINNING), bar(1), bar(2, trades=0), bar(3)])
    store.close()
    return url


def run(*arguments: str, database: str = "") -> tuple[int, str]:
    given = ["--database", database] if database else []
    result = CliRunner().invoke(app, [*arguments, *given], env={VARIABLE: ""})
    return result.exit_code, result.output


def test_the_last_bars_are_a_table_that_says_what_a_bar_lacks(database: str) -> None:
    code, output = run(NAME, "--interval", "1s", "--last", "4", database=database)
    assert code == 0
    lines = output.splitlines()
    assert "2023-11-14 22:15:00" in lines[1]
    assert "beginning" in lines[1]
    assert "100.01" in lines[2]
    assert lines[3].split()[2:] == ["0", "0", "0", "0", "100"]


def test_as_json_every_bar_is_a_line(database: str) -> None:
    code, output = run(NAME, "--interval", "1s", "--last", "2", "--json", database=database)
    assert code == 0
    quiet, last = map(json.loads, output.splitlines())
    assert (quiet["trades"], quiet["close"]) == (0, None)
    assert (last["start"], last["close"], last["lacks"]) == ("2023-11-14T22:15:03+00:00", 100.04, "")


def test_the_tail_prints_each_bar_once_as_it_comes(database: str) -> None:
    """The command by itself, since it goes on for ever."""
    command = [sys.executable, "-c", "from feature_cache.bars.cli import app; app()"]
    command += [NAME, "--interval", "1s", "--last", "2", "--json", "--tail", "--database", database]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as tail:
        assert tail.stdout is not None
        try:
            seen = [json.loads(tail.stdout.readline())["start"] for _ in range(2)]
            store = BarStore(database)
            store.write([bar(3), bar(4), bar(5), bar(6)])  # more at once than the command began with
            store.close()
            seen += [json.loads(tail.stdout.readline())["start"] for _ in range(3)]
        finally:
            tail.kill()
    assert [start[17:19] for start in seen] == ["02", "03", "04", "05", "06"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_chart_is_a_picture(database: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bars.{suffix}"
    code, output = run(NAME, "--interval", "1s", "--chart", str(path), database=database)
    assert (code, output) == (0, f"4 bars in {path}\n")
    assert path.read_bytes()[:5] in {b"<?xml", b"\x89PNG\r"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("NONE.TEST", "--interval", "1s"), 1, "There are no bars of NONE.TEST. Instruments with bars: BTCUSDT.TEST"),
        ((NAME, "--interval", "2s"), 2, "must be one of 1s, 10s, 1m, 5m"),
        ((NAME, "--interval", "1s", "--chart", "bars.pdf"), 2, "must end with .svg or .png"),
    ],
)
def test_what_cannot_be_shown_is_an_error_that_says_why(
    database: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, output = run(*arguments, database=database)
    assert found == code
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("", 3, f"If a server runs elsewhere: --database URL, or {VARIABLE}"),
        ("mysql://host/name", 2, "must begin with sqlite://"),
        ("postgresql+psycopg://nobody@127.0.0.1:1/none", 3, "The database of bars cannot be used:"),
    ],
)
def test_without_a_database_the_error_says_what_to_do(url: str, code: int, message: str, tmp_path: Path) -> None:
    found, output = run(NAME, "--dir", str(tmp_path), database=url)
    assert found == code
    assert message in " ".join(output.replace("│", " ").split())


def test_bars_of_another_interval_are_not_shown(database: str) -> None:
    store = BarStore(database)
    store.write([replace(bar(0), width_ns=10 * SECOND_NS)])
    store.close()
    code, output = run(NAME, "--json", database=database)
    assert code == 0
    assert [json.loads(line)["interval"] for line in output.splitlines()] == ["10s"]
