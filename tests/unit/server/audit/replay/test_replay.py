"""Replays of packets as the decision path makes them, with the model run from its archive."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.desk import CALM, ROWS, SETTINGS_JSON, Desk, values
from support.guest_model import rows_of, write_guest_model
from support.guest_sets import MIXED, REGISTERED, Trades, know

from fallback.model_limits import UNKNOWN
from feature_cache import features
from feature_cache.feature_set import Feature, FeatureSet, SetRow
from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.reading import ReplaySettings
from server.audit.replay.replay import AS_RECORDED, Replay, Replayer, WhatIf
from server.decision.record import hash_of
from server.errors import ModelFailedError, ModelUnknownError, NotReplayableError
from server.inference import model_sets
from server.inference.embedded import EmbeddedScorer
from server.models import archive as models
from server.models.archive import Archive, ModelStore, RunningModel, RunningModels, read_archive
from server.models.registry import record_of
from server.settings import Settings
from torchserve import handler
from torchserve.brought.adding import Adding
from torchserve.brought.combining import Part, combine
from torchserve.export import write_archive


@pytest.fixture(scope="module", params=["champion", "challenger"])
def running(request: pytest.FixtureRequest, model_store: Path) -> Iterator[RunningModel]:
    """The boosted trees and the network."""
    with RunningModel(read_archive(model_store / f"{request.param}.mar")) as model:
        yield model


@pytest.fixture(scope="module")
def ensemble(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """The mean of the boosted trees and of others like them, without a calibration of its own."""
    archives = [read_archive(model_store / "champion.mar")]
    archives.append(write_guest_model(MF1, tmp_path_factory.mktemp("part") / "part.mar"))
    parts = [
        Part(one.version, json.loads(one.files["metadata.json"]), one.files["weights.bin"], weight)
        for one, weight in zip(archives, (1.0, 3.0), strict=True)
    ]
    together = combine("mean", parts, None, Adding(MF1, threshold=0.5))
    store = tmp_path_factory.mktemp("ensemble")
    version = write_archive(together, together.metadata, store, install=False)
    return read_archive(store / "versions" / f"{version}.mar")


@pytest.fixture
def desk(tmp_path: Path, running: RunningModel) -> Desk:
    DESKS[:] = [Desk(tmp_path, running)]
    return DESKS[0]


@pytest.fixture(scope="module")
def replayer(model_store: Path) -> Iterator[Replayer]:
    """Of whatever desk there is: its models start but once."""
    with new_replayer(model_store) as replayer:
        yield replayer


DESKS: list[Desk] = []


SETTINGS_HELD = packet_pb2.SettingsInForce(config_hash=hash_of(SETTINGS_JSON), settings_json=SETTINGS_JSON)


def new_replayer(model_store: Path, what_if: WhatIf = AS_RECORDED, settings_json: str = SETTINGS_JSON) -> Replayer:
    held = packet_pb2.SettingsInForce(config_hash=hash_of(settings_json), settings_json=settings_json)
    store = ModelStore([model_store])
    return Replayer(
        lambda wanted: held if wanted == held.config_hash else None,
        lambda decision_id: DESKS[0].packets.get(decision_id),  # noqa: PLW0108 - of the desk there is by then
        store.find,
        what_if,
    )


def field_of(replay: Replay) -> str:
    assert replay.first_difference is not None
    return replay.first_difference.field


async def test_every_source_and_every_guard_replays_bit_equal(desk: Desk, replayer: Replayer) -> None:
    for row in range(40):
        await desk.decide(values(row), side=pb.SIDE_SELL if row % 2 else pb.SIDE_BUY)
    await desk.decide(values(3), limit_price=200.0)
    await desk.decide(values(3), quantity=1e9)
    await desk.decide(values(3), age=1.5)
    own = pb.FeatureVector(feature_set_id="mf1", values=[0.25] * 25)
    await desk.decide(values(3), age=1.5, features=own, side=pb.SIDE_SELL)
    own.values[features.INDEX["book_age_ms"]] = 3_600_000.0
    for age in (0.1, 1.5):
        stale = await desk.decide(values(3), age=age, features=own)
        assert pb.REASON_CODE_FEATURES_STALE in stale.decision.reasons
    await desk.decide(values(3, book_age_ms=math.nan))
    desk.model_answers = False
    await desk.decide(values(39, trade_age_ms=50.0), side=pb.SIDE_SELL)
    desk.now += 60
    await desk.decide(values(8, **CALM))
    await desk.decide(values(8, **CALM | {"spread_bps": 5.0}))
    await desk.decide(values(8, **CALM | {"spread_bps": math.nan}))
    assert {one.decision.source for one in desk.packets.values()} == {
        pb.SOURCE_PRIMARY,
        pb.SOURCE_CACHED_SCORE,
        pb.SOURCE_RULES,
        pb.SOURCE_NONE,
    }
    assert {one.decision.action for one in desk.packets.values()} >= {pb.ACTION_TRADE, pb.ACTION_NO_TRADE}
    for packet in desk.packets.values():
        replay = await replayer.replay(packet)
        assert replay.first_difference is None, packet
        assert replay.action == packet.decision.action


@pytest.mark.long
async def test_what_is_beyond_a_models_limits_replays_bit_equal(
    tmp_path: Path, model_store: Path, running: RunningModel
) -> None:
    settings = Settings(replay=ReplaySettings(model_store=model_store))
    desk = Desk(tmp_path, running, settings)
    DESKS[:] = [desk]
    version = (await desk.decide(values(0))).decision.model_version
    with new_replayer(model_store, settings_json=settings.model_dump_json()) as replayer:
        limits = record_of(ModelStore([model_store]).find(version), 0.0).limits
        assert limits.domain is not None
        for uncertain, out_of_domain in ((False, True), (True, False), (True, True), (False, False)):
            desk.control.uncertain, desk.control.out_of_domain = uncertain, out_of_domain
            on = {"uncertain": uncertain, "out_of_domain": out_of_domain}
            desk.control.flags_on = ("shadow", *(name for name, is_on in on.items() if is_on))
            desk.limits = limits
            for row in range(12):
                await desk.decide(values(row), side=pb.SIDE_SELL if row % 2 else pb.SIDE_BUY)
            await desk.decide(values(3, rv_5s_bps=1e6))
        desk.control.flags_on = ("out_of_domain", "uncertain")
        desk.control.uncertain = desk.control.out_of_domain = True
        desk.limits = UNKNOWN
        unknown = await desk.decide(values(3, rv_5s_bps=1e6))
        assert pb.DEGRADATION_MODEL_LIMITS_UNKNOWN in unknown.decision.degradations
        found = [one.decision for one in list(desk.packets.values())[1:]]
        outside = [one for one in found if pb.REASON_CODE_OUT_OF_DOMAIN in one.reasons]
        assert 0 < len(outside) < len(found)
        for packet in list(desk.packets.values())[1:]:
            replay = await replayer.replay(packet)
            assert replay.first_difference is None, packet
        # As if the server had looked, and had found nothing.
        outside[0].reasons.remove(pb.REASON_CODE_OUT_OF_DOMAIN)
        changed = desk.packets[outside[0].decision_id]
        assert field_of(await replayer.replay(changed)) in {"action", "reasons"}


async def test_of_a_server_without_a_model_store_no_limits_are_replayed(desk: Desk, replayer: Replayer) -> None:
    assert "out_of_domain" in desk.control.flags_on
    packet = await desk.decide(values(3, rv_5s_bps=1e6))
    assert pb.REASON_CODE_OUT_OF_DOMAIN not in packet.decision.reasons
    assert (await replayer.replay(packet)).first_difference is None, "although the archive says that it is outside"


@pytest.fixture
def embedded_desk(tmp_path: Path, model_store: Path) -> Desk:
    """No replica answers, but the champion in the server's own process does."""
    archive = read_archive(model_store / "champion.mar")
    desk = Desk(tmp_path)
    metadata, weights = archive.files["metadata.json"], archive.files["weights.bin"]
    desk.embedded.scorer = EmbeddedScorer("served", archive.version, metadata, weights)
    DESKS[:] = [desk]
    return desk


