"""Ten thousand decisions of all kinds, and others that were made in columns, each of which replays bit-equal."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import pytest
from support import planes
from support.desk import CALM, ROWS, Desk, values
from support.plain_orders import orders_of
from support.planes import INSTRUMENTS, Plane, market, packets_in
from support.scripted_replica import Script

from fallback.guards import GuardSettings
from fallback.model_limits import UNKNOWN
from fallback.staleness import FeatureSettings
from feature_cache import features
from feature_cache.domain import LOOK_NS
from feature_cache.store.codec import encode
from local.demo import variants
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.reading import ReplaySettings
from server.audit.replay.replay import Replayer
from server.decision.record import hash_of
from server.inference.embedded import EmbeddedScorer
from server.inference.wire import ScoreBatch
from server.models.archive import Archive, ModelStore, RunningModel, read_archive
from server.models.registry import Registry, record_of
from server.settings import Settings

DECISIONS = 10_000
IN_BLOCKS = 10_080
"""Decisions of each first stage that are made in columns, most of them."""
TOGETHER = 64
CALLERS = 32
ALLOWED_SECONDS = 900.0
"""Of each of them: what is made of a score is tested here, not how soon it comes."""
TURN = 500
"""Decisions between two changes of the flags, and of what is known of the model."""
PATIENT = planes.PATIENT.model_copy(update={"cap_seconds": 1_000.0})
SOURCES = {pb.SOURCE_PRIMARY, pb.SOURCE_EMBEDDED, pb.SOURCE_CACHED_SCORE, pb.SOURCE_RULES, pb.SOURCE_NONE}
REASONS = {
    pb.REASON_CODE_UNCERTAIN,
    pb.REASON_CODE_OUT_OF_DOMAIN,
    pb.REASON_CODE_MODEL_EXPIRED,
    pb.REASON_CODE_PRICE_COLLAR,
    pb.REASON_CODE_NOTIONAL_LIMIT,
    pb.REASON_CODE_FEATURES_STALE,
}
DEGRADATIONS = {pb.DEGRADATION_FEATURE_IMPLAUSIBLE, pb.DEGRADATION_MODEL_LIMITS_UNKNOWN}


def limited(model_store: Path, store: Path, expires_at: int = 2_000) -> Archive:
    """The champion, but that it expires, and is uncertain of its lower trades."""
    given = read_archive(model_store / "champion.mar")
    registry = Registry(store)
    registry.path(given.version).parent.mkdir(parents=True)
    shutil.copy(model_store / "champion.mar", registry.path(given.version))
    band = {"low": record_of(given, 0.0).threshold, "high": 0.9}
    version = variants._variant(registry, given.version, lambda one: one.update(expires_at=expires_at, band=band))
    return ModelStore([store]).find(version)


async def decide_one(desk: Desk, random: np.random.Generator, row: int) -> packet_pb2.DecisionPacket:
    """An order of any kind, on a market that is sometimes calm, absurd or late."""
    changes: dict[str, float] = {}
    if random.random() < 0.1:
        changes |= CALM
    if random.random() < 0.05:
        changes["imbalance_l1"] = float(random.choice([np.nan, -1.0, 1.0]))
    if random.random() < 0.05:
        changes["rv_5s_bps"] = float(random.choice([np.nan, 0.0, 1e6]))
    order = pb.Order(side=pb.SIDE_SELL if random.random() < 0.5 else pb.SIDE_BUY)
    kind = random.random()
    if kind < 0.05:
        order.limit_price = float(random.uniform(90, 110))
    elif kind < 0.1:
        order.quantity = 1e9
    elif kind < 0.2:
        own = random.normal(size=features.N_FEATURES).astype(np.float32)
        own[features.INDEX["book_age_ms"]] = 5.0
        order.features.CopyFrom(
            pb.FeatureVector(
                feature_set_id="mf1", values=np.clip(own, features.MF1.lowest, features.MF1.highest).tolist()
            )
        )
    order.reduce_only = random.random() < 0.1
    age = 1.5 if random.random() < 0.03 else 0.1
    given = {field.name: value for field, value in order.ListFields()}
    return await desk.decide(values(row, **changes), age=age, **given)


@pytest.mark.long
async def test_ten_thousand_decisions_of_all_stages_and_guards_replay_bit_equal(
    tmp_path: Path, model_store: Path
) -> None:
    archive = limited(model_store, tmp_path)
    record = record_of(archive, 0.0)
    settings = Settings(replay=ReplaySettings(model_store=tmp_path))
    held = packet_pb2.SettingsInForce(config_hash=settings.config_hash(), settings_json=settings.model_dump_json())
    assert held.config_hash == hash_of(held.settings_json)
    embedded = EmbeddedScorer("served", archive.version, archive.files["metadata.json"], archive.files["weights.bin"])
    random = np.random.default_rng(17)
    with RunningModel(archive) as running:
        desk = Desk(tmp_path, running, settings)
        expires_ns = record.expires_at * 10**9
        for number in range(DECISIONS):
            if number % TURN == 0:
                turn = number // TURN
                desk.limits = UNKNOWN if turn % 5 == 4 else record.limits
                desk.control.uncertain, desk.control.out_of_domain = bool(turn & 1), bool(turn & 2)
                on = {"uncertain": desk.control.uncertain, "out_of_domain": desk.control.out_of_domain}
                desk.control.flags_on = ("shadow", *(name for name, is_on in on.items() if is_on))
                desk.market_ns = expires_ns + (turn // 4 % 4 - 3) * TURN // 2 * LOOK_NS  # before, across, beyond
                row = 0
            desk.market_ns += LOOK_NS
            desk.now += float(random.choice([0.0, 0.0, 0.0, 3.0]))
            desk.model_answers = random.random() < 0.6
            desk.embedded.scorer = embedded if random.random() < 0.3 else None
            row = row if random.random() < 0.5 else int(random.integers(64))
            await decide_one(desk, random, row)
    found, seen = await replayed(desk.packets, held, tmp_path)
    assert len(desk.packets) == DECISIONS
    expected = {("source", one) for one in SOURCES} | {("reason", one) for one in REASONS}
    assert seen >= expected | {("lack", one) for one in DEGRADATIONS}, found


async def replayed(
    packets: Mapping[str, packet_pb2.DecisionPacket], held: packet_pb2.SettingsInForce, store: Path
) -> tuple[Counter[str], set[tuple[str, int]]]:
    """Replays each, which must be bit-equal: how often each source and action is among them, and all that they name."""
    found: Counter[str] = Counter()
    seen: set[tuple[str, int]] = set()
    with Replayer(lambda _: held, packets.get, ModelStore([store]).find) as replayer:
        for packet in packets.values():
            replay = await replayer.replay(packet)
            assert replay.first_difference is None, packet
            decision = packet.decision
            assert (replay.action, list(replay.reasons)) == (decision.action, list(decision.reasons))
            found[pb.Source.Name(decision.source)] += 1
            found[pb.Action.Name(decision.action)] += 1
            seen |= {("source", decision.source)}
            seen |= {("reason", one) for one in decision.reasons} | {("lack", one) for one in decision.degradations}
    return found, seen


def served_by(running: RunningModel) -> Script:
    """A replica that serves this model."""

    async def script(rows: list[bytes]) -> ScoreBatch:
        each = {row: running.score(row, len(rows), rows.index(row)) for row in set(rows)}
        scores = np.array([each[row].score for row in rows], np.float32)
        return ScoreBatch(each[rows[0]].model, scores)

    return script


async def decide_in_columns(p: Plane, random: Random) -> None:
    """Half of the orders come in batches, half of many callers at once; the market is another one each time."""
    for number in range(IN_BLOCKS // (TOGETHER + CALLERS)):
        for place, name in enumerate(INSTRUMENTS):
            changes = {} if random.random() < 0.9 else CALM if random.random() < 0.5 else {"rv_5s_bps": 1e6}
            vector = values((3 * number + place) % len(ROWS), **changes)
            p.feature_cache.accept(encode(replace(market(0.1), instrument=name, values=vector)))
        now = p.clock()
        together = p.dataplane.begin_together(orders_of(random, TOGETHER, INSTRUMENTS), now, now + ALLOWED_SECONDS)
        assert together is not None
        orders = orders_of(random, CALLERS, INSTRUMENTS)
        alone = [p.dataplane.begin(order, now, now + ALLOWED_SECONDS, in_company=True) for order in orders]
        await together.ended()
        p.dataplane.heard([*together.take_decided(), *await asyncio.gather(*alone)])
    await p.journal.flush()


@pytest.mark.long
@pytest.mark.parametrize("first", ["model", "embedded"])
async def test_decisions_that_were_made_in_columns_replay_bit_equal(
    first: Literal["model", "embedded"], tmp_path: Path, model_store: Path
) -> None:
    archive = limited(model_store, tmp_path, expires_at=2**32)
    settings = Settings(
        replay=ReplaySettings(model_store=tmp_path),
        guards=GuardSettings(price_collar_bps=50.0, max_notional=100_000.0),
        features=FeatureSettings(max_age_seconds=60.0),
    )
    held = packet_pb2.SettingsInForce(config_hash=settings.config_hash(), settings_json=settings.model_dump_json())
    with RunningModel(archive) as running:
        script = served_by(running)
        async with planes.plane(
            tmp_path, script, script, PATIENT, max_in_flight=1_000, max_age_seconds=60.0, first_stage=first
        ) as p:
            p.packets.config_hash = settings.config_hash()
            p.guards.configure(settings.guards)
            p.limits = record_of(archive, 0.0).limits
            p.control.uncertain = p.control.out_of_domain = True
            p.control.flags_on = ("uncertain", "out_of_domain")
            p.embedded.scorer = EmbeddedScorer(
                "served", archive.version, archive.files["metadata.json"], archive.files["weights.bin"]
            )
            await decide_in_columns(p, Random(first))
            in_columns = p.metrics.blocks.buckets()[1]
    packets = {one.decision.decision_id: one for one in packets_in(tmp_path)}
    assert in_columns > 0.8 * len(packets) > 0.8 * 0.9 * IN_BLOCKS
    found, seen = await replayed(packets, held, tmp_path)
    expected = {pb.REASON_CODE_UNCERTAIN, pb.REASON_CODE_PRICE_COLLAR, pb.REASON_CODE_NOTIONAL_LIMIT}
    assert seen >= {("reason", one) for one in expected}, found
    assert found.keys() >= {"ACTION_TRADE", "ACTION_NO_TRADE", "ACTION_ABSTAIN"}, found
