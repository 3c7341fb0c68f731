"""What makes a run in CI fail although no test failed: a skip that was not agreed, an expected failure, a second run.

CI is any run with the environment variable `CI` set, as GitHub's runners and `.ci/run` set it. A developer's machine
skips what it cannot run, and says why. No test is ever run again: one that failed once has found something.
"""

from __future__ import annotations

import os
import re
from typing import Final

import pytest

CI_VARIABLE: Final = "CI"
LACKING_VARIABLE: Final = "CI_LACKS"
"""Programs, separated by spaces, that are not installed and that CI could not install: not root, or no such package."""
ACCEPTED: Final = {
    "the recorded sessions are not there": "recordings are not part of the repository",
    "needs an OpenTelemetry collector": "no registry has its build: docs/logs.md says how to run them",
    "MLServer's own environment is not there": "`make mlserver` builds it and runs these tests",
    "npm cannot install": "a registry that is not ours",
    "no plugin for this language": "whoever generates stubs for it has one: docs/other-languages.md",
    "only root may": "the nightly run is root, this one may be a user",
    "root may read everything": "and so cannot be refused a file",
    "atheris is not installed": "it has no wheel for this interpreter or system",
    "the simulation cannot run here": "an interpreter whose SQLite library cannot be reached",
    "nothing can be compiled here": "no compiler, or a Python without its headers: Python does the same",
    "the kernel forbids": "a container without the capability",
}
"""Skips that CI accepts, by how their reason begins, and why it does."""


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(CI_VARIABLE) and not hasattr(config, "workerinput"):  # the process that hears of every test
        config.pluginmanager.register(_Verdict(frozenset(os.environ.get(LACKING_VARIABLE, "").split())))


class _Verdict:
    """Fails the run, and says what was skipped with and without leave."""

    def __init__(self, lacking: frozenset[str]) -> None:
        self._lacking = lacking
        self._accepted: dict[str, str] = {}
        self._refused: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._judge(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._judge(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._accepted:
            terminalreporter.section("skipped with leave")
            for reason, why in self._accepted.items():
                terminalreporter.write_line(f"{reason}: {why}")
        if self._refused:
            terminalreporter.section("not accepted in CI")
            for line in self._refused:
                terminalreporter.write_line(line)

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        outcome: str = report.outcome
        if outcome == "rerun":  # what plugins report that run a failed test again
            self._refused.append(f"{report.nodeid}: run again after a failure")
        elif hasattr(report, "wasxfail"):
            self._refused.append(f"{report.nodeid}: a failure that is expected: {report.wasxfail}")
        elif report.skipped:
            assert isinstance(report.longrepr, tuple)
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if (why := self._leave(reason)) is None:
                self._refused.append(f"{report.nodeid}: skipped: {reason}")
            else:
                self._accepted[reason] = why

    def _leave(self, reason: str) -> str | None:
        """Why CI may skip a test for this reason; None when it may not."""
        needed = re.match(r"needs (\S+)", reason)
        if needed is not None and needed[1] in self._lacking:
            return "not installed and not installable"
        return next((why for start, why in ACCEPTED.items() if reason.startswith(start)), None)
