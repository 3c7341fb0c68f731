"""A whole decision server with real replicas, and a market whose features the test controls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar
from urllib.request import urlopen

import grpc
import numpy as np
import psutil
import pytest
import redis
from google.protobuf.duration_pb2 import Duration
from prometheus_client.parser import text_string_to_metric_families

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.vectors import key_of
from local.stack.parts import server
from local.stack.ports import free_ports
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.stack_file import Endpoints
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

T = TypeVar("T")

INSTRUMENTS: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
MID: Final = 60_000.0
CAP_SECONDS: Final = 3.0
"""What a server allows a decision in tests of who answers, not of how fast: a busy machine must not fail them."""
ROOMY: Final = {
    "BUDGET__CAP_SECONDS": str(CAP_SECONDS),
    "BUDGET__AUDIT_RESERVE_SECONDS": "0.5",
    "BREAKER__SLOW_SECONDS": "0.8",
    "BATCHER__MIN_PATIENCE_SECONDS": "0.5",
    "BATCHER__MAX_PATIENCE_SECONDS": "0.8",
    "ADMISSION__TARGET_SECONDS": "2",
    "GRPC__MAX_PENDING_CALLS": "1000",
}
"""Settings for tests of who answers, not of how fast: other work on the machine must not decide what they see. A host
that is shared takes both cores away for half a second now and then."""
TOO_LONG_SECONDS: Final = 1.2
"""Longer than a batch may take, or a replica be waited for, under `ROOMY`."""
DEADLINE_SECONDS: Final = 3.5
EDGE: Final = os.environ.get("TEST_EDGE", "grpcio")
"""Who speaks HTTP/2 with the callers in tests that do not say: `make faults EDGE=envoy`."""
PATIENCE_SECONDS: Final = 60.0
START_SECONDS: Final = 120.0
"""What a server may take to start, on a machine that has other work."""
_OBSERVE_EVERY_SECONDS: Final = 0.02
_TICK_SECONDS: Final = 0.05


def calm_values() -> np.ndarray[Any, np.dtype[np.float32]]:
    """A market on which every rule of the rules baseline agrees: tight, calm and balanced."""
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    values[features.INDEX["spread_bps"]] = 0.1
    values[features.INDEX["rv_5s_bps"]] = 1.0
    return values


def any_values(random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Some possible market, with a book of this moment."""
    values = np.clip(random.normal(size=features.N_FEATURES), features.MF1.lowest, features.MF1.highest).astype(
        np.float32
    )
    values[features.INDEX["book_age_ms"]] = 0.0
    return values


