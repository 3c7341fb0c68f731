"""Every kept input holds, and a short run of the fuzzer finds none that does not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from fuzz.targets import TARGETS

HERE: Final = Path(__file__).parent
INPUTS: Final = sorted(path for folder in ("corpus", "crashes") for path in (HERE / folder).glob("*/*"))
SECONDS: Final = os.environ.get("FUZZ_SECONDS", "2")


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}-{path.name[:20]}")
def test_a_kept_input_breaks_no_promise(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzzer_finds_no_input_that_breaks_a_promise(target: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has no wheel for this interpreter or system")
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", target, SECONDS],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr[-6_000:]
    runs = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    assert runs, done.stderr[-2_000:]
    print(target, runs[0])
