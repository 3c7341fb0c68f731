"""A seed that failed is printed, kept, and used again in every run until it is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

DRAWS = """
def test_draws(seed):
    print(f"drew {seed}")
    assert seed != 7
"""
KEPT = "tests/failing_seeds.json"


@pytest.fixture(autouse=True)
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_SEED", raising=False)
    monkeypatch.delenv("FAILING_SEEDS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest('pytest_plugins = ("support.seeds",)')
    pytester.mkdir("tests")


def result(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest("-p", "no:cacheprovider", "-v", *arguments)


def kept(pytester: pytest.Pytester, path: str = KEPT) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((pytester.path / path).read_text())
    return found


def test_a_test_draws_a_new_seed_each_time(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(DRAWS)
    drawn = set()
    for _ in range(2):
        found = result(pytester, "-rP")
        found.assert_outcomes(passed=1)
        drawn |= {line for line in found.outlines if line.startswith("drew ")}
    assert len(drawn) == 2


@pytest.mark.long
@pytest.mark.parametrize("processes", [(), ("-p", "xdist.plugin", "-n", "2")])
def test_a_seed_that_fails_is_printed_kept_and_used_in_every_later_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, processes: tuple[str, ...]
) -> None:
    path = pytester.makepyfile(DRAWS)
    monkeypatch.setenv("TEST_SEED", "7")
    found = result(pytester, *processes)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*failing seeds*", f"TEST_SEED=7 {path.name}::test_draws*"])
    monkeypatch.delenv("TEST_SEED")
    for _ in range(2):
        result(pytester, *processes).assert_outcomes(failed=1, passed=1)
    path.write_text(path.read_text().replace("!= 7", "!= -1"))
    result(pytester, *processes).assert_outcomes(passed=2)
    assert kept(pytester) == {f"{path.name}::test_draws": [7]}, "a fix does not remove it"


def test_a_seed_is_kept_for_every_parameter_of_its_test(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pytester.makepyfile(
        "import pytest\n\n@pytest.mark.parametrize('edge', ['a', 'b'])\n"
        "def test_draws(edge, seed):\n    assert (edge, seed) != ('a', 7)"
    )
    monkeypatch.setenv("TEST_SEED", "7")
    result(pytester).assert_outcomes(failed=1, passed=1)
    monkeypatch.delenv("TEST_SEED")
    result(pytester).assert_outcomes(failed=1, passed=3)
    assert kept(pytester) == {f"{path.name}::test_draws": [7]}


def test_a_second_file_is_read_too_and_takes_what_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pytester.makepyfile(DRAWS)
    (pytester.path / KEPT).write_text(json.dumps({f"{path.name}::test_draws": [1]}))
    (pytester.path / "ours.json").write_text(json.dumps({f"{path.name}::test_draws": [2, 7]}))
    monkeypatch.setenv("FAILING_SEEDS", "ours.json")
    result(pytester).assert_outcomes(failed=1, passed=3)
    monkeypatch.setenv("TEST_SEED", "7")
    path.write_text(path.read_text().replace("test_draws", "test_draws_too"))
    result(pytester).assert_outcomes(failed=1)
    assert kept(pytester) == {f"{path.name}::test_draws": [1]}
    assert kept(pytester, "ours.json")[f"{path.name}::test_draws_too"] == [7]


def test_every_kept_seed_belongs_to_a_test_that_is_still_there() -> None:
    tests = Path(__file__).parents[2]
    for test in json.loads((tests / "failing_seeds.json").read_text()):
        path, _, name = test.rpartition("::")
        assert f"def {name}(" in (tests.parent / path).read_text(), f"{test} was renamed: so must its seeds be"