async def test_decisions_of_the_embedded_model_replay_bit_equal(embedded_desk: Desk, replayer: Replayer) -> None:
    desk = embedded_desk
    for row in range(40):
        undefined = {"book_age_ms": math.nan} if row % 5 == 4 else {"ofi_1s": math.nan}
        await desk.decide(values(row, **undefined), side=pb.SIDE_SELL if row % 2 else pb.SIDE_BUY)
    own = pb.FeatureVector(feature_set_id="mf1", values=[0.25] * 25)
    await desk.decide(values(3), features=own, side=pb.SIDE_SELL)
    await desk.decide(values(3), quantity=1e9)
    desk.embedded.scorer = None
    await desk.decide(values(37, trade_age_ms=50.0), side=pb.SIDE_SELL)
    found = {one.decision.source for one in desk.packets.values()}
    assert found >= {pb.SOURCE_EMBEDDED, pb.SOURCE_CACHED_SCORE}, "a score of the embedded model is remembered, too"
    for packet in desk.packets.values():
        replay = await replayer.replay(packet)
        assert replay.first_difference is None, packet


async def test_whether_a_model_had_expired_replays_by_the_instant_of_the_market(
    embedded_desk: Desk, model_store: Path
) -> None:
    desk, files = embedded_desk, dict(read_archive(model_store / "champion.mar").files)
    files["metadata.json"] = json.dumps(json.loads(files["metadata.json"]) | {"expires_at": 1_000}).encode()
    archive = Archive("champion", "ee" * 8, files)
    desk.embedded.scorer = EmbeddedScorer("served", archive.version, files["metadata.json"], files["weights.bin"])
    decided = [await desk.decide(values(row)) for row in range(40)]
    trades = next(row for row, one in enumerate(decided) if one.decision.action == pb.ACTION_TRADE)
    before = decided[trades]
    desk.market_ns = 1_000 * 10**9
    after = await desk.decide(values(trades))
    assert (before.decision.action, after.decision.action) == (pb.ACTION_TRADE, pb.ACTION_ABSTAIN)
    assert after.decision.reasons[1:] == [pb.REASON_CODE_MODEL_EXPIRED]
    with Replayer(lambda _: SETTINGS_HELD, lambda _: None, lambda _: archive) as replayer:
        for packet in (before, after):
            assert (await replayer.replay(packet)).first_difference is None


