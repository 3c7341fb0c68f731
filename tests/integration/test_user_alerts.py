"""An alert that a user defines by the command: from the server by Prometheus and Alertmanager to a webhook, once."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from support.harness import eventually
from support.receivers import Mailbox, Webhook, serving, written_configuration
from typer.testing import CliRunner

from local.stack.parts import alertmanager, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.client.cli.main import app
from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(500)]

PARTS = ("valkey", "server", "alertmanager", "prometheus", "rules")
"""Without a market every answer is ABSTAIN, which is what the alert is about."""


@pytest.fixture
def pages() -> Webhook:
    return Webhook()


@pytest.fixture
def stack(tmp_path: Path, pages: Webhook) -> Iterator[Stack]:
    if prometheus.program() is None or alertmanager.program() is None:
        pytest.skip("needs prometheus and prometheus-alertmanager (Debian's packages)")
    mails = Mailbox()
    configuration = written_configuration(tmp_path, pages, mails)
    nothing = "127.0.0.1:1"
    settings = LocalSettings(
        dir=tmp_path / "stack",
        alerts=True,
        alertmanager_config=configuration,
        instruments=("BTCUSDT.SIM",),
        primary=nothing,
        secondary=nothing,
        challenger=nothing,
    )
    with serving(pages, mails), Stack(settings, parts=PARTS) as stack:
        yield stack


@pytest.fixture
def orders(stack: Stack) -> Iterator[threading.Event]:
    """Orders of two strategies until the event is set."""
    done = threading.Event()

    def send() -> None:
        with grpc.insecure_channel(str(stack.endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            while not done.wait(0.2):
                for strategy in ("twap", "vwap"):
                    order = decision_pb2.Order(
                        instrument="BTCUSDT.SIM", side=decision_pb2.SIDE_BUY, quantity=0.01, strategy=strategy
                    )
                    with contextlib.suppress(grpc.RpcError):  # late on a busy machine, and not what is tested here
                        stub.Decide(decision_pb2.DecideRequest(order=order), timeout=2.0)

    sender = threading.Thread(target=send)
    sender.start()
    yield done
    done.set()
    sender.join()


def rules(stack: Stack) -> dict[str, Any]:
    """The users' rules that Prometheus has, by name."""
    with urlopen(f"{stack.endpoints.prometheus_url}/api/v1/rules?type=alert", timeout=10) as response:
        groups = json.load(response)["data"]["groups"]
    return {one["name"]: one for group in groups if group["name"] == "pretrade-user" for one in group["rules"]}


def test_an_alert_of_a_user_is_told_once_and_once_more_when_it_is_over(
    stack: Stack, orders: threading.Event, pages: Webhook, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["alerts", "rules", *arguments, "--dir", str(tmp_path / "stack")])
        assert done.exit_code == 0, done.output
        return done.output

    share = ("--share", "abstain", "--window", "1m", "--above", "0.9", "--severity", "page", "--reason", "a test")
    run("set", "twap-abstains", "--strategy", "twap", *share)
    run("set", "sweep-abstains", "--strategy", "sweep", *share)
    assert "twap-abstains: page while ABSTAIN share of strategy twap" in run("list")
    eventually(lambda: rules(stack), lambda found: set(found) == {"twap-abstains", "sweep-abstains"}, 60.0)
    told = eventually(lambda: pages.told("twap-abstains"), bool, 120.0)
    assert told == ["firing"]
    (alert,) = pages.received[0]["alerts"]
    assert alert["labels"] == {"alertname": "twap-abstains", "severity": "page", "rule": "user"}
    assert alert["annotations"]["summary"] == "ABSTAIN share of strategy twap is 1: above 0.9"
    orders.set()
    over = eventually(lambda: pages.told("twap-abstains"), lambda seen: len(seen) > 1, 240.0)
    assert over == ["firing", "resolved"]
    assert pages.told("sweep-abstains") == [], "nobody trades it"
    run("delete", "twap-abstains", "--reason", "done")
    eventually(lambda: rules(stack), lambda found: set(found) == {"sweep-abstains"}, 60.0)
