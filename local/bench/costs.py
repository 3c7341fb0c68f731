"""`pretrade bench-costs`: where the CPU of a decision goes, on the whole machine, and what each optional part costs.

Servers that differ in one setting decide side by side on one stack and are loaded in turn in short rounds, so that what
the machine does besides hits all alike; the median of the rounds is shown. Of the first one, which has everything on,
the CPU is told apart by process and by thread. Threads have the names Python gave them where
`py-spy` is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.benchmark.bench import commit
from loadtest.generators import h2load
from loadtest.generators.orders import OrderFlow
from local.bench.servers import Target, call_decide, decision_server, warm_up
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack

EVERYTHING: Final = "everything on"
WITHOUT: Final[Mapping[str, Mapping[str, str]]] = {
    EVERYTHING: {},
    "no shadow rows": {"PRETRADE_CONTROL__SHADOW": "false", "PRETRADE_CONTROL__STORE": "file"},
    "a tenth of the shadow rows": {"PRETRADE_SHADOW__SAMPLE_SHARE": "0.1"},
    "pairs not kept": {"PRETRADE_SHADOW__KEEP_PAIRS": "false"},
    "audit os": {"PRETRADE_JOURNAL__DURABILITY": "os"},
    "audit off": {"PRETRADE_JOURNAL__DURABILITY": "off"},
}
"""Settings of each server."""
_WARM_UP_SECONDS: Final = 1.0
_SHOWN_US: Final = 0.5
_MODULES: Final = ("server.composition.reading_process", "server.audit.shipping.publishing_process", "server.audit")


@dataclass(frozen=True, slots=True)
class Cost:
    """A server's, medians over the rounds."""

    name: str
    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """CPU of the server and all its processes per decision, in microseconds."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process or thread took of a decision."""

    part: str
    cpu_us: float
    """Microseconds of CPU a decision."""
    cores: float
    """Of the machine's, while it was under load."""


