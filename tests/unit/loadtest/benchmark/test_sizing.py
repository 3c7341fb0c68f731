"""The tables of docs/: made from a kept run, that of sizing from loads in which every order got a decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest.benchmark.sizing import PAGES, last_kept, table, written


def result(load: str, per_second: float, **others: Any) -> dict[str, Any]:
    values = {"server": "Envoy", "kind": "pretrade", "errors": 0, "offered_per_second": None, "cpu_us": 500.0}
    values |= {"p50_ms": 4.0, "p99_ms": 20.0, "memory_mebibytes": 400.0}
    return values | {"load": load, "decisions_per_second": per_second} | others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_table_of_the_run_that_was_kept_last(page: Path) -> None:
    assert page.read_text() == written(page, last_kept()), "run `make sizing`"


def test_a_load_with_errors_says_nothing_of_what_a_server_can_take() -> None:
    lines = list(
        table(
            {
                "results": [
                    result("unary, 16 callers", 900.0),
                    result("unary, 64 callers", 2_000.0, errors=7),
                    result("unary, 200/s", 200.0, offered_per_second=200.0),
                    result("unary, at 50%", 990.0, offered_per_second=1_000.0, errors=1),
                    result("unary, 64 callers", 9_000.0, server="echo Envoy", kind="echo"),
                    result("batch, 4 × 64", 4_000.0, errors=64),
                ]
            }
        )
    )
    assert lines[2:] == [
        "| Envoy | `Decide` | 900 | 200/s | 4.0 | 20.0 | 500 | 0.10 | 400 |\n",
        "| Envoy | `DecideStream` | – | – | – | – | – | – | – |\n",
        "| Envoy | `DecideBatch` | – | – | – | – | – | – | – |\n",
    ]
