"""`pretrade bench`: starts the stack and runs `loadtest.benchmark.bench` on it, phase by phase.

The run measures decision servers on each edge, and with the model in their own process asked first. For comparison it
measures bare echoes behind the same transports, TorchServe itself, and FastAPI with the model in its process. The
decision servers have everything on and an audit journal of their own; those of a phase share the stack's replicas,
features, control state and database.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import sqlalchemy as sa
import uvloop
from rich.console import Console
from rich.markup import escape

from loadtest.benchmark import bench
from loadtest.benchmark.compare import changes
from loadtest.benchmark.echo import echo_server
from loadtest.benchmark.envoy_echo import envoy_echo
from loadtest.benchmark.figures import Figures, with_ratios
from loadtest.benchmark.rounds import closed_loop
from loadtest.benchmark.sizing import last_kept
from loadtest.benchmark.targets import EMBEDDED, EMBEDDED_OS, ENVOY, GRPC_AIO, verdict_table, verdicts
from loadtest.generators import h2load
from loadtest.generators.load import ECHO, PRETRADE, Load, Server, decision_calls
from local.bench.against import interpreter_of
from local.bench.cpu import CpuWatch, Share, by_part, py_spy, share_table
from local.bench.phases import BEFORE, ECHO_ENVOY, ECHO_GRPC_AIO, FASTAPI, TORCHSERVE, Phase
from local.bench.servers import (
    Target,
    decision_server,
    fastapi_with_model,
    torchserve_alone,
    usage_of_port,
    warm_up,
)
from local.stack.command import FAILED, OK, run_with_stack
from local.stack.parts import torchserve
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Stack
from pretrade.decision.v1 import decision_pb2 as pb

LAST_RUN: Final = "bench.json"
"""Where in the stack's directory the figures of the last run are."""
_EMBEDDED_FIRST: Final = {"PRETRADE_CHAIN__STAGES": '["embedded", "model", "cached_score", "rules"]'}
_VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    GRPC_AIO: ("grpcio", {}),
    ENVOY: ("envoy", {}),
    EMBEDDED: ("envoy", _EMBEDDED_FIRST),
    EMBEDDED_OS: ("envoy", {**_EMBEDDED_FIRST, "PRETRADE_JOURNAL__DURABILITY": "os"}),
}
"""The edge and the settings of each decision server."""
_TODAY: Final = {before: name for name, before in BEFORE.items()}
_ECHOES: Final = {ECHO_GRPC_AIO: ("grpcio", echo_server), ECHO_ENVOY: ("envoy", envoy_echo)}
_OLDER_DATABASE: Final = "older"
_BUSY: Final = Load("unary", callers=64)
_BEFORE_SECONDS: Final = 3.0
"""Load before CPU is watched: what follows a decision, such as shipping, is under way then."""
_PROFILE_SECONDS: Final = 10
_DRAW_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run's figures are written."""

    json_path: Path | None = None
    keep: bool = False
    """Also under `loadtest/results`, by commit."""
    profile: Path | None = None
    """A profile of each process that decides behind Envoy, with the server in the name; `.svg` for a flame graph,
    `.json` for speedscope, else raw stacks."""


@dataclass(slots=True)
class _Run:
    """What all phases found."""

    servers: list[Server] = field(default_factory=list)
    results: list[Figures] = field(default_factory=list)
    warm_ups: list[bench.WarmUp] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cpu: dict[str, list[Share]] = field(default_factory=dict)
    """By server."""
    older: Path | None = None
    """The interpreter of the older commit that is held against."""

    @property
    def found(self) -> bench.Found:
        """With ratios, also to the run that was kept last."""
        results = with_ratios(self.results, self.servers, TORCHSERVE, FASTAPI, BEFORE)
        return bench.Found(with_kept(results), self.warm_ups, self.failures)


