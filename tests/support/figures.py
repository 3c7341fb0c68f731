"""Claims about time: asserted only in a run that measures them, and reported in every other run.

A test asserts what holds whatever else the machine does: which source answers, with what, what is counted, what
remains. How fast that is depends on what else uses the cores. So a test hands such a figure to the fixture `figure`. A
run with `--figures` (`make bench-faults`) picks the tests that do, makes sure that the machine is otherwise idle, and
asserts what is claimed. Every other run reports the figures that were missed, and fails none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psutil
import pytest

Figure = Callable[[bool, str], None]
_FIXTURE: Final = "figure"
_MISSED: Final = "missed"
_QUIET_SHARE: Final = 0.1
"""Of all cores: what may be busy before the first test of a run that measures."""
_LOOK_SECONDS: Final = 3.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="run the tests that measure time, and assert their figures")


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Holds a measured figure to its claim: `figure(p99 <= 25, "p99 within 25 ms")`."""

    def hold(held: bool, claim: str) -> None:
        if request.config.getoption("figures"):
            assert held, claim
        elif not held:
            request.node.user_properties.append((_MISSED, claim))

    return hold


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("figures"):
        measuring = [item for item in items if _FIXTURE in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in measuring])
        items[:] = measuring


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("figures"):
        busy = busy_share(_LOOK_SECONDS)
        if busy > _QUIET_SHARE:
            pytest.exit(f"others have {busy:.0%} of the cores: figures would be of that", returncode=1)


def busy_share(seconds: float) -> float:
    """Share of all cores' time that was not idle, or that a host took, over so many seconds from now on."""
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    return 1 - idle / (sum(after) - sum(before))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that hears of every test
        config.pluginmanager.register(_Told(bool(config.getoption("figures"))))


class _Told:
    """Names the figures that were missed, and where figures are measured what a host took meanwhile."""

    def __init__(self, measuring: bool) -> None:
        self._measuring = measuring
        self._began, self._stolen = time.monotonic(), _stolen_seconds()
        self._missed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._missed += [f"{report.nodeid}: {claim}" for name, claim in report.user_properties if name == _MISSED]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._missed:
            terminalreporter.section("figures missed (this run measures nothing: `make bench-faults` does)")
            for line in self._missed:
                terminalreporter.write_line(line)
        if self._measuring:
            stolen, seconds = _stolen_seconds() - self._stolen, time.monotonic() - self._began
            terminalreporter.write_line(f"a host took {stolen:.1f} s of the cores' time in {seconds:.0f} s")


def _stolen_seconds() -> float:
    """What the host of a virtual machine has taken of all cores since the start; 0 where that is not counted."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))
