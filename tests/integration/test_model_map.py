"""Two models with different feature sets decide different orders of one server, each by replicas that host both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import grpc
import psutil
import pytest
from support.guest_model import write_guest_model
from support.guest_sets import know
from support.harness import INSTRUMENTS, ROOMY, eventually
from support.rig import OpenRig, Rig
from typer.testing import CliRunner

from feature_cache.feature_set import Feature, FeatureSet, SetRow
from feature_cache.feature_sets import Registered
from local.demo.variants import recalibrated
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from pretrade.client.cli.main import app
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.replay.replay import Replayer
from server.models.archive import ModelStore, RunningModel
from server.models.registry import Registry

pytestmark = pytest.mark.stack

TIDE: Final = FeatureSet(
    "tide",
    (
        Feature("weighted_mid_bps", "bps", "Copied from mf1.", -10_000.0, 10_000.0, signed=True, source="mf1"),
        Feature("imbalance_l5", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),
    ),
)
SETS: Final = """
from feature_cache.feature_set import Feature, FeatureSet

FEATURE_SETS = [FeatureSet("tide", (
    Feature("weighted_mid_bps", "bps", "Copied from mf1.", -10_000.0, 10_000.0, signed=True, source="mf1"),
    Feature("imbalance_l5", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),
))]
"""


def rule(model: str, instrument: str = "", strategy: str = "") -> admin_pb2.ModelMapRule:
    return admin_pb2.ModelMapRule(instrument=instrument, strategy=strategy, model=model)


def set_map(rig: Rig, *rules: admin_pb2.ModelMapRule) -> admin_pb2.SetModelMapResponse:
    request = admin_pb2.SetModelMapRequest(rules=rules, author="ann", reason="the desk's own")
    return rig.server.admin.SetModelMap(request, timeout=10.0)


def explained(rig: Rig) -> set[str]:
    """The versions that a server has loaded to explain their decisions."""
    found = set()
    for process in rig.server.process.children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            command = process.cmdline()
            found |= {command[-1]} if "server.models.model_process" in command else set()
    return found


@pytest.fixture
def store(model_store: Path) -> Path:
    """Where the model servers find versions."""
    return model_store


@pytest.fixture
def version(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the other set, in the store."""
    know(monkeypatch, Registered(TIDE, None, "this test"))
    archive = write_guest_model(TIDE, tmp_path / "tide.mar", "tide")
    (store / "versions" / f"{archive.version}.mar").write_bytes((tmp_path / "tide.mar").read_bytes())
    return archive.version


@pytest.fixture
def models() -> list[str]:
    """Of the server, besides the default one. A model server keeps what it has loaded for one from test to test."""
    return ["tide", "empty"]


@pytest.fixture
def rig(open_rig: OpenRig, replica_stack: Stack, store: Path, tmp_path: Path, models: list[str]) -> Iterator[Rig]:
    (tmp_path / "sets.py").write_text(SETS)
    settings = {
        "MODELS": json.dumps({name: {} for name in models}),
        "FEATURES__FILE": str(tmp_path / "sets.py"),
        "REPLICAS__MANAGEMENT": json.dumps(replica_stack.endpoints.management),
        "REPLAY__MODEL_STORE": str(store),
        "DRIFT__INTERVAL_SECONDS": "0.5",
        # A challenger yields to everybody: beside other work its batches are late or given up, and the canary there is
        # rolled back for that. This is a test of who is asked, not of how fast.
        **dict.fromkeys(("CANARY__MAX_SLOW_EXCESS", "CANARY__MAX_ERROR_EXCESS", "CANARY__MAX_FALLBACK_SHARE"), "0.99"),
        "SLO__OBJECTIVE": "0.5",
    }
    rig = open_rig(ROOMY | settings, warm_up_calls=1)
    yield rig
    with suppress(grpc.RpcError):
        set_map(rig)


