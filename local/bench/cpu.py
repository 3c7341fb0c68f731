"""Where the CPU of a decision goes: by process of the stack and the server, and by thread of the one that decides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil
from rich.box import SIMPLE
from rich.table import Table

from loadtest.benchmark.targets import ALL_PARTS, EVENT_LOOP, SHIPPING
from local.bench.servers import Target, usage_of_process
from local.stack.stack import Stack

SHOWN_US: Final = 0.5
"""What takes less of a decision is left out."""
_OTHERS: Final = "other threads"
_THREADS: Final = (
    ("wrk:", "Envoy worker"),
    ("audit-", "journal"),
    ("event_engine", "gRPC"),
    ("grpc", "gRPC"),
    ("Thread-1 (_poll_wrapper)", "gRPC"),
    ("reports-log", _OTHERS),
    ("uvloop_", _OTHERS),
)
"""Roles of threads by how their names begin. Of the others, the busiest is the event loop."""
_PROCESSES: Final = {
    "server.audit": SHIPPING,
    "server.audit.shipping.publishing_process": "publishing",
    "server.composition.reading_process": "reading the audit",
    "server.models.model_process": "explaining",
}
"""Roles of the server's processes by their modules."""
_SUPERVISOR: Final = "supervisor"
_DECIDING: Final = "deciding"


@dataclass(frozen=True, slots=True)
class Share:
    """What one process or thread took of a decision."""

    part: str
    cpu_us: float
    """Microseconds of CPU a decision."""
    cores: float
    """Of the machine's, while it was under load."""
    thread: bool = False
    """Whether it is a part of the process that decides."""


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds so far."""

    at: float
    processes: Mapping[str, float]
    """By part of the stack, or role in the server."""
    threads: Mapping[int, float] = field(default_factory=dict)
    """Of the process that decides, by id."""


class CpuWatch:
    """Adds up where the CPU went while a server was under load.

    Args:
        stack: What the server works with.
        target: The server.
    """

    def __init__(self, stack: Stack, target: Target) -> None:
        self._stack = stack
        self._target = target
        self._names = thread_names(target.deciding().pid)
        self._totals: defaultdict[tuple[str, bool], float] = defaultdict(float)
        self._decisions = 0.0
        self._seconds = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Watches while its block runs."""
        before, decided = self._spent(), self._target.count("pretrade_decisions_total")
        yield
        after = self._spent()
        self._decisions += self._target.count("pretrade_decisions_total") - decided
        self._seconds += after.at - before.at
        for part, used in after.processes.items():
            self._totals[part, False] += used - before.processes.get(part, 0.0)
        used_by = {thread: used - before.threads.get(thread, 0.0) for thread, used in after.threads.items()}
        for role, used in by_role(used_by, self._names).items():
            self._totals[role, True] += used

    def shares(self) -> list[Share]:
        """The parts, and the threads after the process that decides."""
        if not self._decisions:
            return []
        shares = [
            Share(part, 1e6 * total / self._decisions, total / self._seconds, thread)
            for (part, thread), total in self._totals.items()
        ]
        return [share for share in shares if share.cpu_us >= SHOWN_US]

    def _spent(self) -> Spent:
        parts: defaultdict[str, float] = defaultdict(float)
        for name, process in self._stack.processes.items():
            if process.pid is not None:
                parts[name] += usage_of_process(psutil.Process(process.pid)).cpu_seconds
        server, deciding = self._target.process, self._target.deciding()
        for one in (server, *server.children(recursive=True)):
            parts[_role(one, deciding)] += sum(one.cpu_times()[:2])
        threads = {thread.id: thread.user_time + thread.system_time for thread in deciding.threads()}
        return Spent(time.monotonic(), parts, threads)


def by_part(shares: Sequence[Share]) -> dict[str, float]:
    """Microseconds a decision of every part and thread, and of all processes together."""
    return {
        ALL_PARTS: sum(share.cpu_us for share in shares if not share.thread),
        **{share.part: share.cpu_us for share in shares},
    }


def by_role(used: Mapping[int, float], names: Mapping[int, str]) -> dict[str, float]:
    """What the threads of the process that decides have used, by what they are for."""
    roles: defaultdict[str, float] = defaultdict(float)
    unnamed = {}
    for thread, seconds in used.items():
        name = names.get(thread, "")
        role = next((role for begin, role in _THREADS if name.startswith(begin)), None)
        if role is None:
            unnamed[thread] = seconds
        else:
            roles[role] += seconds
    loop = max(unnamed, key=unnamed.__getitem__, default=None)
    for thread, seconds in unnamed.items():
        roles[EVENT_LOOP if thread == loop else _OTHERS] += seconds
    return dict(roles)


def _role(process: psutil.Process, deciding: psutil.Process) -> str:
    if process == deciding:
        return _DECIDING
    arguments = process.cmdline()
    return next((role for module, role in _PROCESSES.items() if module in arguments), _SUPERVISOR)


def thread_names(pid: int) -> dict[int, str]:
    """Names of a process's threads by id: what Python calls them, else what the system does."""
    names = {}
    for thread in psutil.Process(pid).threads():
        names[thread.id] = Path(f"/proc/{pid}/task/{thread.id}/comm").read_text().strip()
    if (spy := py_spy()) is not None:
        dumped = subprocess.run(  # noqa: S603 - found on purpose
            [spy, "dump", "--nonblocking", "--json", "--pid", str(pid)], capture_output=True, text=True, check=False
        )
        if not dumped.returncode:
            for thread in json.loads(dumped.stdout):
                names[thread["os_thread_id"]] = thread["thread_name"] or names.get(thread["os_thread_id"], "?")
    return names


def py_spy() -> str | None:
    """The one of our environment, else of the PATH."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def share_table(shares: Sequence[Share], name: str) -> Table:
    """For people."""
    table = Table(title=f"where it goes: {name}", caption="µs of CPU a decision; cores under load", box=SIMPLE)
    for heading in ("part", "CPU", "cores"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for share in (each for each in shares if not each.thread):
        table.add_row(share.part, f"{share.cpu_us:,.1f}", f"{share.cores:.2f}")
        if share.part == _DECIDING:
            for thread in (each for each in shares if each.thread):
                table.add_row(f"  {thread.part}", f"{thread.cpu_us:,.1f}", f"{thread.cores:.2f}")
    table.add_row("[bold]all", f"{by_part(shares)[ALL_PARTS]:,.1f}")
    return table
