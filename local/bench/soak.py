"""`pretrade soak`: starts the embedded stack and runs `loadtest.studies.soak` on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console

from local.stack.command import run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from local.stack.up import keep_up

_WATCHED: Final = ("server", "worker", "primary", "secondary", "challenger")
"""Not the databases and the broker, which keep what they are given."""


def run_soak(given: Mapping[str, Any], options: Sequence[str]) -> int:
    """Runs the stack and the soak against it, and keeps the stack up meanwhile.

    Args:
        given: Settings of the stack given on the command line.
        options: Passed on to `loadtest.studies.soak`.

    Returns:
        The soak's exit code, or that of a stack that does not start.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        argv = [sys.executable, "-m", "loadtest.studies.soak", "--target", str(stack.endpoints.decision)]
        argv += [f"--instrument={instrument}" for instrument in stack.endpoints.instruments]
        argv += [f"--process={part}={stack[part].pid}" for part in _WATCHED if part in stack.processes]
        host, port = str(stack.endpoints.metrics_url).rsplit(":", 1)
        argv += [f"--metrics={host}:{int(port) + slot}/metrics" for slot in range(settings.processes or 1)]
        load = subprocess.Popen([*argv, *options])  # noqa: S603 - our own module
        try:
            keep_up(stack, settings, console, until=lambda: load.poll() is not None)
        finally:
            load.terminate()
            load.wait()
        return load.returncode

    return run_with_stack(given, use)
