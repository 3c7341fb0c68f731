"""A killed primary and a drift, brought into a healthy system: people are told of each once, and once when it is over.

All of it is real: the stack with two server processes, models trained for its market, Prometheus with the deployed
rules, Alertmanager, a webhook and a mail server. The comparison for drift looks back a minute instead of a quarter of
an hour, and its alert waits two minutes instead of thirty.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import grpc
import pytest
import yaml
from support.dashboards import RULES
from support.harness import eventually
from support.leash import LeashedPopen
from support.receivers import Mailbox, Webhook, serving, written_configuration

from feature_cache.sources.simulated.scenarios import ScenarioName
from local.stack.parts import alertmanager, market, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Stack
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(1_100)]

_GROUPED: Final = "20s"
"""How long Alertmanager waits for others of a group: longer than two servers differ."""
_DRIFT_LASTS: Final = "2m"
_ORDERS_EVERY_SECONDS: Final = 0.05


class World(NamedTuple):
    """A stack whose alerts are told, and orders that it gets."""

    stack: Stack
    posts: Webhook
    mails: Mailbox
    asking: threading.Event
    """Orders are sent while it is set."""

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        url = f"{self.stack.endpoints.prometheus_url}/api/v1/query?{urlencode({'query': expression})}"
        with urlopen(url, timeout=10) as response:
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found

    def firing(self) -> set[tuple[str, str]]:
        """(alert, instance) of what has fired since the beginning."""
        found = self.query('max_over_time(ALERTS{alertstate="firing"}[20m])')
        return {(one["metric"]["alertname"], one["metric"].get("instance", "")) for one in found}

    def posted(self) -> list[tuple[str, str, int]]:
        """Status, alert, and how many it is about, of all that the webhook got.

        Without those that say of two alerts that one is over: Alertmanager says so where the other one takes longer
        than it waits.
        """
        return [
            (one["status"], one["groupLabels"]["alertname"], len(one["alerts"]))
            for one in self.posts.received
            if len({alert["status"] for alert in one["alerts"]}) == 1
        ]

    def mailed(self) -> list[str]:
        """The subjects of all mails, without those of the same kind."""
        found = []
        for mail in self.mails.received:
            (part,) = mail.iter_parts()
            subject = str(mail["Subject"])
            if subject.startswith("RESOLVED") or "over: " not in part.get_content():
                found.append(subject)
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    if prometheus.program() is None or alertmanager.program() is None:
        pytest.skip("needs prometheus and prometheus-alertmanager (Debian's packages)")
    for name, value in {
        "DRIFT__INTERVAL_SECONDS": "3",
        "DRIFT__WINDOW_SECONDS": "60",
        "BUDGET__CAP_SECONDS": "1",  # what a busy machine makes late is not what is told here
    }.items():
        monkeypatch.setenv(f"PRETRADE_{name}", value)
    posts, mails, asking = Webhook(), Mailbox(), threading.Event()
    settings = LocalSettings(
        dir=tmp_path / "stack",
        processes=2,
        alerts=True,
        alertmanager_config=written_configuration(tmp_path, posts, mails, _GROUPED),
    )
    with serving(posts, mails), Stack(settings, parts=set(PARTS) - {"rules", "bars", "console"}) as stack:
        let_drift_be_told_sooner(stack, tmp_path)
        with orders(stack, asking):
            yield World(stack, posts, mails, asking)


def let_drift_be_told_sooner(stack: Stack, folder: Path) -> None:
    """Has Prometheus read the deployed rules anew, with one number changed."""
    path = folder / "stack" / "prometheus" / "prometheus.yaml"
    text = (RULES / "alerts.rules.yaml").read_text()
    changed, count = re.subn(r"(- alert: ModelDrift\n.*?for: )30m", rf"\g<1>{_DRIFT_LASTS}", text, flags=re.DOTALL)
    assert count == 1
    (folder / "alerts.rules.yaml").write_text(changed)
    found = yaml.safe_load(path.read_text())
    found["rule_files"] = [str(folder / "alerts.rules.yaml"), str(RULES / "slo.rules.yaml")]
    path.write_text(yaml.safe_dump(found))
    with urlopen(Request(f"{stack.endpoints.prometheus_url}/-/reload", method="POST"), timeout=10):
        pass


@contextlib.contextmanager
def orders(stack: Stack, asking: threading.Event) -> Iterator[None]:
    """Orders on both instruments and sides, for as long as the event is set."""
    done = threading.Event()
    every = list(itertools.product(stack.endpoints.instruments, (pb.SIDE_BUY, pb.SIDE_SELL)))

    def send() -> None:
        with grpc.insecure_channel(str(stack.endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            for instrument, side in itertools.cycle(every):
                if done.wait(_ORDERS_EVERY_SECONDS):
                    return
                if asking.is_set():
                    order = pb.Order(instrument=instrument, side=side, quantity=0.01, strategy="test")
                    with contextlib.suppress(grpc.RpcError):  # late on a busy machine, and not what is tested here
                        stub.Decide(pb.DecideRequest(order=order), timeout=2.0)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()


def wait_for_the_market(world: World) -> None:
    """Until both servers have fresh features of both instruments."""
    fresh = "count(pretrade_features_book_known == 1 and pretrade_feature_age_seconds < 0.5)"
    eventually(lambda: world.query(fresh), lambda found: bool(found) and float(found[0]["value"][1]) == 4)


def test_a_killed_primary_and_a_drift_are_each_told_once_and_once_more_when_they_are_over(world: World) -> None:
    stack = world.stack
    wait_for_the_market(world)
    world.asking.set()
    judged = "min(count_over_time(pretrade_drift_psi_limit{feature='score'}[10m]))"
    eventually(lambda: world.query(judged), lambda found: bool(found) and float(found[0]["value"][1]) >= 18, 300.0)
    assert len(world.query("count by (instance) (pretrade_drift_psi_limit)")) == 2
    assert world.firing() == set(), "for a minute and a half all is well"
    assert (world.posts.received, world.mails.received) == ([], [])

    pid = stack["primary"].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    world.asking.clear()  # nobody asks while there is no market: that would be another fault
    stack["market"].stop()
    other = market.argv(stack.endpoints, None, "1", ScenarioName.ONE_SIDED_FLOW)
    with LeashedPopen(other) as drifting:
        wait_for_the_market(world)
        world.asking.set()
        eventually(world.mailed, lambda subjects: len(subjects) == 2, 420.0)
        world.asking.clear()
        drifting.terminate()
    stack.restart("primary")
    stack.restart("market")
    wait_for_the_market(world)
    world.asking.set()
    eventually(world.mailed, lambda subjects: len(subjects) == 4, 420.0)

    instances = {one["metric"]["instance"] for one in world.query('up{job="pretrade-server"}')}
    assert len(instances) == 2
    assert world.firing() == {("ModelDrift", ""), *(("ReplicaDown", instance) for instance in instances)}
    assert sorted(world.posted()) == [
        ("firing", "ModelDrift", 1),
        ("firing", "ReplicaDown", 2),
        ("resolved", "ModelDrift", 1),
        ("resolved", "ReplicaDown", 2),
    ]
    assert sorted(world.mailed()) == [
        "RESOLVED ModelDrift of the model default",
        "RESOLVED ReplicaDown (2)",
        "TICKET ModelDrift of the model default",
        "TICKET ReplicaDown (2)",
    ]
