"""`pretrade bench`: the stack around `loadtest.bench`, or around `loadtest.durability`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

from rich.console import Console

from local.command import run_with_stack
from local.settings import LocalSettings
from local.stack import PARTS, Stack

_DURABILITIES: Final = ("fsync", "os", "off")


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


def run_audit_bench(given: Mapping[str, Any], options: Sequence[str]) -> int:
    """Runs the stack with one server for each durability of the audit, and measures them in turn.

    Args:
        given: Settings of the stack given on the command line.
        options: Passed on to `python -m loadtest.durability`.

    Returns:
        The benchmark's exit code, or that of a stack that does not start.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        shared = stack.endpoints
        argv = [sys.executable, "-m", "loadtest.durability", *options]
        for instrument in shared.instruments:
            argv += ["--instrument", instrument]
        with ExitStack() as servers:
            for durability in _DURABILITIES:
                own = LocalSettings(
                    dir=settings.dir / "bench" / durability,
                    market=False,
                    instruments=shared.instruments,
                    redis_url=shared.redis_url,
                    database_url=shared.database_url,
                    primary=shared.primary,
                    secondary=shared.secondary,
                    challenger=shared.challenger,
                )
                os.environ["PRETRADE_JOURNAL__DURABILITY"] = durability
                server = servers.enter_context(Stack(own, parts={"server"}))
                argv += ["--server", f"{durability}={server.endpoints.decision}"]
            return subprocess.run(argv, check=False).returncode  # noqa: S603 - our own module

    return run_with_stack(given, use, parts=set(PARTS) - {"server"})
