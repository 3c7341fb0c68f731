"""A canary where all replicas speak the Open Inference Protocol: servers that are scripted as Triton documents itself.

Triton itself is not run. What its servers are asked to load is real, and so is the decision server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.decision_server import DecisionServer
from support.guest_model import registry_with_one
from support.harness import Market, eventually
from support.rig import ROOMY
from support.triton import Triton, tritons

from local.demo.variants import recalibrated
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.models.registry import Registry
from torchserve.triton import write_version

pytestmark = pytest.mark.stack

ROLES = ("primary", "secondary", "challenger")
AUTHOR: Any = {"author": "ann", "reason": "test"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    found = registry_with_one(tmp_path_factory.mktemp("registry"))
    found.set_alias("champion", found.records()[0].version)
    return found


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


def settings_of(repository: Path, servers: dict[str, Triton], registry: Registry) -> dict[str, str]:
    protocols = {f"REPLICAS__{role.upper()}_PROTOCOL": "oip" for role in ROLES}
    described = str(repository / "champion.json")
    return {
        **ROOMY,
        **protocols,
        "REPLICAS__CHALLENGER_MODEL": "champion",
        "REPLICAS__MANAGEMENT": json.dumps({role: server.address for role, server in servers.items()}),
        "OIP__CHAMPION": described,
        "OIP__CHALLENGER": described,
        "OIP__INPUT_NAME": "input__0",
        "OIP__OUTPUT_NAME": "output__0",
        "OIP__VERSION_NAMES": "number",
        "OIP__TRITON_CONFIGS": json.dumps({"champion": str(repository / "champion.config.json")}),
        "REPLAY__MODEL_STORE": str(registry.root),
        "REPLICA__WARM_UP_SECONDS": "0",
        "CHAIN__STAGES": '["model", "rules"]',
        "EMBEDDED__CHECK_SHARE": "0",
    }


def test_a_version_is_tried_rolled_back_tried_again_promoted_and_taken_back(
    tmp_path: Path, registry: Registry, redis_url: str
) -> None:
    first = registry.resolve("champion")
    second = recalibrated(registry, first, 1.1)
    repository = tmp_path / "repository"
    write_version(registry.path(first), repository)

    def number(version: str) -> int:
        return int(version[:15], 16)

    with tritons(repository, ROLES, "champion") as servers:
        addresses = {role: server.address for role, server in servers.items()}
        settings = settings_of(repository, servers, registry)
        with DecisionServer(tmp_path / "server", redis_url, **addresses, settings=settings) as server:
            server.wait_until_well(*ROLES)
            assert server.decide_until(pb.SOURCE_PRIMARY).model_version == first
            start = admin_pb2.StartCanaryRequest(model_version=second, steps=[1.0], **AUTHOR)
            with pytest.raises(grpc.RpcError, match="must be in its model repository"):
                server.admin.StartCanary(start, timeout=60.0)
            write_version(registry.path(second), repository)

            started = server.admin.StartCanary(start, timeout=60.0)
            assert started.canary.champion_version == first
            assert servers["challenger"].versions("champion") == sorted(map(number, (first, second)))
            on_trial = eventually(server.decide, lambda decision: decision.model_version == second)
            assert on_trial.source == pb.SOURCE_CANARY
            assert servers["primary"].versions("champion") == [number(first)]
            server.admin.AbortCanary(admin_pb2.AbortCanaryRequest(**AUTHOR), timeout=30.0)
            assert server.decide_until(pb.SOURCE_PRIMARY).model_version == first
            eventually(lambda: servers["challenger"].versions("champion"), lambda seen: seen == [number(first)])

            server.admin.StartCanary(start, timeout=60.0)
            server.admin.PromoteCanary(admin_pb2.PromoteCanaryRequest(**AUTHOR), timeout=60.0)
            for role in ("primary", "secondary"):
                assert servers[role].versions("champion") == sorted(map(number, (first, second)))
            promoted = eventually(server.decide, lambda decision: decision.model_version == second)
            assert promoted.source == pb.SOURCE_PRIMARY
            assert {name for name, _ in servers["primary"].asked} == {"champion"}
            assert all(version for _, version in servers["primary"].asked), "a version is always named"

            server.admin.RollBack(admin_pb2.RollBackRequest(**AUTHOR), timeout=60.0)
            eventually(lambda: server.decide_until(pb.SOURCE_PRIMARY).model_version, lambda seen: seen == first)