async def test_a_decision_of_the_embedded_model_that_it_would_not_have_made_is_found(
    embedded_desk: Desk, replayer: Replayer
) -> None:
    packet = await embedded_desk.decide(values(3))
    assert packet.decision.source == pb.SOURCE_EMBEDDED
    packet.decision.score += 1e-7
    assert field_of(await replayer.replay(packet)) == "score"
    packet.attempts[-1].replica = "primary"
    assert field_of(await replayer.replay(packet)) == "attempts"


async def test_an_answer_of_one_of_several_endpoints_or_of_a_named_models_replica_replays(
    desk: Desk, replayer: Replayer
) -> None:
    packet = await desk.decide(values(3))
    for replica, chosen in (("primary-2", ""), ("scalper/primary", "scalper"), ("scalper/primary-11", "scalper")):
        packet.attempts[0].replica, packet.chosen_model = replica, chosen
        assert (await replayer.replay(packet)).first_difference is None
    assert (
        f"the model map of version {packet.decision.control_version} chose scalper"
        in (await replayer.replay(packet)).facts
    )
    packet.attempts[0].replica = "scalper/secondary"
    assert field_of(await replayer.replay(packet)) == "attempts"


async def test_an_answer_of_another_model_than_the_map_chose_is_found(desk: Desk, replayer: Replayer) -> None:
    packet = await desk.decide(values(3))
    packet.chosen_model = "scalper"
    assert field_of(await replayer.replay(packet)) == "chosen_model"
    packet.attempts[0].replica = "scalper/primary"
    assert (await replayer.replay(packet)).first_difference is None
    packet.chosen_model = ""
    assert field_of(await replayer.replay(packet)) == "chosen_model"


async def test_a_canarys_decision_replays_though_it_is_served_under_another_name(
    desk: Desk, replayer: Replayer
) -> None:
    packet = await desk.decide(values(3))
    packet.decision.source = pb.SOURCE_CANARY
    packet.decision.model_name = "on trial"
    packet.attempts[0].replica = "challenger"
    assert (await replayer.replay(packet)).first_difference is None
    packet.attempts[0].replica = "primary"
    assert field_of(await replayer.replay(packet)) == "attempts"


