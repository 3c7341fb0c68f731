"""Ends a test that hangs where its time limit cannot reach it, and tells in CI of every failure when it happens.

A test's time limit (`timeout` in pyproject.toml) is an alarm that rings once and is heard by Python code only. So it
ends neither a teardown that hangs after the limit ended the test, nor a call into C that never returns: such a test
would hold up the whole run, and a run that is cut off from outside prints no summary. Here a watchdog outside the
interpreter prints where every thread stands and ends the process. pytest-xdist then names the test as failed and ends
the run (`--max-worker-restart=0`: in a new process it would run the same test again).
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from typing import Final

import pytest

CI_VARIABLE: Final = "CI"
GRACE_OPTION: Final = "hang_grace"
_STDERR: Final = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(GRACE_OPTION, "seconds that each phase of a test may take beyond its time limit", default="120")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.dup(2)  # pytest captures standard error itself while a test runs
    if os.environ.get(CI_VARIABLE) and not hasattr(config, "workerinput"):  # the process that hears of every test
        config.pluginmanager.register(_Failures(config))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    yield from _watched(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    yield from _watched(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    yield from _watched(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None]:
    # For good: what the session or its last thread leaves behind can hang as well.
    _watch(session.config, _limit(session.config))
    return (yield)


def _watched(item: pytest.Item) -> Generator[None]:
    own = item.get_closest_marker("timeout")
    _watch(item.config, _limit(item.config, float(own.args[0]) if own is not None and own.args else None))
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _watch(config: pytest.Config, seconds: float) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_STDERR])


def _limit(config: pytest.Config, own: float | None = None) -> float:
    return (float(config.getini("timeout") or 0) if own is None else own) + float(config.getini(GRACE_OPTION))


class _Failures:
    """Prints a failed test's name and error at once: a run that is cut off never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            error = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            said = f"FAILED {report.nodeid} ({report.when}): {error.strip().splitlines()[0][:300]}"
            terminal.write(f"\n{said}\n", flush=True)  # what ends the process flushes nothing
