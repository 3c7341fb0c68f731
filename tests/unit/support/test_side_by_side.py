"""Files that share servers or models run in one process, and every other file wherever there is time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from support.side_by_side import together

ROOT: Final = Path(__file__).parents[3]

pytest_plugins = ("pytester",)


def test_files_that_use_the_same_model_servers_are_one_group() -> None:
    replicas, product = "tests/faults/test_replica_answers.py", "tests/integration/test_decisions.py"
    assert together(replicas) == together(product) != replicas


def test_files_of_models_that_are_trained_once_are_one_group() -> None:
    assert together("tests/unit/torchserve/test_handler.py") == together("tests/unit/torchserve/brought/test_adding.py")


def test_any_other_file_is_a_group_of_its_own() -> None:
    for path in ("tests/unit/server/timing/test_loop_lag.py", "tests/integration/test_demo.py"):
        assert (ROOT / path).is_file()
        assert together(path) == path


def test_a_run_of_several_processes_keeps_a_group_in_one(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a run takes 0.1 s without them
    pytester.makeconftest('pytest_plugins = ("support.side_by_side",)')
    folder = pytester.path / "tests" / "unit" / "torchserve"
    folder.mkdir(parents=True)
    writes_who_runs_it = "import os\n\ndef test_it():\n    open('ran', 'a').write(f'{os.getpid()}\\n')\n"
    for name in ("a", "b", "c", "d"):
        (folder / f"test_{name}.py").write_text(writes_who_runs_it)
    done = pytester.runpytest_subprocess("-p", "xdist", "-n", "2", "--dist", "loadfile", "--import-mode=importlib")
    done.assert_outcomes(passed=4)
    ran = (pytester.path / "ran").read_text().split()
    assert (len(ran), len(set(ran))) == (4, 1)
