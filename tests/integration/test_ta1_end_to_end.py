"""`ta1` from the market to a decision: broker, worker, Redis, server and a model that was added, all of them real."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
import lightgbm
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import SecretStr
from redis.asyncio import Redis
from support.harness import eventually, stack_admin_channel
from support.labelled_rows import labelled_rows
from typer.testing import CliRunner

from feature_cache.engine.engine import FeatureEngine
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot, decode
from feature_cache.store.vectors import key_of
from feature_cache.ta1.computer import Board, Indicators, Ta1Computer
from feature_cache.ta1.definition import LONG_INTERVALS, TA1, TA1_LONG
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.audit.v1 import audit_pb2, audit_pb2_grpc
from pretrade.client.cli.main import app
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from pretrade.market.v1 import market_pb2
from server.models.registry import Registry

pytestmark = pytest.mark.stack

OURS, PARTNER = "ETHUSDT.SIM", "BTCUSDT.SIM"
HISTORY_SECONDS: Final = 480
"""Of market before the first order: all indicators are defined after 45 bars, also those of ten seconds. With the time
that the test takes it must stay below the 600 bars that are looked up, so that nothing is forgotten."""
PATIENCE_SECONDS: Final = 60.0
OVER_BARS: Final = ("_1s", "_10s", "_1m", "_5m")
"""How the names of features over bars end."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A model store whose champion is a model of `ta1`, trained elsewhere and added by the command."""
    rows, labels = labelled_rows(1_000, 1, TA1)
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
    lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 5).save_model(tmp_path / "trees.txt")
    arguments = ["models", "add", str(tmp_path / "trees.txt"), "--kind", "lightgbm", "--features", "ta1"]
    done = CliRunner().invoke(app, [*arguments, "--threshold", "0.5", "--store", str(tmp_path / "store")])
    assert done.exit_code == 0, done.output
    registry = Registry(tmp_path / "store")
    registry.set_alias("champion", registry.resolve("candidate"))
    return registry.root


@pytest.fixture
def stack(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("PRETRADE_WORKER_COMPUTED_SETS", '["ta1", "ta1_long"]')
    monkeypatch.setenv("PRETRADE_TA1_PARTNERS", f'{{"{OURS}": "{PARTNER}"}}')
    monkeypatch.setenv("PRETRADE_WORKER_KAFKA_PARTITIONS", "1")  # the order of the log then decides what a partner says
    monkeypatch.setenv("PRETRADE_WORKER_TTL_SECONDS", "600")
    monkeypatch.setenv("PRETRADE_WORKER_REWIND_SECONDS", "1")  # too short for any indicator
    monkeypatch.setenv("PRETRADE_BARS_DATABASE_URL", f"sqlite:///{tmp_path}/bars.db")
    monkeypatch.setenv("PRETRADE_BUDGET__CAP_SECONDS", "2")
    settings = LocalSettings(
        dir=tmp_path / "stack",
        model_store=store,
        market=False,
        bars=True,
        instruments=(OURS, PARTNER),
        database_url=SecretStr(f"sqlite:///{tmp_path}/audit.db"),
    )
    with Stack(settings, parts={"valkey", "broker", "worker", "bars", "primary", "server"}) as stack:
        yield stack


class Feed:
    """A market of the last minute at once, and then live; remembers what it has published."""

    def __init__(self, brokers: str) -> None:
        self.published: list[market_pb2.MarketEvent] = []
        self.live_ns = time.time_ns()
        """Event time at which history ends."""
        self._brokers = brokers
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        start_ns = self.live_ns - HISTORY_SECONDS * 10**9
        async with EventPublisher(self._brokers, partitions=1) as publisher:
            for event in simulate(3, [OURS, PARTNER], start_ns=start_ns, events_per_second=5):
                early = (event.receive_time_ns - time.time_ns()) / 1e9
                if early > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopped.wait(), early)
                if self._stopped.is_set():
                    break
                await publisher.send(event)
                self.published.append(event)
        assert publisher.failed == 0

    def stop(self) -> None:
        self._stopped.set()


def offline(
    events: Iterable[market_pb2.MarketEvent], computers: Mapping[str, Ta1Computer | Indicators]
) -> list[tuple[int, bytes]]:
    """Event time of each event of ours that counts, and what a set is after it, computed in one go."""
    engines = {name: FeatureEngine(name) for name in (OURS, PARTNER)}
    found = []
    for event in events:
        if engines[event.instrument].on_event(event) and event.instrument in computers:
            computers[event.instrument].on_event(event)
            if event.instrument == OURS:
                found.append((engines[OURS].time_ns, computers[OURS].values().tobytes()))
    return found


def ta1(board: Board) -> dict[str, Ta1Computer]:
    return {OURS: Ta1Computer(OURS, PARTNER, board), PARTNER: Ta1Computer(PARTNER, None, board)}