@dataclass
class Market:
    """Writes a fresh vector of every instrument to the real Redis every 50 ms, until paused."""

    redis_url: str
    state: BookState = BookState.VALID
    values: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=calm_values)
    moving: np.random.Generator | None = None
    """Draws every vector anew, in place of `values`; None for a market that stands still."""
    clock_offset_seconds: float = 0.0
    """By how much the market's wall clock is ahead."""
    stopped: threading.Event = field(default_factory=threading.Event)
    _paused: threading.Event = field(default_factory=threading.Event)

    def snapshot(self, instrument: str) -> FeatureSnapshot:
        now = time.time_ns() + int(self.clock_offset_seconds * 1e9)
        return FeatureSnapshot(
            instrument=instrument,
            sequence=time.time_ns(),  # counts up whatever the clock does, as the worker's does
            event_time_ns=now,
            book_time_ns=now,
            trade_time_ns=now,
            publish_time_ns=now,
            transit_ns=0,
            bid=MID - 0.5,
            ask=MID + 0.5,
            state=self.state,
            values=self.values if self.moving is None else any_values(self.moving),
        )

    def pause(self) -> None:
        """Publishes no more: features age from now on."""
        self._paused.set()

    def resume(self) -> None:
        self._paused.clear()

    def run(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            while not self.stopped.wait(_TICK_SECONDS):
                if self._paused.is_set():
                    continue
                for instrument in INSTRUMENTS:
                    packed = encode(self.snapshot(instrument))
                    client.set(key_of(instrument), packed, px=10_000)
                    client.publish(key_of(instrument), packed)


class Asking:
    """What tests ask of a running server and steer in it, by the stubs of its two services."""

    decisions: decision_pb2_grpc.DecisionServiceStub
    admin: admin_pb2_grpc.AdminServiceStub

    def order(self, **changes: Any) -> pb.Order:
        """A sound limit order at the mid."""
        fields: dict[str, Any] = {
            "order_ref": "o-1",
            "instrument": INSTRUMENTS[0],
            "side": pb.SIDE_BUY,
            "quantity": 0.01,
            "limit_price": MID,
            "strategy": "test",
        }
        return pb.Order(**(fields | changes))

    def decide(self, deadline_seconds: float = DEADLINE_SECONDS, **changes: Any) -> pb.Decision:
        request = pb.DecideRequest(order=self.order(**changes))
        return self.decisions.Decide(request, timeout=deadline_seconds).decision

    def status(self) -> admin_pb2.GetStatusResponse:
        return self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)

    def replica(self, name: str) -> admin_pb2.ReplicaStatus:
        return next(replica for replica in self.status().replicas if replica.name == name)

    def force(self, replica: str, mode: admin_pb2.BreakerMode.ValueType, expires_in: Duration | None = None) -> None:
        request = admin_pb2.SetBreakerRequest(
            replica=replica, mode=mode, expires_in=expires_in, author="test", reason="test"
        )
        self.admin.SetBreaker(request, timeout=5.0)

    def switch(self, flag: str, enabled: bool) -> None:
        request = admin_pb2.SetFlagRequest(name=flag, enabled=enabled, author="test", reason="test")
        self.admin.SetFlag(request, timeout=5.0)

    def wait_for_breaker(self, replica: str, state: admin_pb2.BreakerState.ValueType) -> None:
        eventually(lambda: self.replica(replica).breaker_state, lambda seen: seen == state)

    def decide_until(self, source: pb.Source.ValueType, **changes: Any) -> pb.Decision:
        """Decides again and again until `source` answers."""
        return eventually(lambda: self.decide(**changes), lambda decision: decision.source == source)


@dataclass
class Product(Asking):
    """A running server with its replicas, and stubs to talk to it."""

    stack: Stack
    market: Market
    decisions: decision_pb2_grpc.DecisionServiceStub
    admin: admin_pb2_grpc.AdminServiceStub

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series of the server's metrics; 0 when it is not there."""
        with urlopen(f"{self.stack.endpoints.metrics_url}/metrics", timeout=5.0) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = (sample for family in families for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == name and sample.labels == labels)


def deciding(pid: int | None) -> psutil.Process:
    """The process that decides, of a server that was started as `pid`: behind Envoy a child of that."""
    started = psutil.Process(pid)
    return next((child for child in started.children() if child.name() == "envoy"), started)


def eventually(observe: Callable[[], T], accept: Callable[[T], bool], patience_seconds: float = PATIENCE_SECONDS) -> T:
    """Observes until it is accepted, for so long at most.

    Not without a pause: whoever observes shares the machine, and often the server, with what is observed.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        seen = observe()
        if accept(seen):
            return seen
        assert time.monotonic() < deadline, f"not within {patience_seconds} s; last seen: {seen}"
        time.sleep(_OBSERVE_EVERY_SECONDS)


def listened_on(stack: Stack) -> set[str]:
    """The addresses on which the parts of a stack listen."""
    return {
        connection.laddr.ip
        for part in stack.processes.values()
        for process in part.tree()
        for connection in process.net_connections()
        if connection.status == "LISTEN"
    }


def has_ended(process: psutil.Process) -> bool:
    """Whether a process runs no more. One whose parent is gone may stay a zombie for as long as init takes, or for good
    in a container whose first process looks after no others."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class CallingThreads:
    """Callers in the background, each in a thread of its own, from entering the context until leaving it."""

    count: int = field(default=8, kw_only=True)
    _stopped: threading.Event = field(init=False, default_factory=threading.Event)
    _threads: list[threading.Thread] = field(init=False, default_factory=list)

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _call(self, number: int) -> None:
        """Calls again and again until `_stopped`."""
        raise NotImplementedError


