"""A real Prometheus scrapes the whole stack: every query of every dashboard, and every rule, has an answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import grpc
import pytest
import yaml
from support.dashboards import OBSERVABILITY, RULES, Query, queries
from support.harness import eventually, stack_admin_channel
from support.on_call import TITLE, burning, picture
from support.receivers import Mailbox, Webhook, running_alertmanager, serving

from local.stack.ports import free_ports
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.client.cli.worst import faults
from pretrade.client.stack_file import StackFile
from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(400)]


def adapter_rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]
    return found


POD = {"namespace": "pretrade", "pod": "server-0"}
"""What Kubernetes' service discovery adds, and the autoscaler's queries go by."""


SOON = ("ReplicaDown", "ModelDrift")
"""Alerts that are told here as soon as they have lasted for some seconds."""


class Prometheus:
    """A server of ours, and what it answers."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        with urlopen(f"{self._url}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as response:
            result: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return result

    def alerts(self) -> set[tuple[str, str]]:
        """(name, replica or nothing) of the alerts that are pending or firing."""
        with urlopen(f"{self._url}/api/v1/alerts", timeout=10) as response:
            alerts = json.load(response)["data"]["alerts"]
        return {(alert["labels"]["alertname"], alert["labels"].get("replica", "")) for alert in alerts}

    def failed_rules(self) -> list[str]:
        """Errors of the rules' last evaluations; rules not evaluated yet count as failed."""
        with urlopen(f"{self._url}/api/v1/rules", timeout=10) as response:
            groups = json.load(response)["data"]["groups"]
        return [f"{rule['name']}: {rule}" for group in groups for rule in group["rules"] if rule["health"] != "ok"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitored")


@pytest.fixture(scope="module")
def stack(directory: Path, model_store: Path) -> Iterator[Stack]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PRETRADE_DRIFT__INTERVAL_SECONDS", "2")
        environment.setenv("PRETRADE_DRIFT__WINDOW_SECONDS", "60")
        with Stack(LocalSettings(dir=directory, model_store=model_store)) as stack:
            yield stack


@pytest.fixture(scope="module")
def orders(stack: Stack) -> Iterator[threading.Event]:
    """A trickle of orders for as long as the tests of this file run, or until the event is set."""
    done = threading.Event()

    def send() -> None:
        with grpc.insecure_channel(str(stack.endpoints.decision)) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            order = decision_pb2.Order(
                instrument=stack.endpoints.instruments[0], side=decision_pb2.SIDE_BUY, quantity=0.01, strategy="test"
            )
            while not done.wait(0.05):
                with contextlib.suppress(grpc.RpcError):  # late on a busy machine, and not what is tested here
                    stub.Decide(decision_pb2.DecideRequest(order=order), timeout=2.0)

    sender = threading.Thread(target=send)
    sender.start()
    yield done
    done.set()
    sender.join()


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Mailbox]]:
    """The URL of an Alertmanager, and where its mail arrives."""
    pages, mails = Webhook(), Mailbox()
    with serving(pages, mails), running_alertmanager(tmp_path_factory.mktemp("told"), pages, mails) as url:
        yield url, mails


