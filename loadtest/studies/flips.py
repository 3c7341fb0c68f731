"""How fast a change made on one server is applied by every process of every server, while they decide.

`python -m loadtest.studies.flips --server DECISION,ADMIN,TOKEN_FILE … --process ADMIN …`: a flag is flipped again and
again, on the servers in turn, and every process is asked until it has applied the flip. Callers in a process of their
own ask for decisions meanwhile. If one of their calls gets no decision, the run counts an error.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import grpc.aio
import typer
import uvloop
from rich.console import Console

from loadtest.generators.channel import connected
from loadtest.generators.closed_loop import call_decide
from loadtest.generators.measurement import Measurement, percentile
from loadtest.generators.orders import OrderFlow
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc

_FLAG: Final = "shadow"
_RPC_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 0.01
"""Between two questions to a process whether it applies: so much too late it may be found to. The questions are load,
too, and more of them would make slow what they are to find."""
_PAUSE_SECONDS: Final = 0.05
_SETTLE_SECONDS: Final = 1.0


def main(
    server: Annotated[list[str], typer.Option(help="DECISION,ADMIN,TOKEN_FILE of a server; can be repeated.")],
    process: Annotated[list[str], typer.Option(help="Admin address of one process; can be repeated.")],
    instrument: Annotated[list[str], typer.Option(help="SYMBOL.VENUE; can be repeated.")],
    flips: Annotated[int, typer.Option(min=1, max=10_000, help="Changes to measure.")] = 100,
    callers: Annotated[int, typer.Option(min=0, max=256, help="Callers on each server.")] = 4,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
    load_only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measures how long a flip takes to reach every process."""
    if load_only:
        uvloop.run(_load([one.partition(",")[0] for one in server], instrument, callers))
        return
    tokens = [(("authorization", f"Bearer {Path(one.split(',')[2]).read_text().strip()}"),) for one in server]
    figures = uvloop.run(_measure(server, tokens, process, instrument, flips, callers))
    console = Console()
    console.print(
        f"{figures['flips']} flips of {len(server)} servers with {len(process)} processes: "
        f"applied by all after {figures['applied_median_ms']:.1f} ms (median), {figures['applied_p99_ms']:.1f} (p99), "
        f"{figures['applied_max_ms']:.1f} (max); the caller had its answer, audited, after "
        f"{figures['answered_median_ms']:.1f} ms (median), {figures['answered_max_ms']:.1f} (max)\n"
        f"meanwhile {figures['decisions']:,} decisions, errors: {figures['errors'] or 'none'}",
        highlight=False,
    )
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["errors"]:
        raise typer.Exit(1)


async def _measure(
    servers: list[str],
    tokens: Sequence[tuple[tuple[str, str], ...]],
    processes: list[str],
    instruments: list[str],
    flips: int,
    callers: int,
) -> dict[str, Any]:
    arguments = [f"--server={one}" for one in servers] + [f"--instrument={one}" for one in instruments]
    load = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "loadtest.studies.flips",
            "--load-only",
            "--process=none",
            f"--callers={callers}",
            *arguments,
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert load.stdout is not None
    await load.stdout.readline()  # it has begun
    async with AsyncExitStack() as stack:

        async def stub(address: str) -> admin_pb2_grpc.AdminServiceAsyncStub:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            await asyncio.wait_for(channel.channel_ready(), _RPC_SECONDS)
            return admin_pb2_grpc.AdminServiceStub(channel)

        addresses = [one.split(",")[1] for one in servers]
        steered = [(await stub(address), token) for address, token in zip(addresses, tokens, strict=True)]
        followed = [await stub(one) for one in processes]
        await asyncio.sleep(_SETTLE_SECONDS)
        answered, applied = [], []
        for number in range(flips):
            took = await _flip(*steered[number % len(steered)], followed, bool(number % 2))
            answered.append(took[0])
            applied.append(took[1])
            await asyncio.sleep(_PAUSE_SECONDS)
    said, _ = await load.communicate(b"")
    return {
        "flips": flips,
        "answered_median_ms": statistics.median(answered) * 1e3,
        "answered_max_ms": max(answered) * 1e3,
        "applied_median_ms": statistics.median(applied) * 1e3,
        "applied_p99_ms": percentile(applied, 0.99) * 1e3,
        "applied_max_ms": max(applied) * 1e3,
        **json.loads(said),
    }


async def _flip(
    steered: admin_pb2_grpc.AdminServiceAsyncStub,
    shown: tuple[tuple[str, str], ...],
    followed: list[admin_pb2_grpc.AdminServiceAsyncStub],
    enabled: bool,
) -> tuple[float, float]:
    """Seconds from the call until its answer, and until the last process applied."""
    began = time.perf_counter()
    version: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def call() -> float:
        request = admin_pb2.SetFlagRequest(name=_FLAG, enabled=enabled, author="flips", reason="measurement")
        response = await steered.SetFlag(request, timeout=_RPC_SECONDS, metadata=shown)
        version.set_result(response.change.version)
        return time.perf_counter() - began

    async def follow(process: admin_pb2_grpc.AdminServiceAsyncStub) -> float:
        while True:
            found = await process.GetStatus(admin_pb2.GetStatusRequest(this_process_only=True), timeout=_RPC_SECONDS)
            at = time.perf_counter() - began
            is_set = any(flag.name == _FLAG and flag.enabled == enabled for flag in found.flags)
            if is_set and found.control_version >= await version:
                return at
            await asyncio.sleep(_LOOK_SECONDS)

    answered, *applied = await asyncio.gather(call(), *(follow(process) for process in followed))
    return answered, max(applied)


async def _load(targets: list[str], instruments: list[str], callers: int) -> None:
    """Decides until the input ends; then prints what came of it."""
    ended = asyncio.Event()
    flow = OrderFlow(instruments, seed=1)
    orders = [flow.next({}) for _ in range(1_000)]

    async def call(target: str, first: int) -> Measurement:
        async with connected(target) as stub:  # each a connection of its own, as callers elsewhere have
            return await call_decide(
                stub, orders[first:] + orders[:first], callers=1, deadline_seconds=_RPC_SECONDS, stopped=ended
            )

    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(call(target, number * 37 % 1_000)) for number in range(callers) for target in targets
        ]
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        ended.set()
    measured = [task.result() for task in calls]
    errors = sum((one.errors for one in measured), Counter[str]())
    print(json.dumps({"decisions": sum(one.decisions for one in measured), "errors": dict(errors)}))


if __name__ == "__main__":
    typer.run(main)
