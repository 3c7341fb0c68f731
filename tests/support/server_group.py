"""A decision server of several processes, and a load that records every decision it received."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.request import urlopen

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from feature_cache.compiled import SWITCH
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import packet_pb2
from pretrade.client import CallError, Client, Shared, retries
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.verify import Verified, verify
from server.journal.entries import entry_of, packets
from support.bare_server import admin_channel, environment, is_ready
from support.harness import INSTRUMENTS, MID, CallingThreads, Product, eventually
from support.leash import LeashedPopen

EDGES: Final = ("grpcio", "envoy")
"""Who may speak HTTP/2 with the callers."""
WAYS_IN: Final = (*EDGES, "envoy by ASGI alone")
"""The same, and Envoy without the lane that plain calls take there."""
RARELY_ON_ENVOY: Final = ("grpcio", pytest.param("envoy", marks=pytest.mark.long))
RARELY_ON_GRPC_AIO: Final = (pytest.param("grpcio", marks=pytest.mark.long), "envoy")
"""The same, where both take more time than they tell: what is tested is the same code behind them."""
_CALL_SECONDS = 10.0
"""Room for an order that is asked again, on a machine that has other work."""
_START_SECONDS = 120.0
"""Process after process loads, on a machine that has other work."""
_ANSWER_SECONDS = 20.0
"""A process that has started answers within milliseconds; on a busy machine one may load for some seconds."""
_SETTINGS = {
    "PRETRADE_INSTRUMENTS": json.dumps(INSTRUMENTS),
    # What starts takes the cores from what serves: this is about who answers, not how fast.
    "PRETRADE_BUDGET__CAP_SECONDS": "1.5",
    "PRETRADE_BUDGET__AUDIT_RESERVE_SECONDS": "0.5",
}
_SHIPS: Final = {"PRETRADE_SHIPPING__DRAIN_SECONDS": "30"}
"""A group that is stopped soon may have shipping processes that are just starting."""


def way_in(name: str) -> dict[str, str]:
    """The settings of one of `WAYS_IN`."""
    edge, _, alone = name.partition(" ")
    return {"PRETRADE_GRPC__EDGE": edge} | ({SWITCH: "0"} if alone else {})


@dataclass
class Group:
    """`python -m server --processes N`, started."""

    supervisor: subprocess.Popen[bytes]
    env: dict[str, str]
    directory: Path

    @property
    def decision(self) -> str:
        return f"127.0.0.1:{self.env['PRETRADE_GRPC__PORT']}"

    def status(self) -> admin_pb2.GetStatusResponse:
        """What one of the processes says, over a connection of its own: whichever the kernel picks.

        That may be one that listens already and does not answer before it has started. A process that still says
        nothing after `_ANSWER_SECONDS` leaves what it was doing in the test's output, and another connection is tried,
        as an operator would. Once a run hung here for as long as the test was allowed, and left no trace of the cause.
        """
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._ask_for_status()
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or time.monotonic() >= until:
                    raise
                print(f"no status within {_ANSWER_SECONDS} s\n{self.stacks()}\n{self.log()}", file=sys.stderr)

    def _ask_for_status(self) -> admin_pb2.GetStatusResponse:
        (config,) = retries.POLICY["methodConfig"]
        options = [("grpc.service_config", json.dumps({"methodConfig": [config | {"name": [{}]}]}))]  # every method
        with admin_channel(self.env, options) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_ANSWER_SECONDS, wait_for_ready=True)

    def stacks(self) -> str:
        """Where every thread of every process stands, as far as py-spy is installed and may look."""
        spy = shutil.which("py-spy", path=str(Path(sys.executable).parent))
        if spy is None:
            return "py-spy is not installed"
        dumps = [[spy, "dump", "--nonblocking", "--pid", str(pid)] for pid in (self.supervisor.pid, *self.pids())]
        return "\n".join(subprocess.run(one, capture_output=True, text=True, check=False).stdout for one in dumps)

    @contextmanager
    def admin(self) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
        """The admin service of one of the processes, over a connection of its own."""
        with admin_channel(self.env) as channel:
            yield admin_pb2_grpc.AdminServiceStub(channel)

    def processes(self) -> dict[int, str]:
        """Identity of every process that serves, by place."""
        return {one.index: one.instance_id for one in self.status().processes if one.ready}

    def pids(self) -> list[int]:
        """Process ids of the server processes."""
        found = []
        for child in psutil.Process(self.supervisor.pid).children():
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                if {"--slot", "--config-path"} & set(child.cmdline()):
                    found.append(child.pid)
        return found

    def metric(self, name: str, *, place: int = 0, **labels: str) -> float:
        """The sum of the series of a metric of the process in a place that carry these labels."""
        port = int(self.env["PRETRADE_METRICS__PORT"]) + place
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5.0) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def replace(self) -> None:
        """Has every process replaced, and waits until all are new."""
        before = self.processes()
        self.supervisor.send_signal(signal.SIGHUP)
        self.wait_until_replaced(set(before.values()))

    def wait_until_replaced(self, before: set[str]) -> None:
        """Waits until as many processes serve as before, none of them the same."""
        eventually(
            self.processes,
            lambda found: len(found) == len(before) and before.isdisjoint(found.values()),
            _START_SECONDS,
        )

    def log(self) -> str:
        return (self.directory / "server.log").read_text()

    def stop(self) -> int:
        self.supervisor.terminate()
        return self.supervisor.wait(90)

    def kill(self) -> None:
        """Ends all processes with SIGKILL, as the loss of a machine does."""
        children = psutil.Process(self.supervisor.pid).children(recursive=True)
        self.supervisor.kill()
        for process in children:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                process.kill()
        self.supervisor.wait()

    def audited(self) -> dict[str, list[str]]:
        """The ids of the decisions in SQL, by their orders' references.

        They are counted where the journals' rows are kept as they were written: an order that was decided twice, or a
        decision that was shipped twice, has two ids here.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for packet in shipped(self.directory):
            found[packet.decision.order_ref].append(packet.decision.decision_id)
        return found

    def verify(self) -> None:
        """Walks the hash chain of every journal, in SQL and on disk."""
        found = list(verify(self.env["PRETRADE_DATABASE_URL"], self.directory / "journal.db"))
        assert len(found) >= 4, "two journals at least, on disk and in SQL"
        assert all(isinstance(one, Verified) for one in found)


