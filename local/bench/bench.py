"""`pretrade bench`: starts the stack and runs `loadtest.benchmark.bench` on it.

The run measures a decision server on each edge and, for comparison, bare echoes behind the same transports, TorchServe
itself, and FastAPI with the model in its process. The decision servers have everything on and an audit journal of their
own; they share the stack's replicas, features, control state and database.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.markup import escape

from loadtest.benchmark import bench
from loadtest.benchmark.echo import echo_server
from loadtest.benchmark.envoy_echo import envoy_echo
from loadtest.benchmark.figures import with_ratios
from loadtest.benchmark.rounds import closed_loop
from loadtest.generators import h2load, k6
from loadtest.generators.load import ECHO, PRETRADE, Load, Plan, Server, decision_calls
from local.bench.servers import decision_server, fastapi_with_model, torchserve_alone, usage_of_port, warm_up
from local.stack.command import FAILED, OK, run_with_stack
from local.stack.parts import torchserve
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Stack
from pretrade.decision.v1 import decision_pb2 as pb

EDGES: Final[Mapping[str, str]] = {"grpcio": "grpc.aio", "envoy": "Envoy"}
"""The setting of each, and its name for people."""
TORCHSERVE: Final = "TorchServe"
FASTAPI: Final = "FastAPI"
LAST_RUN: Final = "bench.json"
"""Where in the stack's directory the figures of the last run are."""
_PROFILED: Final = Load("unary", callers=64)
_PROFILE_SECONDS: Final = 10
_DRAW_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run's figures are written."""

    json_path: Path | None = None
    keep: bool = False
    """Also under `loadtest/results`, by commit."""
    profile: Path | None = None
    """A profile of each edge's process that decides, with the edge in the name; `.svg` for a flame graph, `.json` for
    speedscope, else raw stacks."""


def run_bench(given: Mapping[str, Any], wanted: Plan, outputs: Outputs) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack given on the command line.
        wanted: What to measure.
        outputs: What else to write.
    """
    if outputs.profile is not None and _py_spy() is None:
        Console().print("a profile needs py-spy: pip install py-spy", highlight=False)
        return FAILED

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        try:
            found = uvloop.run(_measure(stack, settings.dir, wanted, outputs.profile, console))
        except RuntimeError as error:
            console.print(f"[red]{escape(str(error))}[/]", highlight=False)
            return FAILED
        generators = [name for name, there in (("h2load", h2load.is_installed()), ("k6", k6.program())) if there]
        rounds = f"{wanted.rounds} round{'s' if wanted.rounds > 1 else ''} of {wanted.seconds:g} s"
        by = ", ".join([*generators, "callers in Python"])
        bench.show(console, found, f"{bench.commit()}: {by}; {rounds}, open loops {wanted.open_seconds:g} s")
        session = "simulator" if settings.data is None else settings.data.name
        document = bench.document(wanted, found, generators=generators, market=session)
        paths = [settings.dir / LAST_RUN, *([outputs.json_path] if outputs.json_path else [])]
        if outputs.keep:
            paths.append(bench.RESULTS / f"bench-{document['commit'] or 'unknown'}.json")
        for path in paths:
            bench.write(path, document)
        console.print(f"written to {', '.join(map(str, paths))}", highlight=False)
        return FAILED if found.failures else OK

    return run_with_stack(given, use, parts=set(PARTS) - {"server"})


async def _measure(stack: Stack, directory: Path, wanted: Plan, profile: Path | None, console: Console) -> bench.Found:
    began = time.monotonic()

    def report(line: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {line}", highlight=False)

    orders = bench.order_flow(stack.endpoints.instruments)
    async with AsyncExitStack() as opened:
        with console.status("starting servers"):
            servers = await _servers(stack, directory / "bench", orders, opened)
        report(f"started {', '.join(server.name for server in servers)}")
        with console.status("measuring"):
            found = await asyncio.to_thread(bench.measure, wanted, servers, orders, report)
            failures = list(found.failures)
            for server in servers:
                if profile is not None and server.pid is not None:
                    path = profile.with_stem(f"{profile.stem}-{server.transport}")
                    try:
                        await asyncio.to_thread(_profile, server, path, orders)
                        report(f"{server.name}: profile in {path}")
                    except RuntimeError as error:
                        failures.append(f"profile of {server.name}: {error}")
    return replace(found, results=with_ratios(found.results, servers, TORCHSERVE), failures=failures)


async def _servers(stack: Stack, directory: Path, orders: Sequence[pb.Order], opened: AsyncExitStack) -> list[Server]:
    """Starts all that is measured and installed; `opened` stops it."""
    calls = decision_calls(orders)
    shared = {"PRETRADE_DATABASE_URL": stack.endpoints.database_url or ""}
    servers = []
    response = pb.DecideResponse()
    edges = EDGES if find_spec("pyvoy") else {"grpcio": EDGES["grpcio"]}
    for edge, name in edges.items():
        target = await asyncio.to_thread(opened.enter_context, decision_server(stack, directory / edge, edge, shared))
        response = await asyncio.to_thread(warm_up, target.address, orders[0])
        usage, pid = target.usage, target.deciding().pid
        servers.append(Server(name, PRETRADE, target.address, calls, transport=edge, usage=usage, pid=pid))
    echoes = {"grpcio": echo_server, "envoy": envoy_echo}
    for edge, name in edges.items():
        address = await opened.enter_async_context(echoes[edge](response))
        usage = usage_of_port(int(address.rpartition(":")[2]))
        servers.append(Server(f"echo {name}", ECHO, address, calls, transport=edge, usage=usage))
    if h2load.is_installed():  # callers in Python know the decision service alone
        archive = torchserve.archive(Path(stack.endpoints.model_store or ""), "champion")
        alternatives = [torchserve_alone(TORCHSERVE, archive, directory / "torchserve")]
        if find_spec("fastapi") and find_spec("uvicorn") and find_spec("httptools"):
            alternatives.append(fastapi_with_model(FASTAPI, archive, directory / "fastapi"))
        for alternative in alternatives:
            servers.append(await asyncio.to_thread(opened.enter_context, alternative))  # noqa: PERF401 - it awaits
    return servers


def _py_spy() -> str | None:
    """The one of our environment, else of the PATH."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def _profile(server: Server, path: Path, orders: Sequence[pb.Order]) -> None:
    """Has py-spy watch the process that decides while 64 callers keep it busy.

    Raises:
        RuntimeError: py-spy failed.
    """
    formats = {".svg": "flamegraph", ".json": "speedscope"}
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = [_py_spy() or "py-spy", "record", "--pid", str(server.pid), "--output", str(path)]
    argv += ["--duration", str(_PROFILE_SECONDS)]
    argv += ["--format", formats.get(path.suffix, "raw"), "--threads"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spying:  # noqa: S603
        closed_loop(server, _PROFILED, orders, seconds=_PROFILE_SECONDS + 1, deadline_seconds=1.0)
        output, _ = spying.communicate(timeout=_DRAW_SECONDS)
    if spying.returncode:
        raise RuntimeError(f"py-spy: {output[-500:]}")
