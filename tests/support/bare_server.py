"""`python -m server` with nothing around it but what its environment names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from local.stack.errors import NotReadyError
from local.stack.parts import server
from local.stack.ports import free_ports, free_run
from pretrade.client import operator_token
from pretrade.client.credentials import ClientCredentials
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from support.harness import CAP_SECONDS, EDGE

MOST_PROCESSES: Final = 7
"""Of a server."""


def environment(directory: Path, **changes: str) -> dict[str, str]:
    """Settings of a server that finds neither Redis nor replicas, and is steered alone unless a Redis is named."""
    decision, admin, nowhere = free_ports(3)
    metrics = free_run(
        MOST_PROCESSES + 1
    )  # each of several has the next port, and so has the one that replaces another
    ours = {
        "PRETRADE_GRPC__EDGE": EDGE,
        "PRETRADE_GRPC__PORT": str(decision),
        "PRETRADE_ADMIN__PORT": str(admin),
        "PRETRADE_METRICS__PORT": str(metrics),
        "PRETRADE_REDIS_URL": f"redis://127.0.0.1:{nowhere}/0",
        "PRETRADE_REPLICAS__PRIMARY": f"127.0.0.1:{nowhere}",
        "PRETRADE_REPLICAS__SECONDARY": f"127.0.0.1:{nowhere}",
        "PRETRADE_REPLICAS__CHALLENGER": f"127.0.0.1:{nowhere}",
        "PRETRADE_DATABASE_URL": f"sqlite:///{directory / 'audit.db'}",
        "PRETRADE_JOURNAL__PATH": str(directory / "journal.db"),
        "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.2",
        "PRETRADE_BUDGET__CAP_SECONDS": str(CAP_SECONDS),
        "PRETRADE_CONTROL__SHARED__KEY": f"control:{directory}",
        "PRETRADE_CONTROL__INITIAL_TRADING_STATE": "ACTIVE",
        "PRETRADE_CONTROL__OUT_OF_DOMAIN": "false",
    }
    if "PRETRADE_REDIS_URL" not in changes:
        ours["PRETRADE_CONTROL__STORE"] = "file"
    return {name: value for name, value in os.environ.items() if not name.startswith("PRETRADE_")} | ours | changes


def admin_channel(env: Mapping[str, str], options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """A channel to the admin port of a server with this environment, which shows its operator token."""
    token_file = operator_token.path_from(env)
    return ClientCredentials(token_file=token_file).channel(f"127.0.0.1:{env['PRETRADE_ADMIN__PORT']}", options)


def is_ready(port: int) -> bool:
    try:
        server.ready(port)
    except NotReadyError:
        return False
    return True


def decide(port: int) -> pb.Decision:
    order = pb.Order(instrument="BTCUSDT.BINANCE", side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        return stub.Decide(pb.DecideRequest(order=order), timeout=5.0, wait_for_ready=True).decision
