"""The rig of the fault tests: real TorchServe replicas, and a decision server of the test's own in front of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import pytest

from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from support.decision_server import DecisionServer
from support.harness import CAP_SECONDS, INSTRUMENTS, ROOMY, Market, eventually
from support.invariants import Steered, Usage, check
from support.open_loop import Call, OpenLoop, Shape
from support.tcp_proxy import TcpProxy

REPLICAS: Final = ("primary", "secondary", "challenger")
CHAMPIONS: Final = ("primary", "secondary")

ROOMY_SECONDS: Final = CAP_SECONDS
"""Deadline of calls under `ROOMY`."""


@dataclass
class Rig:
    """A server and its surroundings."""

    stack: Stack
    """Valkey and the replicas' processes."""
    market: Market
    server: DecisionServer
    proxies: Mapping[str, TcpProxy]
    """The network between the server and those replicas for which a proxy was asked."""
    directory: Path
    before: Usage
    """What the server held when it was well and had answered a first load."""
    deadline_seconds: float
    timed: bool
    """Whether the run measures: see tests/support/figures.py."""
    loads: list[OpenLoop] = field(default_factory=list)
    others: list[Call] = field(default_factory=list)
    """Orders that a test asked for by itself, to be checked like those of the loads."""
    steered: list[Steered] = field(default_factory=list)
    """What `set_trading_state` asked for and heard."""

    def load(
        self,
        rate: float,
        *,
        seconds: float | None = None,
        shape: Shape = "unary",
        together: int = 16,
        at_once: int = 1,
        on_the_wire: bool = False,
    ) -> OpenLoop:
        """An open-loop load on the server, with references and a log of its own."""
        number = len(self.loads)
        load = OpenLoop(
            self.server.address,
            self.directory / f"load-{number}.log",
            rate,
            INSTRUMENTS,
            deadline_seconds=self.deadline_seconds,
            seconds=seconds,
            prefix=f"load{number}-",
            shape=shape,
            together=together,
            at_once=at_once,
            on_the_wire=on_the_wire,
        )
        self.loads.append(load)
        return load

    def calls(self) -> list[Call]:
        """The orders of every load, and the others."""
        return [call for load in self.loads for call in load.calls()] + self.others

    def check(self) -> str:
        """Checks I1 to I8 over every load; to be called once healed."""
        return check(self.server, self.calls(), self.before, self.steered, timed=self.timed)

    def set_trading_state(self, name: str) -> None:
        """Asks for ACTIVE, REDUCING or HALTED, and keeps what was heard."""
        state = admin_pb2.TradingState.Value(f"TRADING_STATE_{name}")
        request = admin_pb2.SetTradingStateRequest(state=state, author="test", reason="test")
        sent = time.monotonic()
        try:
            change = self.server.admin.SetTradingState(request, timeout=10.0).change
        except grpc.RpcError:
            self.steered.append(Steered(name, sent))
            raise
        self.steered.append(Steered(name, sent, time.monotonic(), change.change_id))


OpenRig = Callable[..., Rig]


@pytest.fixture(scope="session")
def replica_stack(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Stack]:
    """Valkey and three replicas, started once; `open_rig` heals them after each test."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("replicas"), model_store=model_store)
    with Stack(settings, parts={"valkey", *REPLICAS}) as stack:
        yield stack


@pytest.fixture
def open_rig(replica_stack: Stack, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[OpenRig]:
    """Opens a rig: `open_rig(settings, proxied=("primary",), endpoints={"secondary": address})`."""
    redis_url = replica_stack.endpoints.redis_url
    assert redis_url is not None
    with ExitStack() as opened:
        opened.callback(heal, replica_stack)
        market = Market(redis_url)
        writer = threading.Thread(target=market.run)
        writer.start()
        opened.callback(writer.join)
        opened.callback(market.stopped.set)

        def open_one(
            settings: Mapping[str, str] = ROOMY,
            *,
            proxied: Collection[str] = (),
            endpoints: Mapping[str, str] | None = None,
            deadline_seconds: float = ROOMY_SECONDS,
            warm_up_calls: int = 100,
            database_url: str | None = None,
        ) -> Rig:
            replicas = {name: str(getattr(replica_stack.endpoints, name)) for name in REPLICAS} | dict(endpoints or {})
            proxies = {name: opened.enter_context(TcpProxy(replicas[name])) for name in proxied}
            replicas |= {name: proxy.address for name, proxy in proxies.items()}
            made = DecisionServer(tmp_path, redis_url, settings=settings, database_url=database_url, **replicas)
            server = opened.enter_context(made)
            # What is not ours may be broken on purpose from the start.
            server.wait_until_well(*(name for name in CHAMPIONS if name not in (endpoints or {})))
            for number in range(warm_up_calls):
                with suppress(grpc.RpcError):  # too late on a busy machine: nobody has promised anything yet
                    server.decide(order_ref=f"warm-up-{number}")
            before, timed = Usage.of(server), bool(pytestconfig.getoption("figures"))
            return Rig(replica_stack, market, server, proxies, tmp_path, before, deadline_seconds, timed)

        yield open_one


def wait_for_more(load: OpenLoop, calls: int) -> None:
    """Waits until that many more calls have left."""
    wanted = len(load.calls()) + calls
    eventually(lambda: len(load.calls()), wanted.__le__)


def heal(stack: Stack) -> None:
    """Undoes whatever a test did to the replicas' processes."""
    for name in REPLICAS:
        stack[name].resume()
    with ThreadPoolExecutor() as pool:
        list(pool.map(stack.restart, [name for name in REPLICAS if not stack[name].alive]))