def differing(found: NDArray[np.float32], expected: bytes, feature_set: FeatureSet) -> set[str]:
    """The features that need no mid, and differ in a bit."""
    wanted = np.frombuffer(expected, "<f4")
    return {
        name
        for place, name in enumerate(feature_set.names)
        if name.endswith(OVER_BARS)
        and not name.startswith("above_mid")
        and found[place].tobytes() != wanted[place].tobytes()
    }


def decide_by_the_model(endpoint: str) -> pb.Decision:
    """Asks until a replica has answered: a model that has just started is asked to prove itself first."""
    order = pb.Order(instrument=OURS, side=pb.SIDE_BUY, quantity=0.01, strategy="test")
    with grpc.insecure_channel(endpoint) as channel:
        ask = decision_pb2_grpc.DecisionServiceStub(channel).Decide
        request = pb.DecideRequest(order=order)
        return eventually(
            lambda: ask(request, timeout=5.0).decision,
            lambda decision: decision.source == pb.SOURCE_PRIMARY,
            PATIENCE_SECONDS,
        )


def look_at(stack: Stack, decision: pb.Decision) -> tuple[audit_pb2.AuditedDecision, audit_pb2.ReplayDecisionResponse]:
    """What the audit holds of a decision, and its replay."""
    with stack_admin_channel(stack.endpoints) as channel:
        audit = audit_pb2_grpc.AuditServiceStub(channel)
        asked = audit_pb2.GetDecisionRequest(decision_id=decision.decision_id)
        replayed = audit_pb2.ReplayDecisionRequest(decision_id=decision.decision_id)
        return audit.GetDecision(asked, timeout=20.0).decision, audit.ReplayDecision(replayed, timeout=60.0)


async def vector(
    redis_url: str,
    since_ns: int,
    accept: Callable[[NDArray[np.float32]], object] = lambda _: True,
    set_id: str = "ta1",
) -> FeatureSnapshot:
    """Our vector of a set in Redis, as soon as it is of this event time or later, and its values are accepted."""
    async with Redis.from_url(redis_url) as redis, asyncio.timeout(PATIENCE_SECONDS):
        for _ in itertools.count():
            packed = await redis.get(key_of(OURS, set_id))
            if (
                isinstance(packed, bytes)
                and (found := decode(packed)).event_time_ns >= since_ns
                and accept(found.values)
            ):
                return found
            await asyncio.sleep(0.02)
    raise AssertionError


@pytest.mark.long
async def test_a_model_of_ta1_decides_the_decision_replays_and_a_restart_of_the_worker_changes_no_indicator(
    stack: Stack, store: Path
) -> None:
    endpoints = stack.endpoints
    assert endpoints.kafka_bootstrap_servers
    assert endpoints.redis_url
    assert endpoints.decision
    feed = Feed(endpoints.kafka_bootstrap_servers)
    feeding = asyncio.create_task(feed.run())
    await vector(endpoints.redis_url, feed.live_ns)
    decision = await asyncio.to_thread(decide_by_the_model, endpoints.decision)
    first_ns = feed.published[-1].event_time_ns
    written = await vector(endpoints.redis_url, first_ns)
    await asyncio.to_thread(stack["worker"].stop)
    await asyncio.to_thread(stack.restart, "worker")
    macd = [TA1.index[f"macd_hist_bps_{interval}"] for interval in ("1s", "10s")]
    restarted_ns = feed.published[-1].event_time_ns
    await vector(endpoints.redis_url, restarted_ns, lambda values: np.isfinite(values[macd]).all())
    trange = TA1_LONG.index["trange_bps_1m"]
    minutes = await vector(endpoints.redis_url, restarted_ns, lambda values: np.isfinite(values[trange]), "ta1_long")
    feed.stop()
    await feeding
    computed = offline(feed.published, ta1(Board()))
    assert written.values.tobytes() == dict(computed)[written.event_time_ns]
    # The second worker has seen a few seconds only: perhaps no snapshot of the book.
    last_ns, values = computed[-1]
    again = await vector(endpoints.redis_url, last_ns)
    assert again.event_time_ns == last_ns
    assert np.isfinite(np.frombuffer(values, "<f4")[macd]).all()
    assert not differing(again.values, values, TA1)
    of_minutes = dict(offline(feed.published, {OURS: Indicators(OURS, LONG_INTERVALS)}))
    assert not differing(minutes.values, of_minutes[minutes.event_time_ns], TA1_LONG)
    assert decision.model_version == Registry(store).resolve("champion")
    audited, replay = await asyncio.to_thread(look_at, stack, decision)
    packet = audited.packet
    assert packet.scored_feature_set == TA1.version
    assert packet.feature_set_id == MF1.id
    assert packet.scored_input in {one for _, one in computed}
    scored = np.frombuffer(packet.scored_input, "<f4")
    defined = {name for name, value in zip(TA1.names, scored, strict=True) if np.isfinite(value)}
    assert {"rsi_14_1s", "macd_bps_1s", "bollinger_20_position_1s", "partner_corr_30s"} <= defined
    assert replay.equal, replay
