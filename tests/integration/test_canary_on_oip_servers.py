"""A canary where all replicas speak the Open Inference Protocol: on servers scripted as Triton documents itself, and on
MLServer itself, which runs where its own environment is (`make mlserver`).

Triton itself is not run. What its servers are asked to load is real, and so is the decision server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from support.decision_server import DecisionServer
from support.guest_model import registry_with_one
from support.harness import ROOMY, Market, eventually
from support.mlserver import MLSERVER, serving
from support.triton import tritons

from local.demo.variants import recalibrated
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.oip import repository_pb2
from server.models.registry import Registry
from torchserve.mlserver import write_folder
from torchserve.triton import write_version

pytestmark = pytest.mark.stack

ROLES: Final = ("primary", "secondary", "challenger")
AUTHOR: Any = {"author": "ann", "reason": "test"}


@dataclass
class Servers:
    """Three model servers that serve the first version."""

    addresses: dict[str, str]
    """`HOST:PORT` by role."""
    described: Path
    """What their first version is."""
    settings: dict[str, str]
    put: Callable[[str], None]
    """Lays a version's files into their repositories."""
    number: Callable[[str], str]
    """What they call a version."""
    unloads: bool
    """Whether a version leaves while its files are there."""

    def serves(self, role: str, version: str) -> bool:
        """By what the server itself says."""
        request = repository_pb2.ModelReadyRequest(name="champion", version=self.number(version))
        with grpc.insecure_channel(self.addresses[role]) as channel:
            ask = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelReady",
                request_serializer=repository_pb2.ModelReadyRequest.SerializeToString,
                response_deserializer=repository_pb2.ModelReadyResponse.FromString,
            )
            try:
                ready: bool = ask(request, timeout=5.0).ready
            except grpc.RpcError:
                return False  # not there at all
        return ready


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


@pytest.fixture
def scripted(tmp_path: Path, registry: Registry) -> Iterator[Servers]:
    repository = tmp_path / "repository"

    def put(version: str) -> None:
        write_version(registry.path(version), repository)

    put(registry.resolve("champion"))
    settings = {
        "OIP__INPUT_NAME": "input__0",
        "OIP__OUTPUT_NAME": "output__0",
        "OIP__VERSION_NAMES": "number",
        "OIP__TRITON_CONFIGS": json.dumps({"champion": str(repository / "champion.config.json")}),
    }
    with tritons(repository, ROLES, "champion") as servers:
        addresses = {role: server.address for role, server in servers.items()}
        described = repository / "champion.json"
        yield Servers(addresses, described, settings, put, lambda version: str(int(version[:15], 16)), unloads=True)
        for server in servers.values():
            assert {name for name, _ in server.asked} <= {"champion"}
            assert all(version for _, version in server.asked), "a version is always named"


@pytest.fixture
def mlservers(tmp_path: Path, registry: Registry) -> Iterator[Servers]:
    folders = {role: tmp_path / role for role in ROLES}

    def put(version: str) -> None:
        for folder in folders.values():
            write_folder(registry.path(version), folder / version)

    first = registry.resolve("champion")
    put(first)
    with ExitStack() as stack:
        addresses = {role: stack.enter_context(serving(folder))[1] for role, folder in folders.items()}
        described = folders["primary"] / first / "champion.json"
        servers = Servers(addresses, described, {}, put, lambda version: version, unloads=False)
        for role in ROLES:
            eventually(lambda role=role: servers.serves(role, first), bool, patience_seconds=300)  # type: ignore[misc]
        yield servers


needs_mlserver = pytest.mark.skipif(
    not MLSERVER.exists(), reason="MLServer's own environment is not there: make mlserver"
)


@pytest.fixture(
    params=["scripted", pytest.param("mlservers", marks=[pytest.mark.long, pytest.mark.timeout(900), needs_mlserver])]
)
def servers(request: pytest.FixtureRequest) -> Servers:
    found: Servers = request.getfixturevalue(request.param)
    return found


def settings_of(servers: Servers, registry: Registry) -> dict[str, str]:
    protocols = {f"REPLICAS__{role.upper()}_PROTOCOL": "oip" for role in ROLES}
    return {
        **ROOMY,
        **protocols,
        **servers.settings,
        "REPLICAS__CHALLENGER_MODEL": "champion",
        "REPLICAS__MANAGEMENT": json.dumps(servers.addresses),
        "OIP__CHAMPION": str(servers.described),
        "OIP__CHALLENGER": str(servers.described),
        "REPLAY__MODEL_STORE": str(registry.root),
        "REPLICA__WARM_UP_SECONDS": "0",
        # MLServer is slow, and on a busy machine slower: that is not what is asked here.
        "BREAKER__SLOW_SECONDS": "10",
        "REPLICA__PROBE_TIMEOUT_SECONDS": "10",
        "BATCHER__MIN_PATIENCE_SECONDS": "1.5",
        "BATCHER__MAX_PATIENCE_SECONDS": "1.5",
        "CHAIN__STAGES": '["model", "rules"]',
        "EMBEDDED__CHECK_SHARE": "0",
    }


@pytest.mark.long
def test_a_version_is_tried_rolled_back_tried_again_promoted_and_taken_back(
    tmp_path: Path, registry: Registry, redis_url: str, servers: Servers
) -> None:
    first = registry.resolve("champion")
    second = recalibrated(registry, first, 1.1)
    settings = settings_of(servers, registry)
    with DecisionServer(tmp_path / "server", redis_url, **servers.addresses, settings=settings) as server:
        server.wait_until_well(*ROLES)
        assert server.decide_until(pb.SOURCE_PRIMARY).model_version == first
        start = admin_pb2.StartCanaryRequest(model_version=second, steps=[1.0], **AUTHOR)
        with pytest.raises(grpc.RpcError, match="must be in its model repository"):
            server.admin.StartCanary(start, timeout=60.0)
        servers.put(second)

        started = server.admin.StartCanary(start, timeout=60.0)
        assert started.canary.champion_version == first
        assert servers.serves("challenger", first)
        assert servers.serves("challenger", second)
        on_trial = eventually(server.decide, lambda decision: decision.model_version == second)
        assert on_trial.source == pb.SOURCE_CANARY
        assert servers.serves("primary", first)
        assert not servers.serves("primary", second)
        server.admin.AbortCanary(admin_pb2.AbortCanaryRequest(**AUTHOR), timeout=30.0)
        assert server.decide_until(pb.SOURCE_PRIMARY).model_version == first
        if servers.unloads:
            eventually(lambda: servers.serves("challenger", second), lambda is_served: not is_served)

        server.admin.StartCanary(start, timeout=60.0)
        server.admin.PromoteCanary(admin_pb2.PromoteCanaryRequest(**AUTHOR), timeout=60.0)
        for role in ("primary", "secondary"):
            assert servers.serves(role, first)
            assert servers.serves(role, second)
        promoted = eventually(server.decide, lambda decision: decision.model_version == second)
        assert promoted.source == pb.SOURCE_PRIMARY

        server.admin.RollBack(admin_pb2.RollBackRequest(**AUTHOR), timeout=60.0)
        eventually(lambda: server.decide_until(pb.SOURCE_PRIMARY).model_version, lambda seen: seen == first)