async def test_that_only_reducing_orders_trade_without_a_model_replays(tmp_path: Path, model_store: Path) -> None:
    settings = Settings.model_validate({"guards": {"degraded_orders": "reduce_only"}})
    desk = Desk(tmp_path, settings=settings)
    DESKS[:] = [desk]
    refused = await desk.decide(values(8, **CALM))
    assert (refused.decision.source, refused.decision.action) == (pb.SOURCE_RULES, pb.ACTION_NO_TRADE)
    assert refused.decision.reasons == [pb.REASON_CODE_RULES_PASSED, pb.REASON_CODE_NO_MODEL_REDUCE_ONLY]
    reducing = await desk.decide(values(8, **CALM), reduce_only=True)
    assert reducing.decision.action == pb.ACTION_TRADE
    with new_replayer(model_store, settings_json=settings.model_dump_json()) as replayer:
        for packet in (refused, reducing):
            assert (await replayer.replay(packet)).first_difference is None
        refused.decision.action = pb.ACTION_TRADE
        del refused.decision.reasons[1:]
        assert field_of(await replayer.replay(refused)) == "action", "a decision that the guard would not have let pass"


async def test_what_cannot_be_recomputed_is_named(desk: Desk, replayer: Replayer) -> None:
    desk.model_answers = False
    packet = await desk.decide(values(8, **CALM))
    facts = (await replayer.replay(packet)).facts
    assert facts == ("primary: timeout after 10.000 ms", "there was no cached score to use")


async def test_a_strategy_over_its_rate_is_a_fact_of_the_packet(desk: Desk, replayer: Replayer) -> None:
    desk.model_answers = False
    packet = await desk.decide(values(8, **CALM))
    assert packet.decision.action == pb.ACTION_TRADE
    packet.decision.action = pb.ACTION_NO_TRADE
    packet.decision.reasons.append(pb.REASON_CODE_STRATEGY_RATE)
    replay = await replayer.replay(packet)
    assert replay.first_difference is None
    assert replay.facts[-1] == "strategy 'twap' was over its rate"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda packet: setattr(packet.decision, "score", packet.decision.score + 1e-8), "score"),
        (lambda packet: setattr(packet.decision, "threshold", 0.123), "threshold"),
        (lambda packet: setattr(packet.decision, "action", pb.ACTION_ABSTAIN), "action"),
        (lambda packet: packet.decision.reasons.append(pb.REASON_CODE_PRICE_COLLAR), "reasons"),
        (lambda packet: setattr(packet, "trading_state", "HALTED"), "reasons"),
        (lambda packet: setattr(packet.features, "age_seconds", 3.0), "features_problem"),
        (lambda packet: setattr(packet, "model_input", np.roll(ROWS[3], 1).tobytes()), "score"),
        (lambda packet: setattr(packet.attempts[0], "outcome", "timeout"), "attempts"),
        (lambda packet: setattr(packet, "model_expires_at", 7), "model_expires_at"),
    ],
)
async def test_the_first_difference_is_named(desk: Desk, replayer: Replayer, change: Any, field: str) -> None:
    packet = await desk.decide(values(3))
    assert (await replayer.replay(packet)).first_difference is None
    change(packet)
    assert field_of(await replayer.replay(packet)) in (field, "action" if field == "reasons" else field)


async def test_an_order_with_features_of_a_set_that_is_not_known_here_says_where_sets_are_named(
    desk: Desk, replayer: Replayer
) -> None:
    packet = await desk.decide(values(3))
    packet.order.features.feature_set_id = "desk"
    with pytest.raises(NotReplayableError, match="not 'desk'; PRETRADE_FEATURES__FILE names a file with others"):
        await replayer.replay(packet)


async def test_a_cached_score_that_could_not_have_answered_is_a_difference(desk: Desk, replayer: Replayer) -> None:
    origin = await desk.decide(values(3))
    desk.model_answers = False
    packet = await desk.decide(values(3))
    assert packet.decision.source == pb.SOURCE_CACHED_SCORE
    origin.mid_price = 90.0
    assert field_of(await replayer.replay(packet)) == "cached_score"


