"""Whoever watches the server is slow or gone: no decision is late or lost for it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from support.bare_server import environment, is_ready
from support.decision_server import NOWHERE
from support.harness import ROOMY, eventually
from support.rig import OpenRig, Rig

from loadtest.generators.measurement import percentile
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack
Seen = Callable[[str], None]
EVERYTHING = {"TRACING__ONE_IN": "1", "TRACING__MAX_PER_SECOND": "10000"}
DECISIONS = 200


@contextmanager
def mute() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def timed(rig: Rig) -> list[float]:
    """Seconds of decisions, all of which a replica answered."""
    seconds = []
    for number in range(DECISIONS):
        started = time.monotonic()
        decision = rig.server.decide(order_ref=f"watched-{number}")
        seconds.append(time.monotonic() - started)
        # A busy machine may hold the primary up once; the answer of its hedge then says so.
        hedged = decision.source == pb.SOURCE_SECONDARY and decision.degradations
        assert decision.source == pb.SOURCE_PRIMARY or hedged, decision
    return seconds


@pytest.mark.long
@pytest.mark.fault(
    "F8",
    "The trace collector accepts connections and never answers",
    "Decisions are not affected. Lost spans are counted.",
)
def test_a_collector_that_never_answers_costs_no_decision(open_rig: OpenRig, seen: Seen) -> None:
    with mute() as collector:
        rig = open_rig(ROOMY | EVERYTHING | {"TRACING__OTLP_ENDPOINT": collector}, warm_up_calls=20)
        seconds = timed(rig)
        lost = eventually(lambda: rig.server.metric("pretrade_spans_not_exported_total"), lambda spans: spans > 0)
        began = time.monotonic()
        rig.server.stop()
        seen(
            f"{DECISIONS} of {DECISIONS} by a replica, p99 {1e3 * percentile(seconds, 0.99):.0f} ms; "
            f"{lost:.0f} spans not exported; stopped in {time.monotonic() - began:.1f} s"
        )


@pytest.mark.long
@pytest.mark.fault(
    "F8",
    "Nothing listens at the trace collector's address",
    "Decisions are not affected. The server's stop is not delayed.",
)
def test_a_collector_that_is_gone_costs_no_decision(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY | EVERYTHING | {"TRACING__OTLP_ENDPOINT": NOWHERE}, warm_up_calls=20)
    seconds = timed(rig)
    seen(f"{DECISIONS} of {DECISIONS} by a replica, p99 {1e3 * percentile(seconds, 0.99):.0f} ms")


@pytest.mark.long
@pytest.mark.fault(
    "F8", "50 scrapers request metrics and never read them", "Decisions are not affected. Other scrapers are served."
)
def test_scrapers_that_never_read_cost_no_decision(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY, warm_up_calls=20)
    with ExitStack() as opened:
        for _ in range(50):
            url = urlsplit(rig.server.metrics_url)
            assert url.hostname is not None
            scraper = opened.enter_context(socket.create_connection((url.hostname, url.port or 0)))
            scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        seconds = timed(rig)
        assert rig.server.metric("pretrade_decisions_total") >= DECISIONS
    seen(f"{DECISIONS} of {DECISIONS} by a replica, p99 {1e3 * percentile(seconds, 0.99):.0f} ms")


@pytest.mark.long
@pytest.mark.fault(
    "F8", "Nothing reads the log's pipe", "Decisions are not affected. Log lines are dropped and counted."
)
def test_a_log_that_nobody_reads_stops_no_decision(tmp_path: Path, seen: Seen) -> None:
    reading, writing = os.pipe()
    # Time enough for a slow disk: what is tested is whether it answers.
    patient = {"PRETRADE_BUDGET__CAP_SECONDS": "5", "PRETRADE_BUDGET__AUDIT_RESERVE_SECONDS": "1"}
    env = environment(tmp_path, PRETRADE_LOG_LEVEL="debug", **patient)
    port = int(env["PRETRADE_GRPC__PORT"])
    order = pb.Order(instrument="BTCUSDT.BINANCE", side=pb.SIDE_BUY, quantity=1.0, strategy="test")
    with subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=writing) as process:
        os.close(writing)
        try:
            eventually(lambda: is_ready(port), bool)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = decision_pb2_grpc.DecisionServiceStub(channel)
                for _ in range(500):
                    assert stub.Decide(pb.DecideRequest(order=order), timeout=5.0).decision.decision_id
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()
        said = 0
        while chunk := os.read(reading, 65_536):
            said += len(chunk)
        os.close(reading)
    assert said <= 65_536
    seen(f"500 of 500 answered with {said // 1024} KiB in the pipe; stopped as ever")
