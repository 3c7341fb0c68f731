"""`pretrade decide`: what it sends, and what it says of an order that it cannot send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from pretrade.client.cli import connection
from pretrade.client.cli.main import app
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

ANSWER = pb.DecideResponse(
    decision=pb.Decision(decision_id="d", order_ref="cli", action=pb.ACTION_NO_TRADE, source=pb.SOURCE_PRIMARY),
    explanation=pb.Explanation(status=pb.EXPLANATION_STATUS_READY, model_version="aa" * 8),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[pb.DecideRequest, float]]:
    """The requests that reached the server, each with the call's own timeout in seconds."""
    requests: list[tuple[pb.DecideRequest, float]] = []

    class Stub:
        def __init__(self, channel: object) -> None: ...

        def Decide(self, request: pb.DecideRequest, timeout: float) -> pb.DecideResponse:
            requests.append((request, timeout))
            return ANSWER

    @contextmanager
    def connected(*_: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(connection, "connected", connected)
    monkeypatch.setattr(grpc, "channel_ready_future", lambda _: SimpleNamespace(result=lambda _: None))
    monkeypatch.setattr(decision_pb2_grpc, "DecisionServiceStub", Stub)
    return requests


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["decide", "BTCUSDT.SIM", "buy", "0.05", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_no_more_time_is_allowed_than_was_asked_for(asked: list[tuple[pb.DecideRequest, float]]) -> None:
    run("--timeout-ms", "0.5")
    ((request, timeout),) = asked
    assert request.order.timeout.ToNanoseconds() == 500_000, "gRPC makes a whole millisecond of it"
    assert timeout == 0.0005


@pytest.mark.parametrize("explain", [(), ("--explain",)])
def test_json_has_the_names_of_the_contract(
    asked: list[tuple[pb.DecideRequest, float]], explain: tuple[str, ...]
) -> None:
    document = json.loads(run("--json", *explain))
    decision = document["decision"] if explain else document
    assert decision["decision_id"] == "d"
    assert ("model_version" in document.get("explanation", {})) == bool(explain)


def decide(*words: str) -> Result:
    return CliRunner().invoke(app, ["decide", *words, "--target", "127.0.0.1:9"], env={"COLUMNS": "200"})


@pytest.mark.parametrize("quantity", ["-0.05", "-1", "-.5"])
def test_a_negative_quantity_is_called_that_and_no_option(quantity: str) -> None:
    found = decide("BTCUSDT.SIM", "buy", quantity)
    assert found.exit_code == 2
    assert f"{quantity} is negative: a quantity is a positive number" in found.output
    assert "No such option" not in found.output


def test_an_option_may_have_a_negative_value_and_a_misspelt_one_is_still_one() -> None:
    assert decide("BTCUSDT.SIM", "buy", "0.05", "--limit", "-1").exit_code == 3
    misspelt = decide("BTCUSDT.SIM", "buy", "0.05", "--limt", "5")
    assert (misspelt.exit_code, "No such option" in misspelt.output) == (2, True)
