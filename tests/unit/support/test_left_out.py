"""A run says what it left out, so that nobody takes `make test` for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

TESTS = """
import pytest

def test_passes():
    pass

@pytest.mark.long
def test_takes_long():
    pass

@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.fault("A1", "a fault", "what is to happen")
def test_breaks_something(number):
    pass
"""


@pytest.fixture(autouse=True)
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest('pytest_plugins = ("support.left_out",)')
    pytester.makeini("[pytest]\nmarkers =\n  long: takes long\n  fault(id, fault, expected): breaks something")
    pytester.makepyfile(TESTS)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_a_run_says_which_command_runs_what_it_left_out(pytester: pytest.Pytester, processes: str) -> None:
    found = pytester.runpytest_subprocess("-p", "xdist", "-n", processes, "-m", "not long")
    found.assert_outcomes(passed=1, deselected=0 if processes != "0" else 3)
    found.stdout.fnmatch_lines(
        [
            "*left out of this run*",
            "2 longer tests: `make faults`",
            "1 longer test: `make test-long`",
        ]
    )


def test_a_run_with_a_selection_of_its_own_says_nothing(pytester: pytest.Pytester) -> None:
    found = pytester.runpytest("-m", "long")
    found.assert_outcomes(passed=3, deselected=1)
    found.stdout.no_fnmatch_line("*left out of this run*")
