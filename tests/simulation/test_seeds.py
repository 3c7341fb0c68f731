"""A seed is a history: the same one every time. Seeds that failed before, and new ones, hold what a server promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).parents[1]
CANNOT: Final = 77
SECONDS: Final = os.environ.get("SIMULATE_SECONDS", "20")


def simulate(*arguments: str, hash_seed: str = "0", **settings: str) -> str:
    """What `python -m simulation` prints; fails with that where a seed fails."""
    done = subprocess.run(
        [sys.executable, "-m", "simulation", *arguments],
        env=os.environ | settings | {"PYTHONPATH": str(TESTS), "PYTHONHASHSEED": hash_seed},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, f"{done.stdout[-8_000:]}\n{done.stderr[-2_000:]}"
    return done.stdout


@pytest.mark.long
def test_a_seed_gives_the_same_history_in_any_process_whatever_ran_before_is_set_or_strings_hash_to() -> None:
    arguments = ("--first", "70", "--seeds", "14", "--hashes")
    one_after_another = simulate(*arguments, "--jobs", "1", hash_seed="1")
    in_two_processes = simulate(*arguments, "--jobs", "2", hash_seed="2", PRETRADE_BREAKER__SLOW_SECONDS="0.3")
    assert one_after_another.splitlines() == in_two_processes.splitlines()
    assert len({line.split()[1] for line in one_after_another.splitlines()}) == 14


@pytest.mark.timeout(240)
def test_what_a_server_promises_holds_for_the_seeds_that_failed_before_and_for_new_ones() -> None:
    print(simulate("--seconds", SECONDS))


@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_every_protection_that_is_taken_out_is_missed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "simulation.mutations"],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
