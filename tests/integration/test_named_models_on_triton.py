"""Several models of the map on the same servers of the Open Inference Protocol, scripted as Triton documents itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from support.decision_server import DecisionServer
from support.guest_model import write_guest_model
from support.guest_sets import know
from support.harness import INSTRUMENTS, ROOMY, Market, eventually
from support.triton import Triton, tritons

from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.feature_sets import Registered
from feature_cache.features import MF1
from local.demo.variants import recalibrated
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.models.registry import VERSIONS, Registry
from torchserve.triton import write_version

pytestmark = pytest.mark.stack

ROLES: Final = ("primary", "secondary", "challenger")
AUTHOR: Any = {"author": "ann", "reason": "test"}
TIDE: Final = FeatureSet(
    "tide", (Feature("imbalance_l5", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),)
)
SETS: Final = """
from feature_cache.feature_set import Feature, FeatureSet

FEATURE_SETS = [FeatureSet("tide", (
    Feature("imbalance_l5", "", "Copied from mf1.", -1.0, 1.0, signed=True, source="mf1"),
))]
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A version of each set; the alias of the default model's champion is that of mf1."""
    know(monkeypatch, Registered(TIDE, None, "this test"))
    root = tmp_path / "registry"
    (root / VERSIONS).mkdir(parents=True)
    for name, feature_set in (("champion", MF1), ("tide", TIDE)):
        archive = write_guest_model(feature_set, root / "new.mar", name)
        (root / "new.mar").rename(root / VERSIONS / f"{archive.version}.mar")
        Registry(root, "default" if name == "champion" else name).set_alias("champion", archive.version)
    return Registry(root)


@pytest.fixture
def redis_url(tmp_path: Path, registry: Registry) -> Iterator[str]:
    with Stack(LocalSettings(dir=tmp_path / "stack", model_store=registry.root), parts={"valkey"}) as stack:
        market = Market(str(stack.endpoints.redis_url))
        writer = threading.Thread(target=market.run)
        writer.start()
        try:
            yield market.redis_url
        finally:
            market.stopped.set()
            writer.join()


def settings_of(tmp_path: Path, servers: dict[str, Triton], registry: Registry) -> dict[str, str]:
    (tmp_path / "sets.py").write_text(SETS)
    repository = tmp_path / "repository"
    protocols = {f"REPLICAS__{role.upper()}_PROTOCOL": "oip" for role in ROLES}
    described = str(repository / "champion.json")
    configs = {name: str(repository / f"{name}.config.json") for name in ("champion", "tide", "bare")}
    models = {"tide": {"oip": {"champion": str(repository / "tide.json")}}, "bare": {}}
    return {
        **ROOMY,
        **protocols,
        "MODELS": json.dumps(models),
        "REPLICAS__MANAGEMENT": json.dumps({role: server.address for role, server in servers.items()}),
        "REPLICAS__CHALLENGER_MODEL": "champion",
        "OIP__CHAMPION": described,
        "OIP__CHALLENGER": described,
        "OIP__INPUT_NAME": "input__0",
        "OIP__OUTPUT_NAME": "output__0",
        "OIP__VERSION_NAMES": "number",
        "OIP__TRITON_CONFIGS": json.dumps(configs),
        "FEATURES__FILE": str(tmp_path / "sets.py"),
        "REPLAY__MODEL_STORE": str(registry.root),
        "REPLICA__WARM_UP_SECONDS": "0",
        "CHAIN__STAGES": '["model", "rules"]',
        "EMBEDDED__CHECK_SHARE": "0",
    }


@pytest.mark.long
def test_three_models_of_one_server_are_described_loaded_tried_and_promoted_each_by_itself(
    tmp_path: Path, registry: Registry, redis_url: str
) -> None:
    first, tide = registry.resolve("champion"), Registry(registry.root, "tide").resolve("champion")
    repository = tmp_path / "repository"
    write_version(registry.path(first), repository)
    write_version(registry.path(tide), repository, "tide")
    # No description says what `bare` serves: its first version is named by its alias.
    second = recalibrated(registry, tide, 1.1)
    write_version(registry.path(second), repository, "bare")
    with tritons(repository, ROLES, "champion", "tide") as servers:
        addresses = {role: server.address for role, server in servers.items()}
        settings = settings_of(tmp_path, servers, registry)
        with DecisionServer(tmp_path / "server", redis_url, **addresses, settings=settings) as server:
            server.wait_until_well(*ROLES, "tide/primary", "tide/secondary")
            rules = [
                admin_pb2.ModelMapRule(instrument=INSTRUMENTS[1], model="tide"),
                admin_pb2.ModelMapRule(strategy="bare", model="bare"),
            ]
            server.admin.SetModelMap(admin_pb2.SetModelMapRequest(rules=rules, **AUTHOR), timeout=10.0)
            of_tide = server.decide_until(pb.SOURCE_PRIMARY, instrument=INSTRUMENTS[1])
            assert (of_tide.model_name, of_tide.model_version) == ("tide", tide)
            of_default = server.decide_until(pb.SOURCE_PRIMARY)
            assert (of_default.model_name, of_default.model_version) == ("champion", first)

            assert server.decide(strategy="bare").source == pb.SOURCE_RULES, "it has no version yet"
            alias = admin_pb2.SetModelAliasRequest(alias="champion", model="bare", model_version=second, **AUTHOR)
            server.admin.SetModelAlias(alias, timeout=60.0)
            of_bare = server.decide_until(pb.SOURCE_PRIMARY, strategy="bare")
            assert (of_bare.model_name, of_bare.model_version) == ("bare", second)

            start = admin_pb2.StartCanaryRequest(model="tide", model_version=second, steps=[1.0], **AUTHOR)
            with pytest.raises(grpc.RpcError, match="must be in its model repository"):
                server.admin.StartCanary(start, timeout=60.0)
            write_version(registry.path(second), repository, "tide")
            server.admin.StartCanary(start, timeout=60.0)
            tried = server.decide_until(pb.SOURCE_CANARY, instrument=INSTRUMENTS[1])
            assert (tried.model_name, tried.model_version) == ("tide", second)
            server.admin.PromoteCanary(admin_pb2.PromoteCanaryRequest(model="tide", **AUTHOR), timeout=60.0)
            promoted = eventually(
                lambda: server.decide(instrument=INSTRUMENTS[1]), lambda one: one.model_version == second
            )
            assert (promoted.source, promoted.model_name) == (pb.SOURCE_PRIMARY, "tide")
            assert server.decide_until(pb.SOURCE_PRIMARY).model_version == first
    numbers = [int(version[:15], 16) for version in (tide, second)]
    policies = [json.loads(one.parameters["config"].string_param) for one in servers["primary"].loads]
    assert [one.model_name for one in servers["primary"].loads] == ["bare", "tide"]
    assert [one["version_policy"]["specific"]["versions"] for one in policies] == [[numbers[1]], sorted(numbers)]
    assert all(one["input"][0]["dims"] == [len(TIDE)] for one in policies), "each model has a configuration of its own"
