"""Health under watchers that do not read: each holds up itself alone, and everybody else hears the truth."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.bare_server import decide, environment, is_ready
from support.harness import eventually
from support.server_group import EDGES
from support.wire import STREAM, Caller, framed

from pretrade.decision.v1 import decision_pb2 as pb

Seen = Callable[[str], None]
SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
WATCH: Final = "/grpc.health.v1.Health/Watch"
SERVICES: Final = ("", "pretrade.decision.v1.DecisionService", "journal")
"""The server as a whole under both of its names, and a component that it cannot be without."""
WITHIN_SECONDS: Final = 1.0
DISK_MEBIBYTES: Final = 384


class Heard:
    """What a caller that reads hears of a service, on a port: as a watcher, and as one that asks."""

    def __init__(self, channel: grpc.Channel, port: str, service: str) -> None:
        self.name = f"{service or 'the server'} on the {port} port"
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
        self._check = stub.Check
        self._request = health_pb2.HealthCheckRequest(service=service)
        self._watched: queue.Queue[int] = queue.Queue()
        self._watch = stub.Watch(self._request, wait_for_ready=True)
        threading.Thread(target=self._listen, daemon=True).start()
        self.last = self._watched.get(timeout=10)

    def _listen(self) -> None:
        try:
            for answer in self._watch:
                self._watched.put(answer.status)
        except grpc.RpcError:
            pass  # the end of the test, or of the server

    def is_true(self, status: int) -> bool:
        """Whether it is what both were told last."""
        while not self._watched.empty():
            self.last = self._watched.get()
        return bool(self.last == status and self._check(self._request, timeout=5).status == status)


@contextmanager
def disk(path: Path) -> Iterator[Path]:
    """A small file system that the test may fill."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.long
@pytest.mark.stack
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.fault(
    "G4",
    "Health watchers, a stream and a scraper stop reading",
    "Every other health watcher gets the true state within one second.",
)
def test_a_watcher_that_does_not_read_keeps_the_truth_from_nobody_else(tmp_path: Path, edge: str, seen: Seen) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(disk(tmp_path / "disk"))
        settings = {"GRPC__EDGE": edge, "GRPC__DRAIN_SECONDS": "4"}
        env = environment(directory, **{f"PRETRADE_{name}": value for name, value in settings.items()})
        ports = {"decision": int(env["PRETRADE_GRPC__PORT"]), "admin": int(env["PRETRADE_ADMIN__PORT"])}
        server = stack.enter_context(subprocess.Popen([sys.executable, "-m", "server"], env=env))
        stack.callback(server.kill)
        eventually(lambda: is_ready(ports["decision"]), bool)
        honest = []
        for name, port in ports.items():
            deaf = stack.enter_context(Caller(f"127.0.0.1:{port}", window=0))
            for service in SERVICES:
                request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
                deaf.send(deaf.begin(WATCH), framed(request), end=True)
            assert deaf.read(lambda deaf=deaf: all(one.headers for one in deaf.replies.values()))  # type: ignore[misc]
            channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
            honest += [Heard(channel, name, service) for service in SERVICES]
        deaf = stack.enter_context(Caller(f"127.0.0.1:{ports['decision']}", window=0))
        order = pb.Order(order_ref="x", instrument="BTCUSDT.BINANCE", side=pb.SIDE_BUY, quantity=1.0, strategy="test")
        orders = framed(pb.DecideStreamRequest(order=order).SerializeToString()) * 200
        deaf.send(deaf.begin(STREAM), orders)
        scraper = socket.create_connection(("127.0.0.1", int(env["PRETRADE_METRICS__PORT"])))
        stack.callback(scraper.close)
        scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)

        def hear(status: int) -> float:
            """Seconds until everybody who reads has heard it."""
            began = time.monotonic()
            missing = eventually(lambda: [one.name for one in honest if not one.is_true(status)], lambda left: not left)
            assert missing == []
            return time.monotonic() - began

        hear(SERVING)
        full = directory / "full"
        with full.open("wb", buffering=0) as file:  # else what is left in a buffer fails again when it is closed
            try:
                while file.write(bytes(65_536)):
                    pass
            except OSError:
                pass
        eventually(lambda: decide(ports["decision"]), lambda found: pb.REASON_CODE_AUDIT_UNAVAILABLE in found.reasons)
        broken = hear(NOT_SERVING)
        full.unlink()
        eventually(
            lambda: decide(ports["decision"]), lambda found: pb.REASON_CODE_AUDIT_UNAVAILABLE not in found.reasons
        )
        healed = hear(SERVING)
        server.send_signal(signal.SIGTERM)
        drained = hear(NOT_SERVING)
        seen(f"journal broken: {broken:.2f} s; well again: {healed:.2f} s; draining: {drained:.2f} s")
        assert max(broken, healed, drained) <= WITHIN_SECONDS
        assert server.wait(30) == 0