async def test_another_threshold_decides_otherwise_exactly_where_it_should(desk: Desk, model_store: Path) -> None:
    for row in range(40):
        await desk.decide(values(row))
    scores = sorted(one.decision.score for one in desk.packets.values())
    threshold = scores[10]
    with new_replayer(model_store, WhatIf(threshold=threshold)) as replayer:
        for packet in desk.packets.values():
            replay = await replayer.replay(packet)
            assert replay.score == packet.decision.score
            assert (replay.action == pb.ACTION_TRADE) == (packet.decision.score >= threshold)


@pytest.mark.long
async def test_another_model_scores_the_same_inputs(desk: Desk, running: RunningModel, model_store: Path) -> None:
    other = next(name for name in ("champion", "challenger") if name != running.archive.name)
    packet = await desk.decide(values(3))
    with new_replayer(model_store, WhatIf(model=read_archive(model_store / f"{other}.mar"))) as replayer:
        replay = await replayer.replay(packet)
    assert replay.score != packet.decision.score
    assert 0 <= replay.score <= 1


async def test_without_settings_or_model_there_is_no_replay(desk: Desk, model_store: Path, tmp_path: Path) -> None:
    packet = await desk.decide(values(3))
    empty = ModelStore([tmp_path / "nowhere"])
    with (
        Replayer(lambda _: None, desk.packets.get, empty.find) as replayer,
        pytest.raises(NotReplayableError, match="does not hold the settings"),
    ):
        await replayer.replay(packet)
    held = packet_pb2.SettingsInForce(settings_json=SETTINGS_JSON)
    with (
        Replayer(lambda _: held, desk.packets.get, empty.find) as replayer,
        pytest.raises(ModelUnknownError, match="nowhere"),
    ):
        await replayer.replay(packet)
    held.settings_json = SETTINGS_JSON.replace("max_age_seconds", "max_age_hours")
    with (
        Replayer(lambda _: held, desk.packets.get, ModelStore([model_store]).find) as replayer,
        pytest.raises(NotReplayableError, match="not what their hash says"),
    ):
        await replayer.replay(packet)


