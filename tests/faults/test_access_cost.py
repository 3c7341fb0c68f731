"""What credentials cost the decision path."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from support.harness import INSTRUMENTS
from support.secure_server import SecureServer, bearer
from support.server_group import EDGES

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from server.security.trial import KeyPair

pytestmark = [pytest.mark.stack, pytest.mark.long]
_CALLERS = 16
_SECONDS = 4.0


async def load(server: SecureServer, tls: bool, token: str | None, pair: KeyPair | None) -> list[float]:
    """Asks for decisions over a connection for each caller; seconds that each call took."""
    took: list[float] = []
    key, certificate = (None, None) if pair is None else (pair.key, pair.certificate)
    credentials = grpc.ssl_channel_credentials(server.authority.pem, key, certificate)
    order = pb.Order(order_ref="a", instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    request, metadata = pb.DecideRequest(order=order), bearer(token)
    clock = asyncio.get_running_loop().time
    until = clock() + _SECONDS

    async def call() -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = (
            grpc.aio.secure_channel(server.decision, credentials, options)
            if tls
            else grpc.aio.insecure_channel(server.decision, options)
        )
        async with channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            while clock() < until:
                started = clock()
                await stub.Decide(request, timeout=5.0, metadata=metadata)
                took.append(clock() - started)

    await asyncio.gather(*(call() for _ in range(_CALLERS)))
    return took


def cpu_seconds(server: SecureServer) -> float:
    """What the server's processes have used."""
    root = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(one.user + one.system for one in times)


@pytest.mark.fault(
    "F6", "TLS, tokens and client certificates are used on every call", "The CPU time of a call hardly grows."
)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.timeout(300)
def test_what_credentials_cost(edge: str, tmp_path: Path, seen: Callable[[str], None]) -> None:
    open_ports = {"ACCESS__ADMIN": "operator_token", "ACCESS__DECISION": "open"}
    cases = {
        "open": ("token", open_ports, False),
        "TLS": ("token", open_ports, True),
        "TLS and token": ("token", {}, True),
        "TLS and client certificate": ("certificate", {}, True),
    }
    cpu: dict[str, float] = {}
    for what, (credential, changes, tls) in cases.items():
        directory = tmp_path / what.replace(" ", "-")
        directory.mkdir()
        server = SecureServer(directory, credential, tls=tls)
        with server.running(GRPC__EDGE=edge, **changes):
            token = server.token("trader") if what == "TLS and token" else None
            pair = server.authority.certify("trader") if credential == "certificate" else None
            asyncio.run(load(server, tls, token, pair))  # warm
            before = cpu_seconds(server)
            took = asyncio.run(load(server, tls, token, pair))
            cpu[what] = (cpu_seconds(server) - before) / len(took)
        p99 = statistics.quantiles(took, n=100)[98]
        seen(f"{edge}, {what}: {cpu[what] * 1e6:.0f} µs of CPU a call, p99 {p99 * 1e3:.1f} ms, {len(took)} calls")
    assert cpu["TLS and token"] < 2 * cpu["TLS"]
    assert cpu["TLS and client certificate"] < 2 * cpu["TLS"]
