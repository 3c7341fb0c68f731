"""`pretrade bench`: the stack around `loadtest.bench`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from local.command import run_with_stack
from local.settings import LocalSettings
from local.stack import Stack


def run_bench(given: Mapping[str, Any], options: Sequence[str]) -> int:
    """Runs the stack and the benchmark against it, in a process of its own.

    Args:
        given: Settings of the stack given on the command line.
        options: Passed on to `python -m loadtest.bench`.

    Returns:
        The benchmark's exit code, or that of a stack that does not start.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        argv = [sys.executable, "-m", "loadtest.bench", "--dir", str(settings.dir), *options]
        return subprocess.run(argv, check=False).returncode  # noqa: S603 - our own module

    return run_with_stack(given, use)