def shipped(directory: Path) -> Iterator[packet_pb2.DecisionPacket]:
    """What the servers whose database is in `directory` have shipped, in the order of their journals."""
    query = "SELECT entry FROM journal_entries ORDER BY journal_id, position"
    with closing(sqlite3.connect(directory / "audit.db")) as database:
        for (packed,) in database.execute(query):
            yield from packets(entry_of(packed))


def server_environment(directory: Path, **changes: str) -> dict[str, str]:
    """The settings of a server whose journal and database are in `directory`."""
    return environment(directory, **(_SETTINGS | changes))


@contextmanager
def server_group(directory: Path, processes: int, **changes: str) -> Iterator[Group]:
    """A group that serves; whatever is left of it is killed in the end."""
    env = server_environment(directory, **(_SHIPS | changes))
    argv = [sys.executable, "-m", "server", "--processes", str(processes)]
    with (directory / "server.log").open("ab") as log, LeashedPopen(argv, env=env, stderr=log) as supervisor:
        group = Group(supervisor, env, directory)

        def serves() -> bool:
            assert supervisor.poll() is None, group.log()[-2_000:]
            return is_ready(int(env["PRETRADE_GRPC__PORT"]))

        try:
            eventually(serves, bool, _START_SECONDS)
            eventually(group.processes, lambda found: len(found) == processes, _START_SECONDS)
            yield group
        finally:
            if supervisor.poll() is None:
                group.kill()


def beside(product: Product) -> dict[str, str]:
    """The settings of a server that uses the replicas and the market of a product."""
    endpoints = product.stack.endpoints
    return {
        "PRETRADE_REDIS_URL": str(endpoints.redis_url),
        "PRETRADE_REPLICAS__PRIMARY": str(endpoints.primary),
        "PRETRADE_REPLICAS__SECONDARY": str(endpoints.secondary),
        "PRETRADE_REPLICAS__CHALLENGER": str(endpoints.challenger),
        "PRETRADE_STARTUP_PATIENCE_SECONDS": "5",
        "PRETRADE_BREAKER__SLOW_SECONDS": "0.3",
        "PRETRADE_BATCHER__MIN_PATIENCE_SECONDS": "0.1",
        "PRETRADE_BATCHER__MAX_PATIENCE_SECONDS": "0.2",
    }


def order(ref: str = "one", **changes: Any) -> pb.Order:
    """A sound market order."""
    fields: dict[str, Any] = {
        "order_ref": ref,
        "instrument": INSTRUMENTS[0],
        "side": pb.SIDE_BUY,
        "quantity": 1.0,
        "strategy": "test",
    }
    return pb.Order(**(fields | changes))


@dataclass
class Callers(CallingThreads):
    """Callers who ask one decision after another by the client library, each with a client of its own, until stopped.

    Every order has a reference of its own.
    """

    target: str
    others: Sequence[str] = ()
    """Servers that are asked while that one is away."""
    decisions: list[pb.Decision] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sharing: bool = False
    """Whether they share the calls of one client."""
    name: str = "caller"
    """What the references begin with."""
    deadline_seconds: float = _CALL_SECONDS
    _one: Client = field(init=False)
    _shared: Shared = field(init=False)

    def __enter__(self) -> Self:
        self._one = self._connect()
        self._shared = self._one.shared()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._one.close()

    def _connect(self) -> Client:
        return Client.connect(self.target, *self.others, deadline_seconds=self.deadline_seconds)

    def wait_for_more(self, calls: int) -> None:
        wanted = len(self.decisions) + len(self.errors) + calls
        eventually(lambda: len(self.decisions) + len(self.errors), lambda made: made >= wanted)

    def _call(self, number: int) -> None:
        order = pb.Order(
            instrument=INSTRUMENTS[number % 2],
            side=pb.SIDE_BUY,
            quantity=0.01,
            limit_price=MID,
            strategy=f"{self.name}-{number}",
        )
        with self._connect() as own:
            asked = self._shared if self.sharing else own
            for call in itertools.count():
                if self._stopped.is_set():
                    break
                order.order_ref = f"{self.name}-{number}-{call}"
                try:
                    self.decisions.append(asked.decide(order).message)
                except CallError as error:
                    self.errors.append(str(error))


def reply_statuses(group: Group) -> dict[str, str]:
    """Reply status in SQL by order reference."""
    try:
        with closing(sqlite3.connect(group.directory / "audit.db")) as database:
            return dict(database.execute("SELECT order_ref, reply_status FROM decisions"))
    except sqlite3.OperationalError:  # no tables yet
        return {}