@pytest.fixture(scope="module")
def prometheus(
    stack: Stack, orders: threading.Event, mails: tuple[str, Mailbox], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs prometheus (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((RULES / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = []
    for path in RULES.glob("*.rules.yaml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"]:
                if rule.get("alert") in SOON:
                    rule["for"] = "5s"
        # A window's first point comes with the clock's next full step, for which nobody waits here.
        (folder / path.name).write_text(yaml.safe_dump(rules, width=10_000).replace(":5m]", ":5s]"))
        config["rule_files"].append(str(folder / path.name))
    addresses = {"pretrade-server": stack.endpoints.metrics_url, "pretrade-worker": stack.endpoints.worker_url}
    (told,) = config["alerting"]["alertmanagers"]
    told["static_configs"] = [{"targets": [mails[0].removeprefix("http://")]}]
    scraped = yaml.safe_load((OBSERVABILITY / "otel" / "scrape-compose.yaml").read_text())
    jobs = scraped["receivers"]["prometheus"]["config"]["scrape_configs"]
    config["scrape_configs"] = [job for job in jobs if job["job_name"] in addresses]
    for job in config["scrape_configs"]:
        (static,) = job["static_configs"]
        static["targets"] = [str(addresses[job["job_name"]]).removeprefix("http://")]
        static["labels"] = POD
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        server = Prometheus(port)

        def scraped() -> bool:
            try:
                return len(server.query("rate(pretrade_decisions_total[1m])")) > 0
            except OSError:
                return False

        try:
            eventually(scraped, lambda there: there)
            yield server
        finally:
            process.terminate()
            process.wait(30)


def test_both_targets_are_scraped(prometheus: Prometheus) -> None:
    up = eventually(lambda: prometheus.query("up == 1"), lambda samples: len(samples) == 2)
    assert {sample["metric"]["job"] for sample in up} == {"pretrade-server", "pretrade-worker"}


def test_every_rule_can_be_evaluated(prometheus: Prometheus) -> None:
    eventually(prometheus.failed_rules, lambda failed: not failed)


@pytest.mark.parametrize("query", sorted(set(queries())), ids=lambda query: f"{query.dashboard}: {query.panel}")
def test_every_panel_has_something_to_show(prometheus: Prometheus, query: Any) -> None:
    samples = eventually(lambda: prometheus.query(query.expression), lambda found: len(found) > 0)
    assert samples


@pytest.mark.parametrize("rule", adapter_rules(), ids=lambda rule: rule["name"]["as"])
def test_the_autoscaler_gets_a_number_for_every_server(prometheus: Prometheus, rule: dict[str, Any]) -> None:
    """What the Prometheus adapter makes of its configuration."""
    series = re.match(r"\w+", rule["seriesQuery"])
    assert series is not None
    query = rule["metricsQuery"].replace("<<.Series>>", series[0]).replace("<<.GroupBy>>", "namespace, pod")
    query = query.replace("<<.LabelMatchers>>", ",".join(f'{name}="{value}"' for name, value in POD.items()))
    (sample,) = eventually(lambda: prometheus.query(query), lambda found: len(found) == 1)
    assert {name: sample["metric"][name] for name in POD} == POD
    assert 0 <= float(sample["value"][1]) < 1_000


def test_what_on_call_sees(prometheus: Prometheus, stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The first dashboard as a table, and the status, as a picture, where Grafana cannot run.

    `TEST_ON_CALL=docs` makes `docs/on-call.svg`, on a machine without other work: it shows a day like any other.
    """
    directory = os.environ.get("TEST_ON_CALL")
    asked = [query for query in queries() if query.dashboard == "on-call"]

    def found() -> list[tuple[Query, dict[str, Any]]]:
        return [(query, sample) for query in asked for sample in prometheus.query(query.expression)]

    def is_whole(samples: list[tuple[Query, dict[str, Any]]]) -> bool:
        there = {query for query, _ in samples} == set(asked)
        return there and not (directory and burning(samples))

    with stack_admin_channel(stack.endpoints) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)

        def ask() -> admin_pb2.GetStatusResponse:
            return stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)

        samples = eventually(found, is_whole, 240.0)
        status = eventually(ask, lambda status: not (directory and faults(status)))
    drawn = picture(status, samples)
    text = drawn.export_text(clear=False)
    assert {"Servers up", "p50", "p99.9"} <= set(re.split(r"\s{2,}|\n", text))
    if directory:
        drawn.save_svg(str(Path(directory) / "on-call.svg"), title=TITLE, unique_id="on-call")
    with capsys.disabled():
        print(text)


def test_a_killed_primary_is_told_and_nothing_else(prometheus: Prometheus, directory: Path) -> None:
    before = prometheus.alerts()
    running = StackFile.read(directory)
    assert running is not None
    os.kill(running.processes["primary"], signal.SIGKILL)
    alerts = eventually(prometheus.alerts, lambda alerts: ("ReplicaDown", "primary") in alerts)
    assert alerts - before == {("ReplicaDown", "primary")}


def test_a_killed_primary_and_drift_are_each_told_once_and_once_more_when_they_are_over(
    prometheus: Prometheus, stack: Stack, orders: threading.Event, mails: tuple[str, Mailbox]
) -> None:
    """The test before killed the primary. The model learnt from random rows: to it, every market has drifted."""
    faults = {"ReplicaDown", "ModelDrift of the model default"}

    def told() -> list[str]:
        return [subject for subject in mails[1].subjects() if subject.partition(" ")[2] in faults]

    eventually(told, lambda subjects: sorted(subjects) == sorted(f"TICKET {fault}" for fault in faults), 180.0)
    stack.restart("primary")
    orders.set()
    over = eventually(told, lambda subjects: len(subjects) == 4, 180.0)
    assert sorted(over[2:]) == sorted(f"RESOLVED {fault}" for fault in faults)
