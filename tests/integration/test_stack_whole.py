"""The whole stack, every part of it real, at once."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import redis
from sqlalchemy import create_engine, inspect, select
from support.console import Visitor
from support.figures import Figure
from support.harness import listened_on, stack_admin_channel

from feature_cache.bars.store import BarStore
from feature_cache.store.codec import BookState, decode
from feature_cache.store.vectors import key_of
from local.stack.parts import alertmanager, prometheus
from local.stack.settings import LocalSettings
from local.stack.stack import PARTS, Progress, Stack
from local.stack.up import console_line
from pretrade.admin.v1 import admin_pb2, admin_pb2_grpc
from pretrade.console.cli import login_link
from pretrade.decision.v1 import decision_pb2, decision_pb2_grpc
from server.audit.store.schema import DECISIONS

pytestmark = [pytest.mark.stack, pytest.mark.long]

GIBIBYTE = 2**30
DEADLINE_SECONDS = 30.0
_ALERTING = {"prometheus", "alertmanager", "rules"}
ALERTING = _ALERTING if prometheus.program() and alertmanager.program() else set[str]()
"""The parts that come with no package of ours, where they are installed."""
EVERYTHING = {part for part in PARTS if part not in _ALERTING} | ALERTING


class Start(NamedTuple):
    stack: Stack
    seen: list[Progress]
    seconds: float


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Start]:
    seen: list[Progress] = []
    settings = LocalSettings(
        dir=tmp_path_factory.mktemp("whole"), model_store=model_store, bars=True, alerts=bool(ALERTING), console=True
    )
    began = time.monotonic()
    with Stack(settings, report=seen.append) as stack:
        yield Start(stack, seen, time.monotonic() - began)


@pytest.fixture
def stack(started: Start) -> Stack:
    return started.stack


def test_everything_is_up(started: Start, figure: Figure) -> None:
    assert {progress.step for progress in started.seen if progress.state == "ready"} == EVERYTHING
    assert started.stack.ended() == []
    figure(started.seconds < 30, "the whole stack is up within 30 s")


def test_what_a_part_needs_is_ready_before_it_starts(started: Start) -> None:
    order = [(progress.step, progress.state) for progress in started.seen]
    for part, needed in (("worker", "broker"), ("market", "worker"), ("server", "primary"), ("server", "market")):
        assert order.index((needed, "ready")) < order.index((part, "starting"))


def test_it_takes_less_than_3_gibibytes(stack: Stack) -> None:
    memory = stack.memory_bytes()
    assert set(memory) == EVERYTHING
    assert sum(memory.values()) < 3 * GIBIBYTE


def test_features_of_every_instrument_are_live(stack: Stack) -> None:
    assert stack.endpoints.redis_url
    with redis.Redis.from_url(stack.endpoints.redis_url) as client:
        for instrument in stack.endpoints.instruments:
            packed = client.get(key_of(instrument))
            assert isinstance(packed, bytes)
            assert decode(packed).state is not BookState.UNKNOWN


def test_an_order_is_decided_by_the_primary_and_audited_in_postgres(stack: Stack) -> None:
    assert stack.endpoints.decision
    assert stack.endpoints.database_url
    order = decision_pb2.Order(instrument="BTCUSDT.SIM", side=decision_pb2.SIDE_BUY, quantity=0.01, strategy="test")
    request = decision_pb2.DecideRequest(order=order)
    deadline = time.monotonic() + DEADLINE_SECONDS
    with grpc.insecure_channel(stack.endpoints.decision) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        # A replica's first answers, on a busy machine, may be too slow for the budget: then another source answers.
        while (decision := stub.Decide(request, timeout=5.0).decision).source != decision_pb2.SOURCE_PRIMARY:
            assert time.monotonic() < deadline, decision
    assert decision.model_name == "champion"

    engine = create_engine(stack.endpoints.database_url)
    with engine.connect() as connection:
        query = select(DECISIONS.c.source).where(DECISIONS.c.decision_id == decision.decision_id)
        while not inspect(connection).has_table(DECISIONS.name) or not (rows := connection.execute(query).all()):
            assert time.monotonic() < deadline
            assert not stack["server"].wait(0.05)
            connection.rollback()
    engine.dispose()
    assert [tuple(row) for row in rows] == [("PRIMARY",)]


def test_the_admin_service_sees_every_replica_healthy(stack: Stack) -> None:
    assert stack.endpoints.admin
    with stack_admin_channel(stack.endpoints) as channel:
        status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)
    assert {replica.name: replica.healthy for replica in status.replicas} == {
        "primary": True,
        "secondary": True,
        "challenger": True,
    }


def test_metrics_are_served(stack: Stack) -> None:
    for url in (stack.endpoints.metrics_url, stack.endpoints.worker_url):
        with urllib.request.urlopen(f"{url}/metrics", timeout=5.0) as answer:
            assert b"# HELP" in answer.read()


def test_bars_of_every_instrument_are_kept(stack: Stack) -> None:
    assert stack.endpoints.database_url
    store, deadline = BarStore(stack.endpoints.database_url), time.monotonic() + DEADLINE_SECONDS
    while set(store.instruments()) != set(stack.endpoints.instruments):
        assert time.monotonic() < deadline
        assert not stack["bars"].wait(0.05)
    store.close()


def test_the_console_is_there_and_only_a_person_is_given_a_link_that_logs_in(stack: Stack) -> None:
    link = login_link(stack.endpoints)
    assert "/login?ticket=" in console_line(stack, is_person=True)
    assert "ticket" not in console_line(stack, is_person=False), "it may be a log"
    assert stack.endpoints.console_url is not None
    with Visitor(stack.endpoints.console_url + "/") as visitor:
        assert visitor.post("/login", {"ticket": link.partition("=")[2], "name": "ann"}).status_code == 303
        assert "<b>ann</b> · admin" in visitor.get("/").text
        assert "primary" in visitor.part("/overview/status")
    assert "ticket=" not in stack["console"].log_path.read_text()


def test_everything_listens_on_the_loopback_interface_only(stack: Stack) -> None:
    assert listened_on(stack) <= {"127.0.0.1", "::ffff:127.0.0.1"}