@dataclass
class Load(CallingThreads):
    """Decisions asked for in the background, one after another in several threads, until stopped."""

    product: Product
    decisions: list[pb.Decision] = field(default_factory=list)
    errors: list[grpc.RpcError] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def sources(self) -> set[pb.Source.ValueType]:
        return {decision.source for decision in list(self.decisions)}

    def wait_for_more(self, decisions: int) -> None:
        """Waits until that many more decisions were made."""
        wanted = len(self.decisions) + decisions
        eventually(lambda: len(self.decisions) + len(self.errors), lambda count: count >= wanted)

    def _call(self, number: int) -> None:
        side = pb.SIDE_BUY if number % 2 else pb.SIDE_SELL
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                self.decisions.append(self.product.decide(side=side, order_ref=f"load-{number}"))
            except grpc.RpcError as error:
                self.errors.append(error)
            self.seconds.append(time.monotonic() - started)


@pytest.fixture(scope="session")
def product_stack(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Stack]:
    decision, admin, metrics = free_ports(3)  # the default ports are those of a user's own stack
    settings = LocalSettings(
        dir=tmp_path_factory.mktemp("product"),
        model_store=model_store,
        instruments=INSTRUMENTS,
        market=False,
        decision_port=decision,
        admin_port=admin,
        metrics_port=metrics,
    )
    parts = {"valkey", "postgres", "primary", "secondary", "challenger", "server"}
    before = dict(os.environ)
    # Other work on this machine must not decide what these tests see: what is tested here is who answers, not how fast.
    os.environ |= {
        # The vectors of these tests are none of a market.
        "PRETRADE_CONTROL__OUT_OF_DOMAIN": "false",
        **{f"PRETRADE_{name}": value for name, value in ROOMY.items()},
        "PRETRADE_STARTUP_PATIENCE_SECONDS": "0.5",
        "PRETRADE_GRPC__READ_SECONDS": "1",
        "PRETRADE_GRPC__EDGE": EDGE,
        "PRETRADE_CANARY__SLOW_SECONDS": "10",
        "PRETRADE_CANARY__INDEPENDENT_SECONDS": "0.1",
        "PRETRADE_CANARY__MIN_OUTCOMES": "0",
        "PRETRADE_CANARY__MAX_FALLBACK_SHARE": "0.9",
        "PRETRADE_CANARY__MAX_ERROR_EXCESS": "0.9",
        "PRETRADE_SLO__OBJECTIVE": "0.5",
    }
    try:
        with Stack(settings, parts=parts) as stack:
            yield stack
    finally:
        os.environ.clear()
        os.environ |= before


def stack_admin_channel(endpoints: Endpoints, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """A channel to the admin port of a stack's server, which shows its operator token."""
    return server.admin_credentials(endpoints).channel(str(endpoints.admin), options)


@pytest.fixture
def product(product_stack: Stack) -> Iterator[Product]:
    """The server with everything well: replicas healthy, breakers automatic, features fresh, trading active."""
    endpoints = product_stack.endpoints
    assert endpoints.redis_url is not None
    market = Market(endpoints.redis_url)
    writer = threading.Thread(target=market.run)
    writer.start()
    with (
        grpc.insecure_channel(str(endpoints.decision)) as decisions,
        stack_admin_channel(endpoints) as admin,
    ):
        product = Product(
            product_stack,
            market,
            decision_pb2_grpc.DecisionServiceStub(decisions),
            admin_pb2_grpc.AdminServiceStub(admin),
        )
        try:
            eventually(product.status, _is_well)
            yield product
        finally:
            market.stopped.set()
            writer.join()
            _heal(product)


def _is_well(status: admin_pb2.GetStatusResponse) -> bool:
    return (
        status.ready
        and all(feature.usable for feature in status.features)
        and all(
            replica.healthy and replica.breaker_state == admin_pb2.BREAKER_STATE_CLOSED for replica in status.replicas
        )
    )


def _heal(product: Product) -> None:
    """Undoes whatever a test did."""
    names = ("primary", "secondary", "challenger")
    for name in names:
        product.stack[name].resume()
    with ThreadPoolExecutor() as pool:
        list(pool.map(product.stack.restart, [name for name in names if not product.stack[name].alive]))
    for name in names:
        product.force(name, admin_pb2.BREAKER_MODE_AUTOMATIC)
    for flag in ("shadow", "cached_score", "embedded"):
        product.switch(flag, True)
    product.admin.SetChain(admin_pb2.SetChainRequest(author="test", reason="heal"), timeout=5.0)
    active = admin_pb2.SetTradingStateRequest(state=admin_pb2.TRADING_STATE_ACTIVE, author="test", reason="heal")
    product.admin.SetTradingState(active, timeout=5.0)
