"""The table of faults: what was done, what was expected, what was seen.

A test of a fault carries `@pytest.mark.fault(id, fault, expected)` and tells what it measured through the fixture
`seen`; whatever part of the matrix ran, pytest ends with its table. `make faults` runs all of it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Final

import pytest

_WIDTHS: Final = (34, 46, 46)


@dataclass
class _Row:
    identifier: str
    fault: str
    expected: str
    seen: list[str] = field(default_factory=list)
    outcome: str = "not run"


_ROWS: Final = pytest.StashKey[list[_Row]]()
_ROW: Final = pytest.StashKey[_Row]()


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a measured fact to the test's row: what an engineer on call would want to read next to what was expected."""
    row: _Row | None = request.node.stash.get(_ROW, None)
    assert row is not None, "the test carries no @pytest.mark.fault"
    return row.seen.append


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("fault"):
        item.stash[_ROW] = _Row(*marker.args)
        item.config.stash[_ROWS].append(item.stash[_ROW])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    row = item.stash.get(_ROW, None)
    if row is not None and (report.when == "call" or report.outcome != "passed"):
        row.outcome = report.outcome
        if report.failed and report.longrepr is not None:
            row.seen.append(str(getattr(report.longrepr, "reprcrash", report.longrepr)))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    rows.sort(key=lambda row: (row.identifier[0], int(row.identifier[1:]), row.fault))
    terminalreporter.section("faults")
    line = "{:<4} {:<{}}  {:<{}}  {:<{}}  {}".format
    terminalreporter.write_line(line("#", "fault", _WIDTHS[0], "expected", _WIDTHS[1], "seen", _WIDTHS[2], "verdict"))
    for row in rows:
        columns = (row.fault, row.expected, "; ".join(row.seen) or "as expected")
        wrapped = [textwrap.wrap(text, width) for text, width in zip(columns, _WIDTHS, strict=True)]
        for i in range(max(map(len, wrapped))):
            cells = [lines[i] if i < len(lines) else "" for lines in wrapped]
            head, verdict = (row.identifier, row.outcome) if i == 0 else ("", "")
            padded = [item for pair in zip(cells, _WIDTHS, strict=True) for item in pair]
            terminalreporter.write_line(line(head, *padded, verdict).rstrip())
