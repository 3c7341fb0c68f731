"""`pretrade decide`: what it sends, and what it says of an order that it cannot send."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from support.guest_sets import know
from typer.testing import CliRunner, Result

from feature_cache.feature_set import CALLER, Feature, FeatureSet
from feature_cache.feature_sets import Registered
from pretrade.client.cli import connection
from pretrade.client.cli import decide as deciding
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


def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has installed what the server declares for `pretrade`, and two sets known that callers bring features of."""
    root = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())
    lookups = root["project"]["entry-points"]["pretrade.lookups"]

    def installed(*, group: str, name: str) -> list[EntryPoint]:
        assert group == "pretrade.lookups"
        return [EntryPoint(name, lookups[name], group)]

    monkeypatch.setattr(deciding, "entry_points", installed)
    mood = Feature("mood", "", "The caller's view.", source=CALLER)
    sets = [
        FeatureSet("one", (Feature("spread_bps", "bps", "Copied.", 0.0, 2e4, source="mf1"), URGENCY)),
        FeatureSet("two", (mood, URGENCY)),
    ]
    know(monkeypatch, *(Registered(one, None, "this test") for one in sets))


URGENCY = Feature("urgency", "", "The caller's view.", 0.0, 1.0, source=CALLER)


def test_a_feature_is_brought_by_its_name(
    asked: list[tuple[pb.DecideRequest, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    declared(monkeypatch)
    run("--feature", "urgency=0.9", "--feature", "mood=-1")
    run("--feature", "urgency=0.9", "--feature-set", "one")
    run()
    two, one, none = (request.order for request, _ in asked)
    assert (two.features.feature_set_id, list(two.features.values)) == ("two", [-1.0, pytest.approx(0.9)])
    assert one.features.feature_set_id == "one"
    spread, urgency = one.features.values
    assert math.isnan(spread), "that is left to the server"
    assert urgency == pytest.approx(0.9)
    assert not none.HasField("features")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--feature", "urgency"], "'urgency' is not NAME=VALUE, for example urgency=0.9"),
        (["--feature", "urgency=high"], "'urgency=high' is not NAME=VALUE"),
        (["--feature", "urgency=0.9"], "callers bring urgency for one, two: name the set"),
        (["--feature", "spread_bps=1"], "no set known here has callers bring spread_bps: mf1/"),
        (["--feature", "urgency=1", "--feature-set", "mf1"], "mf1 has no feature urgency: it has spread_bps"),
        (["--feature", "urgency=1", "--feature-set", "six"], "'six' is no set known here: mf1/"),
    ],
)
def test_a_feature_that_cannot_be_brought_is_named(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared(monkeypatch)
    found = decide("BTCUSDT.SIM", "buy", "0.05", *words)
    assert (found.exit_code, message in " ".join(found.output.split())) == (2, True), found.output


def test_the_light_distribution_says_that_it_knows_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "entry_points", lambda **_: [])
    found = decide("BTCUSDT.SIM", "buy", "0.05", "--feature", "urgency=0.9")
    assert (found.exit_code, "known where pretrade-server is installed" in found.output) == (2, True), found.output