@pytest.mark.long
@pytest.mark.timeout(400)  # two minutes beside other tests on two cores
async def test_two_models_with_different_sets_decide_different_orders_at_once_and_replay(
    rig: Rig, version: str, store: Path
) -> None:
    server = rig.server
    request = admin_pb2.SetModelAliasRequest(
        model="tide", alias="champion", model_version=version, author="ann", reason="the first"
    )
    server.admin.SetModelAlias(request, timeout=120.0)
    server.wait_until_well("tide/primary", "tide/secondary")
    before = server.decide_until(pb.SOURCE_PRIMARY)
    set_map(rig, rule("empty", strategy="new"))
    nobody = eventually(lambda: server.decide(strategy="new"), lambda one: one.source == pb.SOURCE_RULES)
    assert pb.DEGRADATION_PRIMARY_BREAKER_OPEN in nobody.degradations
    made = set_map(rig, rule("tide", INSTRUMENTS[1]), rule("tide", strategy="sweep-?")).change
    assert made.subject == "model_map"
    assert f"+ {INSTRUMENTS[1]} * → tide" in made.diff
    by_tide = [
        server.decide_until(pb.SOURCE_PRIMARY, instrument=INSTRUMENTS[1]),
        server.decide_until(pb.SOURCE_PRIMARY, strategy="sweep-1"),
    ]
    by_default = server.decide_until(pb.SOURCE_PRIMARY, strategy="sweep-10")
    assert {(one.model_name, one.model_version) for one in by_tide} == {("tide", version)}
    assert (by_default.model_name, by_default.model_version) == ("champion", before.model_version)

    known = server.admin.GetModelMap(admin_pb2.GetModelMapRequest(), timeout=5.0)
    assert [(one.name, one.champion_version, one.feature_set) for one in known.models] == [
        ("default", before.model_version, known.models[0].feature_set),
        ("tide", version, TIDE.version),
        ("empty", "", ""),
    ]

    (taken,) = server.status().feature_sets
    assert (taken.feature_set, list(taken.models)) == (TIDE.version, ["tide"])
    assert (list(taken.computed), list(taken.missing)) == ([], []), "all of it is copied from mf1"

    # What each champion scored lately is held against what that one has learnt.
    compared = eventually(
        lambda: {one.name: one.drift for one in server.status().models},
        lambda found: all(found[name].model_version for name in ("default", "tide")),
    )
    assert [one.model_version for one in compared.values()] == [before.model_version, version, ""]
    assert compared["empty"].problem == "it has no champion yet"

    # A canary of its own, on one strategy; the default model can have another at the same time.
    other = recalibrated(Registry(store), version, 1.5)
    start = admin_pb2.StartCanaryRequest(
        model="tide", model_version=other, strategy="sweep-1", steps=(1.0,), author="ann", reason="looks better"
    )
    canary = server.admin.StartCanary(start, timeout=120.0)
    assert (canary.change.subject, canary.canary.model, canary.canary.strategy) == ("canary/tide", "tide", "sweep-1")
    tried = server.decide_until(pb.SOURCE_CANARY, strategy="sweep-1")
    assert (tried.model_name, tried.model_version) == ("tide", other)
    assert server.decide_until(pb.SOURCE_PRIMARY, strategy="sweep-2").model_version == version
    assert not server.admin.GetCanary(admin_pb2.GetCanaryRequest(), timeout=5.0).HasField("canary")
    abort = admin_pb2.AbortCanaryRequest(model="tide", author="ann", reason="enough")
    assert server.admin.AbortCanary(abort, timeout=30.0).change.subject == "canary/tide"
    assert server.decide_until(pb.SOURCE_PRIMARY, strategy="sweep-1").model_version == version

    # Without its replicas its orders go down the chain; they do not go to the other model.
    server.force("tide/primary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    server.force("tide/secondary", admin_pb2.BREAKER_MODE_FORCED_OPEN)
    without = server.decide(instrument=INSTRUMENTS[1])
    assert (without.source, without.model_version) == (pb.SOURCE_EMBEDDED, version)
    server.switch("embedded", enabled=False)
    server.switch("cached_score", enabled=False)
    assert server.decide(instrument=INSTRUMENTS[1]).source == pb.SOURCE_RULES
    server.decide_until(pb.SOURCE_PRIMARY)

    # Both are ready to be explained before anybody asks, and the one that no order reaches takes no memory for it.
    eventually(lambda: explained(rig), lambda versions: versions == {before.model_version, version}, 60.0)

    server.drain_audit()
    packets = {packet.decision.decision_id: packet for packet, _ in server.audited()}
    settings = {packet.config_hash for packet in packets.values()}
    assert len(settings) == 1
    assert {packets[one.decision_id].chosen_model for one in (*by_tide, tried, without)} == {"tide"}
    assert {packets[one.decision_id].chosen_model for one in (by_default, before)} == {""}
    assert packets[nobody.decision_id].chosen_model == "empty"
    assert all(packets[one.decision_id].decision.control_version >= made.version for one in by_tide)
    held = next(entry.settings for entry in server._entries() if entry.HasField("settings"))
    with Replayer(lambda _: held, packets.get, ModelStore([store]).find) as replayer:
        for packet in packets.values():
            assert (await replayer.replay(packet)).first_difference is None, packet


@pytest.mark.long
@pytest.mark.parametrize("models", [["surge"]])
def test_the_challenger_of_a_named_model_scores_its_orders_and_no_others(
    rig: Rig, version: str, store: Path, tmp_path: Path
) -> None:
    server, other = rig.server, recalibrated(Registry(store), version, 2.0)
    request = admin_pb2.SetModelAliasRequest(
        model="surge", alias="champion", model_version=version, author="ann", reason="the first"
    )
    server.admin.SetModelAlias(request, timeout=120.0)
    load = admin_pb2.LoadModelRequest(
        model="surge", model_version=other, replicas=["challenger"], author="ann", reason="beside the first"
    )
    server.admin.LoadModel(load, timeout=120.0)
    server.wait_until_well("surge/primary", "surge/secondary", "surge/challenger")
    set_map(rig, rule("surge", strategy="sweep-?"))
    server.decide_until(pb.SOURCE_PRIMARY, strategy="sweep-1")
    of_surge = {server.decide(strategy="sweep-1").decision_id for _ in range(20)}
    of_default = {server.decide(strategy="alpha").decision_id for _ in range(20)}

    def pairs() -> dict[str, packet_pb2.ScorePair]:
        found = (pair for entry in server._entries() for pair in entry.score_pairs.pairs)
        return {pair.decision_id: pair for pair in found}

    found = eventually(pairs, lambda known: of_surge <= known.keys() and of_default <= known.keys())
    assert {(found[one].champion_version, found[one].challenger_version) for one in of_surge} == {(version, other)}
    assert other not in {found[one].challenger_version for one in of_default}
    server.drain_audit()
    packets = {packet.decision.decision_id: packet for packet, _ in server.audited()}
    with RunningModel(ModelStore([store]).find(other)) as challenger:
        for one in of_surge:
            row = SetRow.of(TIDE, packets[one].scored_input)
            assert found[one].challenger_score == pytest.approx(challenger.score(row, 1, 0).score, abs=1e-6)

    # What a replica has loaded is not removed, whether or not anything names it.
    third = recalibrated(Registry(store), version, 3.0)
    load = admin_pb2.LoadModelRequest(
        model="surge", model_version=third, replicas=["secondary"], author="ann", reason="to look at it"
    )
    server.admin.LoadModel(load, timeout=120.0)
    remove = ["models", "remove", third, "--yes", "--store", str(store), "--dir", str(tmp_path), "--target"]
    env = {"PRETRADE_JOURNAL__PATH": str(server.journal_path)}  # the operator's token lies beside it
    refused = CliRunner().invoke(app, [*remove, server.admin_address], env=env)
    assert (refused.exit_code, Registry(store).path(third).is_file()) == (1, True)
    assert f"{third} is loaded on surge/secondary: end its canary, or restart the replica, first" in refused.output


@pytest.mark.long
def test_a_model_server_that_is_started_anew_gets_the_versions_of_its_other_models_again(
    rig: Rig, replica_stack: Stack, version: str
) -> None:
    server = rig.server
    request = admin_pb2.SetModelAliasRequest(
        model="tide", alias="champion", model_version=version, author="ann", reason="the first"
    )
    server.admin.SetModelAlias(request, timeout=120.0)
    set_map(rig, rule("tide"))
    server.decide_until(pb.SOURCE_PRIMARY)
    replica_stack["primary"].kill()
    eventually(server.decide, lambda one: one.source == pb.SOURCE_SECONDARY and one.model_version == version)
    replica_stack.restart("primary")
    back = eventually(server.decide, lambda one: one.source == pb.SOURCE_PRIMARY, 60.0)
    assert back.model_version == version
