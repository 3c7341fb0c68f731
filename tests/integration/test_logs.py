"""What the server writes to its log: JSON lines, with everything that on-call searches by and nothing secret."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import yaml
from support.bare_server import environment, is_ready
from support.harness import eventually

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

SECRET = "hunter2-d41d8cd9"
COLLECTOR = Path(__file__).parents[2] / "k8s" / "observability" / "otel" / "collector.yaml"
PRICE, QUANTITY = 61_234.5678, 0.98765432


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """The log's lines of a server whose every neighbour is missing, and its metrics."""
    directory = tmp_path_factory.mktemp("logged")
    env = environment(
        directory,
        PRETRADE_REDIS_URL=f"redis://user:{SECRET}@127.0.0.1:9/0",
        PRETRADE_DATABASE_URL=f"postgresql+psycopg://pretrade:{SECRET}@127.0.0.1:9/audit",
        PRETRADE_TRACING__OTLP_ENDPOINT="127.0.0.1:9",
        PRETRADE_LOG_LEVEL="debug",
    )
    log = directory / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen([sys.executable, "-m", "server"], env=env, stderr=errors) as process,
    ):
        try:
            port = int(env["PRETRADE_GRPC__PORT"])
            eventually(lambda: is_ready(port), bool)
            decide(port)
            eventually(log.read_text, lambda text: '"event": "decision"' in text)
            eventually(log.read_text, lambda text: "audit" in text)
            with urlopen(f"http://127.0.0.1:{env['PRETRADE_METRICS__PORT']}/metrics", timeout=5) as response:
                metrics = response.read().decode()
            process.terminate()
            process.wait(30)
        finally:
            process.kill()
    return log.read_text().splitlines(), metrics


def decide(port: int) -> None:
    order = pb.Order(
        order_ref="ref-1",
        instrument="BTCUSDT.BINANCE",
        side=pb.SIDE_BUY,
        quantity=QUANTITY,
        limit_price=PRICE,
        strategy="alpha",
    )
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        stub.Decide(pb.DecideRequest(order=order), timeout=5.0, metadata=(("x-correlation-id", "basket-7"),))


@pytest.mark.long
def test_every_line_is_json_with_time_level_and_component(said: tuple[list[str], str]) -> None:
    lines = [json.loads(line) for line in said[0]]
    assert all({"event", "timestamp", "level"} <= set(line) for line in lines)
    assert all("component" in line for line in lines)


def test_a_degraded_decision_is_one_canonical_line(said: tuple[list[str], str]) -> None:
    (line,) = [line for line in map(json.loads, said[0]) if line["event"] == "decision"]
    assert line["cause"] == "degraded"
    assert (line["order_ref"], line["strategy"], line["correlation_id"]) == ("ref-1", "alpha", "basket-7")
    assert line["action"] == "ACTION_ABSTAIN"
    assert len(line["decision_id"]) == 36
    assert len(line["trace_id"]) == 32
    assert "DEGRADATION_FEATURES_MISSING" in line["degradations"]
    assert 0 < line["used_us"] <= line["allowed_us"]
    operators = yaml.safe_load(COLLECTOR.read_text())["receivers"]["filelog"]["operators"]
    searched = {field.removeprefix("attributes.") for field in operators[-1]["fields"]}
    assert searched <= set(line), "what the collector has Loki search by"


def test_nothing_secret_is_told(said: tuple[list[str], str]) -> None:
    """Neither the passwords nor what somebody is about to trade."""
    lines, metrics = said
    told = "\n".join(lines) + metrics
    for secret in (SECRET, str(PRICE), str(QUANTITY)):
        assert secret not in told
