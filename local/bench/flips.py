"""`pretrade bench-flips`: starts two servers with two processes each and runs `loadtest.studies.flips` on them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from local.stack.command import run_with_stack
from local.stack.process import Process
from local.stack.settings import LocalSettings, secret
from local.stack.stack import PARTS, Stack

_PROCESSES: Final = 2
_START_SECONDS: Final = 60.0
_LOOK_SECONDS: Final = 0.1


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
            redis_url=secret(shared.redis_url),
            database_url=secret(shared.database_url),
            primary=shared.primary,
            secondary=shared.secondary,
            challenger=shared.challenger,
        )
        argv = [sys.executable, "-m", "loadtest.studies.flips", f"--flips={flips}", f"--callers={callers}"]
        argv += [f"--instrument={instrument}" for instrument in shared.instruments]
        if json is not None:
            argv.append(f"--json={json}")
        with Stack(own, parts={"server"}) as second:
            for one in (stack, second):
                endpoints = one.endpoints
                argv.append(f"--server={endpoints.decision},{endpoints.admin},{endpoints.operator_token_file}")
                # Each process by itself, where the others of its server ask it.
                argv += [f"--process=unix:{path}" for path in _sockets(one["server"])]
            return subprocess.run(argv, check=False).returncode  # noqa: S603 - our own module

    return run_with_stack({**given, "processes": _PROCESSES}, use, parts=PARTS)


def _sockets(server: Process) -> list[str]:
    """Where the processes of a server ask each other, once all of them run.

    Raises:
        TimeoutError: They do not.
    """
    give_up_at = time.monotonic() + _START_SECONDS
    while True:
        found = {
            str(connection.laddr)
            for process in server.tree()
            for connection in process.net_connections("unix")
            if Path(str(connection.laddr)).name.startswith("process-")
        }
        if len(found) == _PROCESSES:
            return sorted(found)
        if time.monotonic() >= give_up_at:
            raise TimeoutError(f"{len(found)} of {_PROCESSES} processes of a server run")
        time.sleep(_LOOK_SECONDS)
