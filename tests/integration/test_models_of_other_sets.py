"""A model of another set that was trained here decides, is held to its limits, explained, replayed and compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.desk import Desk
from support.guest_sets import ALL, RECORDED, know

from feature_cache.feature_set import SetRow
from feature_cache.sources.simulator import simulate
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.explain import Explainer
from server.audit.reading.reading import ReplaySettings
from server.audit.replay.replay import Replayer
from server.drift.summary import metadata_of, summarise
from server.inference import model_sets
from server.models.archive import Archive, RunningModel, read_archive
from server.models.registry import record_of
from server.settings import Settings
from torchserve.dataset import Samples, collect
from torchserve.export import metadata_of as described
from torchserve.export import write_archive
from torchserve.training import TrainingSettings, split_by_time, train

SETTINGS = Settings(replay=ReplaySettings(model_store=Path("models")))
"""With a model store: without one a server knows of no limits."""


@dataclass
class World:
    """A model of the set, the market that it has not seen, and a desk where it decides."""

    archive: Archive
    later: Samples
    desk: Desk

    async def decide(self, number: int, **changes: float) -> packet_pb2.DecisionPacket:
        """Decides on a sample, of which features of the set are changed."""
        row = self.later.rows[number].copy()
        for name, value in changes.items():
            row[RECORDED.index[name]] = value
        self.desk.others = {RECORDED: SetRow.of(RECORDED, row.tobytes())}
        self.desk.market_ns = int(self.later.time_ns[number])
        side = pb.SIDE_SELL if self.later.sell[number] else pb.SIDE_BUY
        market = self.later.of_mf1
        own = market.feature_set.for_sell(market.rows[number]) if side == pb.SIDE_SELL else market.rows[number]
        return await self.desk.decide(own, side=side)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    know(monkeypatch, *ALL)
    events = simulate(7, ["BTCUSDT.SIM"], events_per_second=60, duration_seconds=300)
    samples = collect(events, "simulated for tests", feature_set=RECORDED)
    likely = 0.2 + 0.4 * (samples.rows[:, 0] > 0) + 0.35 * (samples.rows[:, 1] > 0)
    samples = replace(samples, eligible=np.random.default_rng(1).random(len(likely)) < likely)
    settings = TrainingSettings(seed=5, trees=20, target_precision=0.7)
    model = train("champion", samples, settings, "xgboost")
    version = write_archive(model, described(model, samples, settings), tmp_path, install=False)
    archive = read_archive(tmp_path / "versions" / f"{version}.mar")
    model_sets.learn(version, RECORDED)
    later = samples.take(split_by_time(samples.time_ns, settings).test)
    with RunningModel(archive) as running:
        desk = Desk(tmp_path, running, SETTINGS)
        desk.limits = record_of(archive, created_at=0.0).limits
        yield World(archive, later, desk)


@pytest.mark.long
async def test_it_is_explained_replayed_compared_and_held_to_what_it_has_seen(world: World) -> None:
    archive, desk = world.archive, world.desk
    packets = [await world.decide(number) for number in range(0, len(world.later.rows), 3)]
    traded = next(number for number, packet in enumerate(packets) if packet.decision.action == pb.ACTION_TRADE)
    packets.append(strange := await world.decide(3 * traded, bought=1e30))
    refused = [pb.REASON_CODE_OUT_OF_DOMAIN in packet.decision.reasons for packet in packets]
    assert refused[-1]
    assert strange.decision.action == pb.ACTION_ABSTAIN
    assert np.mean(refused[:-1]) <= 0.02, "what is usual is not refused"
    assert {packet.decision.action for packet in packets[:-1]} >= {pb.ACTION_TRADE, pb.ACTION_NO_TRADE}
    kept = packet_pb2.SettingsInForce(settings_json=SETTINGS.model_dump_json())
    with (
        Replayer(lambda _: kept, desk.packets.get, lambda _: archive) as replayer,
        Explainer(desk.packets.get, lambda _: archive) as explainer,
    ):
        for packet in (*packets[:10], strange):
            assert (await replayer.replay(packet)).first_difference is None
            explanation = explainer.explain(packet)
            assert [one.feature for one in explanation.contributions] == list(RECORDED.names)
            total = explanation.base + sum(one.contribution for one in explanation.contributions)
            assert total == pytest.approx(explanation.margin, abs=1e-4)

    def compared(shift: float) -> set[str]:
        for number, packet in enumerate(packets[:-1]):
            row = world.later.rows[3 * number].copy()
            row[RECORDED.index["bought"]] += shift
            packet.scored_input = row.tobytes()
            packet.features.sequence = number + 1
        told = summarise(packets[:-1], lambda _: metadata_of(archive.files))
        assert told.problem == ""
        assert [one.name for one in told.drifts] == [*RECORDED.names, "score"]
        assert {one.name for one in told.drifts if one.not_judged} == {"book_age_ms", "quote_age_ms"}
        assert set(told.missing["BTCUSDT.SIM"]) > {"bought", "trades", "quote_age_ms"}
        return {one.name for one in told.drifted}

    assert "bought" not in compared(0.0)
    assert "bought" in compared(1e12)
    assert json.loads(archive.files["metadata.json"])["feature_names"] == list(RECORDED.names)
