"""The seeds of randomised tests: printed, stored when a test fails, and used again until they are removed by hand.

A test that takes the fixture `seed` runs once with a new seed, and before that once with every seed it ever failed
with. Those are stored in `tests/failing_seeds.json`, by the test's id without its parameters. A seed that fails is
added to that file, to be committed with the fix. Remove it only when you know why it no longer matters.

* `TEST_SEED=n` runs such tests with that seed alone.
* `FAILING_SEEDS=file` names a second file, which is read as well and written in place of the first: CI stores the seeds
  that its own runs found there.

Hypothesis stores its failing examples in `.hypothesis/`, and in CI draws the same examples each time. How long an
example takes is no part of any property.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Final

import hypothesis
import pytest

# Not `PRETRADE_…`: those are settings, and a server that finds one it does not know refuses to start.
ONLY_VARIABLE: Final = "TEST_SEED"
FILE_VARIABLE: Final = "FAILING_SEEDS"
_FIXTURE: Final = "seed"
_NEW: Final = "new"
_SEEDS: Final = 2**32
_PROFILE: Final = "ours"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """What this run of the test draws from."""
    drawn: int = random.randrange(_SEEDS) if request.param == _NEW else request.param
    print(f"{ONLY_VARIABLE}={drawn}")
    request.node.user_properties.append((_FIXTURE, drawn))
    return drawn


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run with every seed that the test failed with, and one with a new one."""
    if _FIXTURE not in metafunc.fixturenames:
        return
    if only := os.environ.get(ONLY_VARIABLE):
        seeds: list[int | str] = [int(only)]
    else:
        test = _without_parameters(metafunc.definition.nodeid)
        seeds = [seed for path in _files(metafunc.config) for seed in _read(path).get(test, ())]
        seeds = [*dict.fromkeys(seeds), _NEW]
    # A new seed is drawn when its test runs: all processes of a run must collect the same ids.
    metafunc.parametrize(_FIXTURE, seeds, indirect=True, ids=[f"seed-{seed}" for seed in seeds])


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile(
        _PROFILE,
        hypothesis.settings.default,  # in CI that of CI
        deadline=None,
        suppress_health_check=(hypothesis.HealthCheck.too_slow,),
    )
    hypothesis.settings.load_profile(_PROFILE)
    if not hasattr(config, "workerinput"):  # the process that hears of every test
        config.pluginmanager.register(_Keeper(config))


class _Keeper:
    """Keeps the seeds of the tests that fail, and names them at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._files = _files(config)
        self._failed: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        drawn = dict(report.user_properties).get(_FIXTURE)
        if not report.failed or not isinstance(drawn, int):
            return
        self._failed[report.nodeid] = drawn
        kept, test = _read(self._files[-1]), _without_parameters(report.nodeid)
        if drawn not in kept.setdefault(test, []):
            kept[test].append(drawn)
            self._files[-1].write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._failed:
            terminalreporter.section("failing seeds")
            for test, drawn in self._failed.items():
                terminalreporter.write_line(f"{ONLY_VARIABLE}={drawn} {test}")
            terminalreporter.write_line(f"kept in {self._files[-1]}: they run every time until you remove them there")


def _files(config: pytest.Config) -> list[Path]:
    """The files that hold failing seeds; the last one takes further ones."""
    files = [config.rootpath / "tests" / "failing_seeds.json"]
    if further := os.environ.get(FILE_VARIABLE):
        files.append(config.rootpath / further)
    return files


def _read(path: Path) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    kept: dict[str, list[int]] = json.loads(path.read_text())
    return kept


def _without_parameters(test: str) -> str:
    return test.partition("[")[0]
