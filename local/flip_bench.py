"""`pretrade bench-flips`: two servers with two processes each around `loadtest.flips`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from local.command import run_with_stack
from local.settings import LocalSettings
from local.stack import PARTS, Stack

_PROCESSES: Final = 2


def run_flip_bench(given: Mapping[str, Any], flips: int, callers: int, json: Path | None) -> int:
    """Runs the stack with two servers that share its Redis, and measures flips.

    Args:
        given: Settings of the stack given on the command line.
        flips: How many.
        callers: On each server, meanwhile.
        json: File for the figures.

    Returns:
        The benchmark's exit code, or that of a stack that does not start.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        shared = stack.endpoints
        own = LocalSettings(
            dir=settings.dir / "bench" / "second-server",
            market=False,
            decision_port=0,  # those of the environment are the first server's
            admin_port=0,
            metrics_port=0,
            processes=_PROCESSES,
            instruments=shared.instruments,
            redis_url=shared.redis_url,
            database_url=shared.database_url,
            primary=shared.primary,
            secondary=shared.secondary,
            challenger=shared.challenger,
        )
        argv = [sys.executable, "-m", "loadtest.flips", f"--flips={flips}", f"--callers={callers}"]
        argv += [f"--instrument={instrument}" for instrument in shared.instruments]
        if json is not None:
            argv.append(f"--json={json}")
        with Stack(own, parts={"server"}) as second:
            for one in (stack, second):
                argv.append(f"--server={one.endpoints.decision},{one.endpoints.admin}")
                # Each process by itself, where the others of its server ask it.
                supervisor = one["server"].pid
                argv += [f"--process=unix-abstract:pretrade-{supervisor}-{index}" for index in range(_PROCESSES)]
            return subprocess.run(argv, check=False).returncode  # noqa: S603 - our own module

    return run_with_stack({**given, "processes": _PROCESSES}, use, parts=PARTS)
