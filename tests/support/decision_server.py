"""A decision server of one test's own: its process, its settings, its log, its metrics, its audit."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self
from urllib.request import urlopen

import grpc
import psutil
import sqlalchemy as sa
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from local.stack.errors import NotReadyError
from local.stack.parts import server
from local.stack.ports import free_ports
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.audit.v1 import packet_pb2
from pretrade.client import operator_token
from pretrade.client.credentials import ClientCredentials
from pretrade.decision.v1 import decision_pb2_grpc
from server.audit.reading import verify as reader
from server.audit.store.schema import DECISIONS, JOURNAL_ENTRIES
from server.journal.entries import entry_of, singly
from support.harness import EDGE, INSTRUMENTS, START_SECONDS, Asking, deciding, eventually
from support.leash import LeashedPopen

NOWHERE: Final = "127.0.0.1:9"
"""An address at which nobody listens."""
_STOP_SECONDS: Final = 30.0


def free_in_allocator(process: psutil.Process) -> int:
    """Bytes that the allocator of a process holds free, if that is Envoy, as Envoy says itself; otherwise 0."""
    arguments = process.cmdline()
    if "--config-path" not in arguments:
        return 0
    config = json.loads(Path(arguments[arguments.index("--config-path") + 1]).read_text())
    with closing(http.client.HTTPConnection("envoy", timeout=5.0)) as connection:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5.0)
        connection.sock.connect(config["admin"]["address"]["pipe"]["path"])
        connection.request("GET", "/memory")
        memory = json.loads(connection.getresponse().read())
    return int(memory["heap_size"]) - int(memory["allocated"])


class DecisionServer(Asking):
    """`python -m server` with a journal and an SQLite audit store in `directory`; also a context manager.

    Args:
        directory: For its files; made when missing. A second server in it takes the first one's journal over.
        redis_url: Where the features are.
        primary, secondary, challenger: `host:port` of the replicas.
        settings: Further settings by their `PRETRADE_` names without the prefix.
        database_url: Of the audit; None for a database of SQLite in the directory.
    """

    def __init__(
        self,
        directory: Path,
        redis_url: str,
        *,
        primary: str = NOWHERE,
        secondary: str = NOWHERE,
        challenger: str = NOWHERE,
        settings: Mapping[str, str] | None = None,
        database_url: str | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        decision, admin, metrics = free_ports(3)
        self.address = f"127.0.0.1:{decision}"
        """`host:port` of the decision service."""
        self._decision_port = decision
        self.admin_address = f"127.0.0.1:{admin}"
        """`host:port` of the admin service."""
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"
        self.database_url = database_url or f"sqlite:///{directory / 'audit.db'}"
        self.journal_path = directory / "journal.db"
        self.log_path = directory / "server.log"
        ours = {
            "GRPC__PORT": str(decision),
            "ADMIN__PORT": str(admin),
            "METRICS__PORT": str(metrics),
            "REDIS_URL": redis_url,
            "REPLICAS__PRIMARY": primary,
            "REPLICAS__SECONDARY": secondary,
            "REPLICAS__CHALLENGER": challenger,
            "DATABASE_URL": self.database_url,
            "JOURNAL__PATH": str(self.journal_path),
            "INSTRUMENTS": json.dumps(INSTRUMENTS),
            # What another test steered must not steer this one.
            "CONTROL__SHARED__KEY": f"control:{self.journal_path}",
            "CONTROL__INITIAL_TRADING_STATE": "ACTIVE",
            # The vectors of these tests are none of a market.
            "CONTROL__OUT_OF_DOMAIN": "false",
            "STARTUP_PATIENCE_SECONDS": "2",
            "GRPC__EDGE": EDGE,
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")}
        self._env = inherited | {f"PRETRADE_{name}": value for name, value in (ours | dict(settings or {})).items()}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if "_channels" in self.__dict__:
            for channel in self._channels:
                channel.close()
        if self._process is not None:
            self.process.resume()
            self.stop()

    def start(self) -> None:
        """Starts it and waits until it serves."""
        with self.log_path.open("ab") as log:
            self._process = LeashedPopen([sys.executable, "-m", "server"], env=self._env, stderr=log)
        try:
            eventually(self._serves, bool, START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Lets it drain and waits for its end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        if self._process is not None:
            deciding = [self.process] if self._process.poll() is None else []
            self._process.kill()
            self._process.wait()
            for process in deciding:
                with suppress(psutil.NoSuchProcess):
                    process.kill()  # of a supervisor
            self._process = None

    @property
    def process(self) -> psutil.Process:
        """The running process that decides."""
        assert self._process is not None, "it does not run"
        return deciding(self._process.pid)

    @cached_property
    def _channels(self) -> tuple[grpc.Channel, grpc.Channel]:
        token_file = operator_token.token_path(self.journal_path)
        admin = ClientCredentials(token_file=token_file).channel(self.admin_address)
        return grpc.insecure_channel(self.address), admin

    @cached_property
    def decisions(self) -> decision_pb2_grpc.DecisionServiceStub:  # type: ignore[override]  # read only
        """The decision service."""
        return decision_pb2_grpc.DecisionServiceStub(self._channels[0])

    @cached_property
    def admin(self) -> admin_pb2_grpc.AdminServiceStub:  # type: ignore[override]  # read only
        """The admin service."""
        return admin_pb2_grpc.AdminServiceStub(self._channels[1])

    def assert_alive(self) -> None:
        """Asks the health service of the admin port whether the server is alive."""
        check: grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]
        check = self._channels[1].unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        response = check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5.0)
        assert response.status == health_pb2.HealthCheckResponse.SERVING

    def wait_until_well(self, *replicas: str) -> None:
        """Waits until the features are usable and these replicas healthy with their breakers closed."""

        def is_well(status: admin_pb2.GetStatusResponse) -> bool:
            return all(feature.usable for feature in status.features) and all(
                replica.healthy and replica.breaker_state == admin_pb2.BREAKER_STATE_CLOSED
                for replica in status.replicas
                if replica.name in replicas
            )

        eventually(self.status, is_well)

    def free_in_allocator(self) -> int:
        """Bytes that the allocator of Envoy holds free; 0 where there is no Envoy."""
        return free_in_allocator(self.process)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric that carry these labels; 0 when there is none."""
        with urlopen(self.metrics_url, timeout=5.0) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log's lines, or those of one event."""
        lines = (json.loads(line) for line in self.log_path.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if event is None or line["event"] == event]

    def drain_audit(self) -> None:
        """Waits until every journal row is in the audit store."""
        eventually(self.status, lambda status: status.audit.unshipped == 0)

    def audited(self) -> Iterator[tuple[packet_pb2.DecisionPacket, str]]:
        """Every audited decision, in the order of the journal, with its reply status.

        They are read where the journal's rows are kept as they were written, so one that was shipped twice is here
        twice, and one that has no row among the decisions has the status "missing".
        """
        engine = sa.create_engine(self.database_url)
        try:
            with engine.connect() as connection:
                query = sa.select(DECISIONS.c.decision_id, DECISIONS.c.reply_status)
                statuses = dict(iter(connection.execute(query)))
        finally:
            engine.dispose()
        for entry in self._entries():
            if entry.HasField("decision"):
                yield entry.decision, statuses.get(entry.decision.decision.decision_id, "missing")

    def audited_changes(self) -> Iterator[packet_pb2.ControlChange]:
        """Every audited change, in the order of the journal."""
        return (entry.control_change for entry in self._entries() if entry.HasField("control_change"))

    def _entries(self) -> Iterator[packet_pb2.JournalEntry]:
        """The journal's entries, as they were shipped, each decision by itself."""
        engine = sa.create_engine(self.database_url)
        query = sa.select(JOURNAL_ENTRIES.c.entry).order_by(JOURNAL_ENTRIES.c.journal_id, JOURNAL_ENTRIES.c.position)
        try:
            with engine.connect() as connection:
                for (entry,) in connection.execute(query):
                    yield from singly(entry_of(entry))
        finally:
            engine.dispose()

    def verify_chain(self) -> None:
        """Walks the hash chains in database and journal; raises where one is broken."""
        stretches = list(reader.verify(self.database_url, self.journal_path))
        assert stretches
        assert all(isinstance(stretch, reader.Verified) for stretch in stretches)

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log_path.read_text()[-2_000:]
        try:
            server.ready(self._decision_port)
        except NotReadyError:
            return False
        return True
