"""A test that runs a command in its own process leaves the logs of later tests alone."""

from __future__ import annotations

import pytest

pytest_plugins = ("pytester",)

COMMAND_THEN_LOGGING = """
import io
import logging
import sys

import structlog
from structlog.testing import capture_logs

from feature_cache import logs

log = structlog.get_logger()


def test_a_command_configures_logging(monkeypatch):
    with io.StringIO() as its_own:
        monkeypatch.setattr(sys, "stderr", its_own)
        logs.configure("error", "command")
        log.error("said")
        assert "said" in its_own.getvalue()


def test_something_else_is_logged():
    with capture_logs() as lines:
        log.warning("watched")
    assert [line["event"] for line in lines] == ["watched"]
    log.error("not watched")
    logging.getLogger("library").error("neither")
"""


def test_what_a_command_configures_ends_with_its_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest('pytest_plugins = ("support.own_logs",)')
    pytester.makepyfile(COMMAND_THEN_LOGGING)
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=2)
