"""Users that send orders one after another with a pause between them; for Locust, which spreads them over machines.

    locust -f loadtest/locust/locustfile.py --headless --users 50 --run-time 30s --host 127.0.0.1:7001

A user is a trading process with its own connection and its own flow of orders. Decisions are counted by source. Python
costs more here than in the other load generators: use it for many users and long runs, not to find the highest rate.
"""

# Locust is not installed where the types are checked: the extra `loadtest` brings it.
# mypy: disable-error-code="import-not-found,misc,untyped-decorator"

from __future__ import annotations

import itertools
import math
import os
import time

import grpc
import grpc.experimental.gevent
from locust import User, constant_throughput, task

from loadtest.generators.orders import OrderFlow
from pretrade.client.enum_names import enum_name
from pretrade.client.retries import retry_delay
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

# Locust runs on gevent; without this one call would block all users.
grpc.experimental.gevent.init_gevent()

INSTRUMENTS = os.environ.get("INSTRUMENTS", "BTCUSDT.BINANCE,ETHUSDT.BINANCE").split(",")
DEADLINE_SECONDS = float(os.environ.get("DEADLINE_MS", "100")) / 1e3
ORDERS_PER_SECOND = float(os.environ.get("ORDERS_PER_SECOND", "10"))
"""Of one user."""

_numbers = itertools.count(1)


class TradingProcess(User):
    """Sends orders to `Decide` and checks every answer."""

    wait_time = constant_throughput(ORDERS_PER_SECOND)

    def on_start(self) -> None:
        """Connects."""
        if self.host is None:
            raise ValueError("--host: name the server, host:port")
        number = next(_numbers)
        self.flow = OrderFlow(INSTRUMENTS, seed=number, ref_prefix=f"locust-{os.getpid()}-{number}-")
        # Its own connection, as another process would have.
        self.channel = grpc.insecure_channel(self.host, options=(("grpc.use_local_subchannel_pool", 1),))
        grpc.channel_ready_future(self.channel).result(timeout=10)
        self.stub = decision_pb2_grpc.DecisionServiceStub(self.channel)

    def on_stop(self) -> None:
        """Disconnects."""
        self.channel.close()

    @task
    def decide(self) -> None:
        """One order; reported under the source that answered."""
        order = self.flow.next({})
        name, length, pause = "Decide", 0, 0.0
        failure: Exception | None = None
        began = time.perf_counter()
        try:
            response = self.stub.Decide(pb.DecideRequest(order=order), timeout=DEADLINE_SECONDS)
            length = response.ByteSize()
            name = f"Decide from {enum_name(pb.Source, response.decision.source)}"
            if response.decision.order_ref != order.order_ref:
                failure = ValueError(f"{order.order_ref} was answered with {response.decision.order_ref}")
        except grpc.RpcError as error:
            # Locust counts failures by their text, so it must not hold a time of day.
            failure = RuntimeError(error.code().name)
            delay = retry_delay(error)
            pause = delay if delay is not None and math.isfinite(delay) else 0.0
        self.environment.events.request.fire(
            request_type="gRPC",
            name=name,
            response_time=1e3 * (time.perf_counter() - began),
            response_length=length,
            exception=failure,
            context={},
        )
        time.sleep(pause)  # as the server asks; Locust lets other users run meanwhile
