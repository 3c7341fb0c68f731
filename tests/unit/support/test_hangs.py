"""A test that hangs where its time limit cannot end it fails alone, and a run that is cut off has told its failures."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

HANGING = """
import threading
import pytest

@pytest.fixture
def hanging():
    yield
    threading.Event().wait()

def test_hangs(hanging):
    assert False, "before it hangs"
"""


@pytest.fixture(autouse=True)
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest('pytest_plugins = ("support.hangs", "pytest_timeout", "xdist.plugin")')
    pytester.makeini("[pytest]\ntimeout = 1\nhang_grace = 1\n")


def result(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)


@pytest.mark.long
def test_a_teardown_that_hangs_after_its_test_failed_ends_the_run_and_is_named(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(HANGING)
    found = result(pytester, "-n", "1", "--dist", "loadfile", "--max-worker-restart=0")  # as `make test`
    assert found.ret == pytest.ExitCode.TESTS_FAILED
    found.stderr.fnmatch_lines(["Timeout*", "*test_a_teardown*.py*, line * in hanging"])
    found.stdout.fnmatch_lines(
        ["E *AssertionError: before it hangs", "worker 'gw0' crashed while running '*::test_hangs'", "*2 failed*"]
    )


def test_what_the_processes_last_thread_does_is_limited_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import threading\ndef test_passes(): threading.Thread(target=threading.Event().wait).start()")
    found = result(pytester)
    assert found.ret != pytest.ExitCode.OK
    found.stderr.fnmatch_lines(["Timeout*", "*threading.py*"])


def test_in_ci_a_failure_is_told_when_it_happens(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    pytester.makepyfile(HANGING)
    found = result(pytester)  # in one process, which the watchdog ends before there is any summary
    assert "short test summary" not in found.stdout.str()
    found.stdout.fnmatch_lines(["FAILED *::test_hangs (call): AssertionError: before it hangs*"])
