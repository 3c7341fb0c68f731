"""What a run says of each figure that is wanted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from loadtest.benchmark.targets import (
    ALL_PARTS,
    EMBEDDED,
    ENVOY,
    TARGETS,
    Target,
    verdict_lines,
    verdict_table,
    verdicts,
)
from loadtest.generators.load import Load

MANY = Load("unary", callers=64).name
P99 = Target("p99", ENVOY, MANY, "p99_ms", most=15)
REFUSED = Target("refused", ENVOY, MANY, "error_share", most=0.01)
LEAST = Target("decisions/s", ENVOY, MANY, "decisions_per_second", least=8_000)


def run(*, errors: int = 0, cpu: float = 200.0, **figures: float) -> dict[str, Any]:
    values = {"decisions_per_second": 8_000.0, "p99_ms": 15.0, "decisions": 1_000, "errors": errors}
    return {
        "results": [{"server": ENVOY, "load": MANY, **values, **figures}],
        "cpu": {ENVOY: {ALL_PARTS: cpu}},
        "commit": "abc",
    }


@pytest.mark.parametrize(
    ("target", "figures", "met"),
    [
        (LEAST, {}, True),
        (LEAST, {"decisions_per_second": 7_999.0}, False),
        (P99, {}, True),
        (P99, {"p99_ms": 15.1}, False),
        (P99, {"errors": 11}, False),  # refusals are quick
        (REFUSED, {"errors": 10}, True),
        (REFUSED, {"errors": 30}, False),
        (Target("CPU", ENVOY, "CPU", ALL_PARTS, most=180), {}, False),
        (Target("CPU", ENVOY, "CPU", ALL_PARTS, most=180), {"cpu": 180.0}, True),
        (Target("CPU", EMBEDDED, "CPU", ALL_PARTS, most=180), {}, None),
        (Target("p99", EMBEDDED, MANY, "p99_ms", most=15), {}, None),
    ],
)
def test_a_target_is_met_or_missed_or_nobody_can_tell(target: Target, figures: Any, met: bool | None) -> None:
    (verdict,) = verdicts(run(**figures), [target])
    assert verdict.met is met


def test_a_figure_that_counts_for_nothing_says_why() -> None:
    (verdict,) = verdicts(run(errors=1_000), [P99])
    assert (verdict.shown, P99.wanted) == ("15.0 ms, 50.0% got no decision", "≤ 15.0 ms")


def test_every_target_has_a_row_of_its_own() -> None:
    assert len({(each.server, each.load, each.figure) for each in TARGETS}) == len(TARGETS)
    lines = list(verdict_lines(run()))
    text = "".join(lines)
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| server ")]
    assert len(rows) == len(TARGETS)
    met, missed, unknown = text.index("**Met: "), text.index("**Missed: "), text.index("**Not measured: ")
    assert met < text.index(f"| {ENVOY} | 64 callers: decisions/s | ≥ 8,000 | 8,000 |\n") < missed < unknown
    assert all(line.endswith("| – |\n") for line in text[unknown:].splitlines(keepends=True)[4:] if line.strip())


def test_the_table_of_targets_fits_into_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(verdict_table(verdicts(run(errors=30))))
    shown = console.export_text()
    assert "…" not in shown
    assert "targets are met" in shown
    assert all(shown.count(each.name) for each in TARGETS)
