"""Figures of time are told in every run and asserted only where they are measured."""

from __future__ import annotations

import pytest

pytest_plugins = ("pytester",)

MEASURES = """
def test_measures(figure):
    figure({held}, "p99 within 25 ms")

def test_measures_nothing():
    assert {other}
"""


@pytest.fixture(autouse=True)
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest(
        """
        from support import figures

        pytest_plugins = ("support.figures",)
        figures.busy_share = lambda seconds: BUSY
        """.replace("BUSY", "0.02")
    )


def result(pytester: pytest.Pytester, held: bool, *arguments: str, other: bool = True) -> pytest.RunResult:
    pytester.makepyfile(MEASURES.format(held=held, other=other))
    return pytester.runpytest("-p", "no:cacheprovider", *arguments)


def test_a_figure_that_is_missed_fails_no_ordinary_run_and_is_named(pytester: pytest.Pytester) -> None:
    found = result(pytester, held=False)
    found.assert_outcomes(passed=2)
    found.stdout.fnmatch_lines(["*figures missed*", "*::test_measures: p99 within 25 ms"])


def test_a_run_that_measures_asserts_figures_and_runs_nothing_else(pytester: pytest.Pytester) -> None:
    found = result(pytester, False, "--figures", other=False)
    found.assert_outcomes(failed=1, deselected=1)
    found.stdout.fnmatch_lines(["*p99 within 25 ms*", "a host took * s of the cores' time in * s"])
    result(pytester, True, "--figures", other=False).assert_outcomes(passed=1, deselected=1)


def test_figures_are_not_measured_on_a_busy_machine(pytester: pytest.Pytester) -> None:
    conftest = pytester.path / "conftest.py"
    conftest.write_text(conftest.read_text().replace("0.02", "0.3"))
    found = result(pytester, True, "--figures")
    assert found.ret == 1
    found.stdout.fnmatch_lines(["*others have 30% of the cores*"])
