"""`pretrade features` lists, shows and checks feature sets."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from feature_cache import feature_sets, logs
from feature_cache.features import MF1
from feature_cache.worker.cli import app

FILE = """
from feature_cache.feature_set import CALLER, Feature, FeatureSet
SPREAD = Feature("spread_bps", "bps", "Copied.", lowest=0.0, source="mf1")
FEATURE_SETS = [FeatureSet("mine", (SPREAD, Feature("urgency", "", "The caller's view.", 0.0, 1.0, source=CALLER)))]
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def features(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_list_names_every_set_and_where_it_was_found(file: Path) -> None:
    ended = features("list", "--file", file)
    assert ended.exit_code == 0
    assert MF1.version in ended.stdout
    (mine,) = [line for line in ended.stdout.splitlines() if "mine/" in line]
    assert "caller, mf1" in mine


def test_show_prints_unit_range_turning_source_and_meaning_of_each_feature() -> None:
    ended = features("show", "mf1")
    rows = {line.split()[1]: line for line in ended.stdout.splitlines() if line[:2].strip().isdigit()}
    assert list(rows) == list(MF1.names)
    assert "-1 to 1" in rows["imbalance_l5"]
    assert "negated" in rows["imbalance_l5"]
    assert "≥ 0" in rows["trade_rate_1s"]
    assert "swapped with depth_l5_notional_ask" in rows["depth_l5_notional_bid"]
    assert MF1.features[0].doc in rows["spread_bps"]


def test_brackets_in_a_users_words_are_printed_as_they_are(file: Path) -> None:
    file.write_text(FILE.replace('"The caller\'s view."', '"The caller\'s view, [raw] and [/final]."'))
    ended = features("show", "mine", "--file", file)
    assert (ended.exit_code, "view, [raw] and [/final]." in ended.stdout) == (0, True), ended.output


def test_show_says_which_sets_there_are_instead_of_one_that_is_not_known() -> None:
    ended = features("show", "mf9")
    assert (ended.exit_code, "'mf9' is no set known here: mf1" in ended.stderr) == (2, True)


def test_check_shows_the_sets_of_a_sound_file_and_names_what_is_wrong_with_another(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    ended = features("check", file)
    assert (ended.exit_code, "urgency" in ended.stdout) == (0, True), ended.stderr
    written_at = file.stat().st_mtime
    file.write_text(FILE.replace('source="mf1"', 'source="mf9"'))
    os.utime(file, (written_at, written_at))  # in the same second, and as long
    ended = features("check", file)
    assert (ended.exit_code, "mine.spread_bps" in ended.stderr) == (1, True)
    assert "its source 'mf9' is no set known here" in ended.stderr


def test_a_name_with_a_venue_is_watched(tmp_path: Path) -> None:
    ended = features("BTCUSDT.SIM", "--once", "--dir", tmp_path)
    assert (ended.exit_code, "No stack runs in" in ended.stderr) == (3, True)


COMPUTED = """
import time
import numpy as np
from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import ComputedSet
SET = FeatureSet("own", (Feature("trades", "", "Trades.", 0.0, 1e9), Feature("never", "", "Never.")))
class Own:
    def __init__(self, instrument):
        self.count = 0
    def on_event(self, event):
        self.count += event.WhichOneof("event") == "trade"
        {on_event}
    def values(self):
        {values}
        return np.array([self.count, np.nan], dtype=np.float32)
FEATURE_SETS = [ComputedSet(SET, Own)]
"""


def check(tmp_path: Path, on_event: str = "pass", values: str = "pass") -> Result:
    path = tmp_path / "own.py"
    path.write_text(COMPUTED.format(on_event=on_event, values=values))
    return features("check", path, "--seconds", "3")


def test_check_tries_a_computed_set_and_says_what_it_costs(tmp_path: Path) -> None:
    ended = check(tmp_path)
    assert ended.exit_code == 0, ended.output
    assert re.search(r"own/\w+: \d+ events of 3 s; an event takes [\d.]+ µs and a vector [\d.]+ µs", ended.stdout)
    assert "never defined in that time: never" in ended.stdout


@pytest.mark.parametrize(
    ("on_event", "values", "message"),
    [
        ("self.count -= 1", "pass", "trades is -1, not finite and from 0 to 1e+09"),
        ("1 / (self.count < 3)", "pass", "raised ZeroDivisionError('division by zero') after"),
        ("pass", "self.count = time.perf_counter_ns() % 1_000_003", "saw the same 5 events: a clock, a random number"),
        ("pass", "self.count += 1", "how often `values` is asked decides it"),
        ("event.event_time_ns += 1", "pass", "on_event changed the event, which others are shown too"),
        ("pass", "return np.zeros(3)", "values() has the shape (3,), not (2,)"),
    ],
)
def test_check_names_the_rule_that_a_computed_set_breaks(
    tmp_path: Path, on_event: str, values: str, message: str
) -> None:
    ended = check(tmp_path, on_event, values)
    assert (ended.exit_code, message in ended.stderr) == (1, True), ended.output


def test_check_takes_a_set_of_an_installed_package_or_of_a_file_by_its_id(file: Path) -> None:
    ended = features("check", "ta1", "--seconds", "3")
    assert ended.exit_code == 0, ended.output
    assert re.search(r"ta1/\w+: \d+ events of 3 s; an event takes", ended.stdout)
    ended = features("check", "mine", "--file", file)
    assert (ended.exit_code, "mine/" in ended.stdout, "urgency" in ended.stdout) == (0, True, True), ended.output
    ended = features("check", "mf9")
    assert (ended.exit_code, "'mf9' is no set known here: mf1" in ended.stderr) == (2, True)
    ended = features("check", file.with_suffix(".txt"))
    assert (ended.exit_code, "must be a Python file, and end with .py" in ended.stderr) == (1, True)