def run_bench(given: Mapping[str, Any], phases: Sequence[Phase], outputs: Outputs, against: str | None = None) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack given on the command line.
        phases: What to measure; each has a stack of its own.
        outputs: What else to write.
        against: The older commit whose servers are among those of the phases.
    """
    if outputs.profile is not None and py_spy() is None:
        Console().print("a profile needs py-spy: pip install py-spy", highlight=False)
        return FAILED
    run = _Run()
    if against is None:
        return _run(given, phases, outputs, run)
    with TemporaryDirectory() as folder:
        try:
            with interpreter_of(against, Path(folder, "older")) as run.older:
                return _run(given, phases, outputs, run)
        except RuntimeError as error:
            Console().print(f"[red]{escape(str(error))}[/]", highlight=False)
            return FAILED


def _run(given: Mapping[str, Any], phases: Sequence[Phase], outputs: Outputs, run: _Run) -> int:
    began = time.monotonic()
    for phase in phases:

        def use(stack: Stack, settings: LocalSettings, console: Console, phase: Phase = phase) -> int:
            def report(line: str) -> None:
                console.print(f"{time.monotonic() - began:4.0f} s  {line}", highlight=False, soft_wrap=True)

            try:
                uvloop.run(_measure(stack, settings.dir, phase, outputs.profile, run, console, report))
            except RuntimeError as error:
                console.print(f"[red]{escape(str(error))}[/]", highlight=False)
                return FAILED
            if phase is phases[-1]:
                _print_and_write(run, phase, settings, outputs, console)
                report(f"{len(phases)} phases")
            return OK

        code = run_with_stack(given, use, parts=set(PARTS) - {"server"})
        if code != OK:
            return code
    return FAILED if run.failures else OK


def _print_and_write(run: _Run, phase: Phase, settings: LocalSettings, outputs: Outputs, console: Console) -> None:
    found, plan = run.found, phase.plan
    generators = [*(["h2load"] if h2load.is_installed() else []), "callers in Python"]
    session = "simulator" if settings.data is None else settings.data.name
    document = bench.document(plan, found, generators=generators, market=session)
    document["cpu"] = {server: by_part(shares) for server, shares in run.cpu.items()}
    rounds = f"{plan.rounds} round{'s' if plan.rounds > 1 else ''} of {plan.seconds:g} s"
    title = f"{document['commit']}: {', '.join(generators)}; {rounds}, open loops {plan.open_seconds:g} s"
    bench.show(console, found, title)
    for server, shares in run.cpu.items():
        bench.print_whole(console, share_table(shares, server))
    bench.print_whole(console, verdict_table(verdicts(document)))
    paths = [settings.dir / LAST_RUN, *([outputs.json_path] if outputs.json_path else [])]
    if outputs.keep:
        paths.append(bench.RESULTS / f"bench-{document['commit'] or 'unknown'}.json")
    for path in paths:
        bench.write(path, document)
    console.print(f"written to {', '.join(map(str, paths))}", highlight=False)


def with_kept(results: Sequence[Figures], folder: Path = bench.RESULTS) -> list[Figures]:
    """The same with the ratios to the run that was kept last, net of what became of the machine."""
    if not any(folder.glob("bench-*.json")):
        return list(results)
    then = json.loads(last_kept(folder).read_text())
    net = {
        (each.load, each.server): each.adjusted for each in changes(then, {"results": [asdict(one) for one in results]})
    }
    return [replace(each, to_kept=net.get((each.load, each.server))) for each in results]


async def _measure(
    stack: Stack,
    directory: Path,
    phase: Phase,
    profile: Path | None,
    run: _Run,
    console: Console,
    report: Callable[[str], None],
) -> None:
    """One phase; what it finds is added to the run."""
    orders = bench.order_flow(stack.endpoints.instruments)
    async with AsyncExitStack() as opened:
        with console.status("starting servers"):
            servers, targets = await _servers(phase, stack, directory / "bench", orders, opened, run.older)
        report(f"{phase.name}: started {', '.join(server.name for server in servers)}")
        with console.status("measuring"):
            found = await asyncio.to_thread(bench.measure, phase.plan, servers, orders, report, run.results)
            run.failures += found.failures
            # After the loads: a Java runtime that still compiles what it runs takes twice as much for a decision.
            for server in servers:
                if server.name in phase.costs:
                    shares = await asyncio.to_thread(_watch, stack, targets[server.name], server, orders, phase)
                    run.cpu[server.name] = shares
                    report(f"{server.name}: {by_part(shares)['all']:,.0f} µs of CPU a decision")
            for server in servers:
                if profile is not None and server.pid is not None and phase.costs:
                    path = profile.with_stem(f"{profile.stem}-{server.name.replace(' ', '-')}")
                    try:
                        await asyncio.to_thread(_profile, server, path, orders)
                        report(f"{server.name}: profile in {path}")
                    except RuntimeError as error:
                        run.failures.append(f"profile of {server.name}: {error}")
    run.servers += servers
    run.results += found.results
    run.warm_ups += found.warm_ups


async def _servers(
    phase: Phase,
    stack: Stack,
    directory: Path,
    orders: Sequence[pb.Order],
    opened: AsyncExitStack,
    older: Path | None,
) -> tuple[list[Server], dict[str, Target]]:
    """Starts all of a phase that is installed; `opened` stops it. The decision servers once more by name."""
    calls = decision_calls(orders)
    shared = {"PRETRADE_DATABASE_URL": stack.endpoints.database_url or ""}
    if older is not None:
        _make_database(shared["PRETRADE_DATABASE_URL"], _OLDER_DATABASE)
    wanted = [name for name in phase.servers if find_spec("pyvoy") or "Envoy" not in name]

    def decide(name: str) -> tuple[Server, Target, pb.DecideResponse]:
        edge, settings = _VARIANTS[_TODAY.get(name, name)]
        python = older if name in _TODAY else None
        folder = directory / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier phase has not shipped would be shipped in this one
        its = (
            {"PRETRADE_DATABASE_URL": _named(shared["PRETRADE_DATABASE_URL"], _OLDER_DATABASE)}
            if python is not None
            else {}
        )
        target = opened.enter_context(decision_server(stack, folder, edge, {**shared, **settings, **its}, python))
        response = warm_up(target.address, orders[0])
        pid = target.deciding().pid
        return Server(name, PRETRADE, target.address, calls, edge, target.usage, pid), target, response

    # Most of a start is waiting: for the disk, and for replicas to be warm.
    deciding = [asyncio.to_thread(decide, name) for name in wanted if name in _VARIANTS or name in _TODAY]
    started = await asyncio.gather(*deciding)
    servers = [server for server, _, _ in started]
    for name in (each for each in wanted if each in _ECHOES):
        edge, echo = _ECHOES[name]
        address = await opened.enter_async_context(echo(started[0][2]))
        usage = usage_of_port(int(address.rpartition(":")[2]))
        servers.append(Server(name, ECHO, address, calls, transport=edge, usage=usage))
    if h2load.is_installed():  # callers in Python know the decision service alone
        archive = torchserve.archive(Path(stack.endpoints.model_store or ""), "champion")
        alternatives = []
        if TORCHSERVE in wanted:
            alternatives.append(torchserve_alone(TORCHSERVE, archive, directory / "torchserve"))
        if FASTAPI in wanted and all(find_spec(name) for name in ("fastapi", "uvicorn", "httptools")):
            alternatives.append(fastapi_with_model(FASTAPI, archive, directory / "fastapi"))
        starting = [asyncio.to_thread(opened.enter_context, alternative) for alternative in alternatives]
        servers += await asyncio.gather(*starting)
    return servers, {server.name: target for server, target, _ in started}


def _named(url: str, name: str) -> str:
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


def _make_database(url: str, name: str) -> None:
    """An empty one beside the stack's, whose tables another version makes as it knows them."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()