def test_no_code_of_an_archive_runs_whose_content_is_not_its_version(model_store: Path, tmp_path: Path) -> None:
    changed = tmp_path / "champion.mar"
    with zipfile.ZipFile(model_store / "champion.mar") as before, zipfile.ZipFile(changed, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            after.writestr(name, content + b"\nprint('mine')\n" if name == "handler.py" else content)
    with pytest.raises(ModelUnknownError, match="but its content is"):
        read_archive(changed)


def test_a_model_is_found_by_its_version_also_where_another_has_its_name(model_store: Path, tmp_path: Path) -> None:
    version = read_archive(model_store / "champion.mar").version
    (tmp_path / "versions").mkdir()
    shutil.copy(model_store / "champion.mar", tmp_path / "versions" / f"{version}.mar")
    shutil.copy(model_store / "challenger.mar", tmp_path / "champion.mar")
    (tmp_path / "broken.mar").write_bytes(b"no archive")
    assert ModelStore([tmp_path]).find(version).name == "champion"


def test_the_version_is_computed_as_the_handler_computes_it() -> None:
    parts = (b"handler", b"metadata", b"weights")
    assert models.content_version(parts) == handler.content_version(*parts)


async def test_a_decision_of_another_chain_than_the_settings_name_replays_by_that_chain(
    desk: Desk, replayer: Replayer
) -> None:
    desk._chain.ask_in_order(("rules", "model"))
    packet = await desk.decide(values(3, **CALM))
    assert (packet.decision.source, list(packet.chain_stages)) == (pb.SOURCE_RULES, ["rules", "model"])
    assert (await replayer.replay(packet)).first_difference is None
    del packet.chain_stages[0]
    assert field_of(await replayer.replay(packet)) == "source"


def test_a_loaded_model_leaves_no_folder_behind_even_if_it_is_killed(
    tmp_path: Path, model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with RunningModel(read_archive(model_store / "champion.mar")) as model:
        assert list(tmp_path.iterdir())
        model.score(bytes(MF1.row_bytes), 1, 0)
        assert not list(tmp_path.iterdir())


@pytest.mark.long
async def test_a_model_whose_process_was_killed_gives_no_score_once_and_is_started_anew(
    desk: Desk, model_store: Path
) -> None:
    packet = await desk.decide(values(3))
    before = set(psutil.Process().children())
    with new_replayer(model_store) as replayer:
        assert (await replayer.replay(packet)).first_difference is None
        (model,) = set(psutil.Process().children()) - before
        model.kill()
        model.wait()
        with pytest.raises(ModelFailedError, match="gave no score"):
            await replayer.replay(packet)
        assert (await replayer.replay(packet)).first_difference is None


@pytest.mark.long
def test_of_many_models_only_the_two_used_last_keep_running(model_store: Path) -> None:
    archives = {name: read_archive(model_store / f"{name}.mar") for name in ("champion", "challenger")}
    before = set(psutil.Process().children())

    def running() -> int:
        return len(set(psutil.Process().children()) - before)

    started: list[str] = []

    def archive_of(version: str) -> Archive:
        started.append(version)
        return archives[version.rstrip("'")]

    with RunningModels(archive_of) as running_models:
        for version in ("champion", "challenger", "champion", "champion'", "champion", "challenger"):
            running_models.ask(version, lambda model: model.archive)
            assert running() <= 2
        assert started == ["champion", "challenger", "champion'", "challenger"]
    assert not running()
    with RunningModels(archive_of, most=3) as running_models:
        for version in ("champion", "challenger", "champion'", "champion"):
            running_models.ask(version, lambda model: model.archive)
        assert running() == 3
    assert not running()


@pytest.mark.parametrize("in_process", [False, True], ids=["replica", "embedded"])
async def test_a_decision_of_a_model_with_another_set_replays_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: bool
) -> None:
    know(monkeypatch, REGISTERED)
    archive = write_guest_model(MIXED, tmp_path / "guest.mar")
    model_sets.learn(archive.version, MIXED)
    with ExitStack() as stack:
        replayer = stack.enter_context(new_replayer(tmp_path))
        running = None if in_process else stack.enter_context(RunningModel(archive))
        DESKS[:] = [desk := Desk(tmp_path, running)]
        if in_process:
            files = archive.files
            desk.embedded.scorer = EmbeddedScorer(
                archive.name, archive.version, files["metadata.json"], files["weights.bin"]
            )
        actions = set()
        for number, row in enumerate(rows_of(MIXED, 20)):
            desk.others = {MIXED: SetRow.of(MIXED, row.tobytes())}
            packet = await desk.decide(values(number), side=pb.SIDE_SELL if number % 2 else pb.SIDE_BUY)
            assert packet.decision.source == (pb.SOURCE_EMBEDDED if in_process else pb.SOURCE_PRIMARY)
            assert (packet.scored_input, packet.scored_feature_set) == (row.tobytes(), MIXED.version)
            assert len(packet.model_input) == MF1.row_bytes, "what rules and guards saw is there as well"
            replay = await replayer.replay(packet)
            assert replay.first_difference is None, packet
            actions.add(packet.decision.action)
        assert len(actions) > 1
        packet.scored_input = bytes(MIXED.row_bytes)
        assert field_of(await replayer.replay(packet)) == "score"
        know(monkeypatch)
        with pytest.raises(NotReplayableError, match=f"took features of the set {MIXED.version}; known here are mf1/"):
            await replayer.replay(packet)


@pytest.mark.parametrize("in_process", [False, True], ids=["replica", "embedded"])
async def test_what_the_parts_of_an_ensemble_said_is_in_the_packet_and_replays_bit_equal(
    tmp_path: Path, ensemble: Archive, in_process: bool
) -> None:
    with ExitStack() as stack:
        replayer = stack.enter_context(Replayer(lambda _: SETTINGS_HELD, lambda _: None, lambda _: ensemble))
        running = None if in_process else stack.enter_context(RunningModel(ensemble))
        desk = Desk(tmp_path, running)
        if in_process:
            files = ensemble.files
            desk.embedded.scorer = EmbeddedScorer(
                "served", ensemble.version, files["metadata.json"], files["weights.bin"]
            )
        parts = json.loads(ensemble.files["metadata.json"])["ensemble"]["parts"]
        for number in range(10):
            packet = await desk.decide(values(number), side=pb.SIDE_SELL if number % 2 else pb.SIDE_BUY)
            assert [(one.model_version, one.weight) for one in packet.parts] == [
                (one["version"], one["weight"]) for one in parts
            ]
            mean = sum(one.weight * one.score for one in packet.parts)
            assert mean == pytest.approx(packet.decision.score, abs=1e-6), "its calibration changes nothing"
            assert (await replayer.replay(packet)).first_difference is None
        packet.parts[1].score += 1e-7
        difference = (await replayer.replay(packet)).first_difference
        assert difference is not None
        assert difference.field == "parts"
        assert difference.recorded.startswith(f"{parts[0]['version']} {parts[0]['weight']}: ")
        del packet.parts[:]
        assert field_of(await replayer.replay(packet)) == "parts"


NARROW = FeatureSet("narrow", tuple(Feature(f"mine_{place}", "", "Mine.") for place in range(len(MIXED))))
"""As wide as `MIXED`, and another set."""


@pytest.fixture
def guests_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """Where a model of `MIXED` decides."""
    know(monkeypatch, REGISTERED, Registered(NARROW, Trades, "the tests"))
    archive = write_guest_model(MIXED, tmp_path / "guest.mar")
    model_sets.learn(archive.version, MIXED)
    with RunningModel(archive) as running:
        DESKS[:] = [desk := Desk(tmp_path, running)]
        yield desk


@pytest.mark.long
async def test_what_a_model_of_another_set_would_have_said_is_told_where_the_decision_holds_its_features(
    guests_desk: Desk, tmp_path: Path, model_store: Path
) -> None:
    row = rows_of(MIXED, 1)[0].tobytes()
    guests_desk.others = {MIXED: SetRow.of(MIXED, row)}
    packet = await guests_desk.decide(values(3))
    mf1 = read_archive(model_store / "champion.mar")
    same_set = write_guest_model(MIXED, tmp_path / "other.mar", "challenger")
    for model, feature_set, scored in ((mf1, MF1, packet.model_input), (same_set, MIXED, row)):
        with new_replayer(tmp_path, WhatIf(model=model)) as replayer, RunningModel(model) as running:
            attempt = packet.attempts[0]
            expected = running.score(model_sets.row_of(feature_set, scored), attempt.batch_rows, attempt.batch_index)[1]
            assert (await replayer.replay(packet)).score == expected


@pytest.mark.long
@pytest.mark.parametrize("in_process", [False, True], ids=["replica", "embedded"])
async def test_a_model_of_a_set_that_the_decision_does_not_hold_is_not_asked(
    guests_desk: Desk, tmp_path: Path, in_process: bool
) -> None:
    guests_desk.others = {MIXED: SetRow.of(MIXED, rows_of(MIXED, 1)[0].tobytes())}
    packet = await guests_desk.decide(values(3))
    if in_process:
        packet.decision.source, packet.attempts[0].replica = pb.SOURCE_EMBEDDED, "embedded"
    narrow = write_guest_model(NARROW, tmp_path / "narrow.mar")
    before = set(psutil.Process().children())
    with new_replayer(tmp_path, WhatIf(model=narrow)) as replayer:
        with pytest.raises(NotReplayableError) as refused:
            await replayer.replay(packet)
        assert str(refused.value) == (
            f"model {narrow.version} takes features of the set {NARROW.version};"
            f" the decision holds {MF1.version} and {MIXED.version}"
        )
        assert set(psutil.Process().children()) == before
    with RunningModel(narrow) as running, pytest.raises(ModelFailedError, match="ended with"):
        running.score(SetRow.of(MIXED, packet.scored_input), 1, 0)


async def test_a_decision_whose_model_takes_another_set_than_it_says_is_found(
    guests_desk: Desk, tmp_path: Path
) -> None:
    guests_desk.others = {MIXED: SetRow.of(MIXED, rows_of(MIXED, 1)[0].tobytes())}
    packet = await guests_desk.decide(values(3))
    packet.scored_feature_set = NARROW.version
    with new_replayer(tmp_path) as replayer:
        assert field_of(await replayer.replay(packet)) == "scored_feature_set"
