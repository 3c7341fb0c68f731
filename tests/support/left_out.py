"""What a run of the tests leaves out, printed at its end: a green `make test` is not every test.

It counts the tests that the default selection (`-m 'not long'`) passed over. A run that was asked for a selection of
its own says nothing. With pytest-xdist every process that runs tests collects the same ones, so one count is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import pytest

_DEFAULT: Final = "not long"
_OUTPUT: Final = "left_out"


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") == _DEFAULT:
        config.pluginmanager.register(_LeftOut(config))


class _LeftOut:
    """Counts the tests that were passed over, by the command that runs them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._counts = Counter[str]()

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("long"):
                self._counts["make faults" if item.get_closest_marker("fault") else "make test-long"] += 1

    def pytest_sessionfinish(self) -> None:
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput[_OUTPUT] = dict(self._counts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self._counts = Counter(getattr(node, "workeroutput", {}).get(_OUTPUT, self._counts))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._counts:
            return
        terminalreporter.section("left out of this run")
        for command, count in sorted(self._counts.items()):
            tests = "1 longer test" if count == 1 else f"{count} longer tests"
            terminalreporter.write_line(f"{tests}: `{command}`")
        terminalreporter.write_line("`make test-all`: these, MLServer, both edges, simulation, fuzzing and more")