def _watch(stack: Stack, target: Target, server: Server, orders: Sequence[pb.Order], phase: Phase) -> list[Share]:
    """Where the CPU goes in the middle of a longer load, when shipping keeps up with it."""
    watch = CpuWatch(stack, target)
    seconds = _BEFORE_SECONDS + phase.cost_seconds
    with ThreadPoolExecutor(max_workers=1) as pool:
        load = pool.submit(closed_loop, server, _BUSY, orders, seconds=seconds + 1, deadline_seconds=1.0)
        time.sleep(_BEFORE_SECONDS)
        with watch():
            time.sleep(phase.cost_seconds)
        load.result()
    return watch.shares()


def _profile(server: Server, path: Path, orders: Sequence[pb.Order]) -> None:
    """Has py-spy watch the process that decides while 64 callers keep it busy.

    Raises:
        RuntimeError: py-spy failed.
    """
    formats = {".svg": "flamegraph", ".json": "speedscope"}
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = [py_spy() or "py-spy", "record", "--pid", str(server.pid), "--output", str(path)]
    argv += ["--duration", str(_PROFILE_SECONDS)]
    argv += ["--format", formats.get(path.suffix, "raw"), "--threads"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spying:  # noqa: S603
        closed_loop(server, _BUSY, orders, seconds=_PROFILE_SECONDS + 1, deadline_seconds=1.0)
        output, _ = spying.communicate(timeout=_DRAW_SECONDS)
    if spying.returncode:
        raise RuntimeError(f"py-spy: {output[-500:]}")
