"""What the JavaScript client costs its callers, next to the raw stubs, and what shared calls and a stream gain.

    python -m local.bench.client_js --rounds 5

The callers are `client/js/bench/costs.js`, in one process of Node; they ask a bare echo server in a process of its own,
as in `local/bench/client.py`, which says what is measured and why. `--target` measures a real server instead.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from loadtest.benchmark.echo import echo_server
from local.bench.client import ECHOED, Cost, WayName, table

_PACKAGE: Final = Path(__file__).parents[2] / "client/js"


async def measure(target: str | None, seconds: float, rounds: int) -> dict[WayName, list[Cost]]:
    """Every way in turn, in every round.

    Args:
        target: `HOST:PORT` of a server; None for an echo of our own.
        seconds: Of each measurement.
        rounds: How many.

    Raises:
        RuntimeError: The callers have failed.
    """
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(echo_server(ECHOED)) if target is None else target
        callers = await asyncio.create_subprocess_exec(
            "node", "bench/costs.js", address, f"{seconds}", f"{rounds}", cwd=_PACKAGE, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await callers.communicate()
    if callers.returncode:
        raise RuntimeError(f"the callers have ended with {callers.returncode}")
    return {WayName(way["callers"], way["by"]): [Cost(*one) for one in way["costs"]] for way in json.loads(output)}


def main(
    target: Annotated[str | None, typer.Option(help="HOST:PORT of a server. [a bare echo]")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each measurement.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of all of them; medians are shown.")] = 5,
) -> None:
    """Measure the JavaScript client next to the raw stubs."""
    Console().print(table(asyncio.run(measure(target, seconds, rounds))))


if __name__ == "__main__":
    typer.run(main)