def run_cost_bench(
    given: Mapping[str, Any], edge: str, callers: int, seconds: float, rounds: int, report: Path | None
) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack.
        edge: Who speaks HTTP/2 with the callers.
        callers: Calls under way at once.
        seconds: Load of one round on each server.
        rounds: Rounds.
        report: JSON file for all figures.
    """
    parts = {"valkey", "broker", "worker", "market", "primary", "secondary", "challenger"}

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        costs, shares = _measure(stack, settings.dir, edge, callers, seconds, rounds)
        console.print(_cost_table(costs, f"{edge} edge, {callers} callers, {rounds} rounds of {seconds:g} s"))
        console.print(_share_table(shares))
        if report is not None:
            document = {
                "commit": commit(),
                "edge": edge,
                "callers": callers,
                "rounds": rounds,
                "seconds": seconds,
                "load_average": os.getloadavg(),
                "costs": [asdict(cost) for cost in costs],
                "shares": [asdict(share) for share in shares],
            }
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=2) + "\n")
        return OK

    return run_with_stack(given, use, parts=parts)


def _measure(
    stack: Stack, directory: Path, edge: str, callers: int, seconds: float, rounds: int
) -> tuple[list[Cost], list[Share]]:
    order = OrderFlow(stack.endpoints.instruments, ref_prefix=f"bench-{time.time_ns():x}-").next({})
    order.ClearField("idempotency_key")
    runs: dict[str, list[tuple[h2load.Run, float]]] = {name: [] for name in WITHOUT}
    spent: list[tuple[dict[str, float], int]] = []
    with ExitStack() as opened:
        servers = {
            name: opened.enter_context(decision_server(stack, directory / f"costs-{number}", edge, settings))
            for number, (name, settings) in enumerate(WITHOUT.items())
        }
        for server in servers.values():
            warm_up(server.address, order)
        names = thread_names(servers[EVERYTHING].deciding().pid)
        for number in range(rounds):
            # Who comes when makes a difference: in another order each time.
            for name in (*list(WITHOUT)[number % len(WITHOUT) :], *list(WITHOUT)[: number % len(WITHOUT)]):
                server = servers[name]
                call_decide(server.address, order, callers, _WARM_UP_SECONDS)
                before, used = _cpu_by_part(stack, server, names), server.cpu_seconds()
                run = call_decide(server.address, order, callers, seconds)
                used = server.cpu_seconds() - used
                runs[name].append((run, 1e6 * used / run.answers))
                if name == EVERYTHING:
                    after = _cpu_by_part(stack, server, names)
                    spent.append(({part: after[part] - before.get(part, 0.0) for part in after}, run.answers))
    costs = [
        Cost(
            name=name,
            decisions_per_second=statistics.median(run.answers / run.seconds for run, _ in found),
            p50_ms=statistics.median(run.p50_ms for run, _ in found),
            p99_ms=statistics.median(run.p99_ms for run, _ in found),
            cpu_us=statistics.median(cpu for _, cpu in found),
        )
        for name, found in runs.items()
    ]
    answers = sum(number for _, number in spent)
    totals: defaultdict[str, float] = defaultdict(float)
    for each, _ in spent:
        for part, used in each.items():
            totals[part] += used
    shares = [Share(part, 1e6 * total / answers, total / (seconds * rounds)) for part, total in totals.items()]
    return costs, [share for share in shares if share.cpu_us >= _SHOWN_US]


def _cpu_by_part(stack: Stack, server: Target, names: Mapping[int, str]) -> dict[str, float]:
    """CPU seconds so far of the stack's parts, the server's processes and the threads of the one that decides."""
    parts: defaultdict[str, float] = defaultdict(float)
    for name, process in stack.processes.items():
        if process.pid is not None:
            parts[name] += _seconds(psutil.Process(process.pid))
    deciding = server.deciding()
    for one in (server.process, *server.process.children(recursive=True)):
        parts[f"server: {_role(one, deciding)} {one.pid}"] += sum(one.cpu_times()[:2])
    for thread in deciding.threads():
        parts[f"  thread {names.get(thread.id, 'other')}"] += thread.user_time + thread.system_time
    return dict(parts)


def _seconds(process: psutil.Process) -> float:
    """CPU of a process and all that it started."""
    return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))


def _role(process: psutil.Process, deciding: psutil.Process) -> str:
    if process == deciding:
        return "deciding"
    arguments = process.cmdline()
    return next((module for module in _MODULES if module in arguments), "supervisor")


def thread_names(pid: int) -> dict[int, str]:
    """Names of a process's threads by id: what Python calls them, else what the system does."""
    names = {}
    for thread in psutil.Process(pid).threads():
        names[thread.id] = Path(f"/proc/{pid}/task/{thread.id}/comm").read_text().strip()
    if (spy := shutil.which("py-spy")) is not None:
        dumped = subprocess.run(  # noqa: S603 - found on the PATH on purpose
            [spy, "dump", "--nonblocking", "--json", "--pid", str(pid)], capture_output=True, text=True, check=False
        )
        if not dumped.returncode:
            for thread in json.loads(dumped.stdout):
                names[thread["os_thread_id"]] = thread["thread_name"] or names.get(thread["os_thread_id"], "?")
    return names


def _cost_table(costs: list[Cost], title: str) -> Table:
    table = Table(title=title, caption="ms; CPU of the server and its processes in µs a decision", box=SIMPLE)
    for heading in ("server", "dec./s", "p50", "p99", "CPU", "less"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for cost in costs:
        table.add_row(
            *(cost.name, f"{cost.decisions_per_second:,.0f}", f"{cost.p50_ms:.1f}", f"{cost.p99_ms:.1f}"),
            *(f"{cost.cpu_us:,.0f}", f"{costs[0].cpu_us - cost.cpu_us:,.0f}"),
        )
    return table


def _share_table(shares: list[Share]) -> Table:
    table = Table(title=f"where it goes: {EVERYTHING}", caption="µs of CPU a decision; cores under load", box=SIMPLE)
    for heading in ("part", "CPU", "cores"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for share in shares:
        table.add_row(share.part, f"{share.cpu_us:,.1f}", f"{share.cores:.2f}")
    return table
