"""The same scores whatever a replica speaks: 10,000 rows through the batcher to real servers, against the handler.

MLServer runs where its own environment is: `make mlserver` makes it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from support.decision_server import DecisionServer
from support.guest_model import write_guest_model
from support.harness import INSTRUMENTS, ROOMY, eventually
from support.mlserver import MLSERVER, serving

from feature_cache import features
from feature_cache.features import MF1
from feature_cache.sources.simulator import simulate
from local.stack.ports import free_ports
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.codec import TORCHSERVE, Codec
from server.inference.oip import ModelDescription, OpenInference, OpenInferenceSettings
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.inference.rows import Scored
from server.models.archive import read_archive
from server.rpc.decision import MAX_BATCH
from torchserve.dataset import collect
from torchserve.handler import ModelHandler
from torchserve.mlserver import write_folder

ROOT = Path(__file__).parents[2]
REPLICAS = {"champion": "primary", "challenger": "challenger"}
ROWS = 10_000

pytestmark = [pytest.mark.stack, pytest.mark.long]
needs_mlserver = pytest.mark.skipif(
    not MLSERVER.exists(), reason="MLServer's own environment is not there: make mlserver"
)


@pytest.fixture(scope="module")
def rows() -> NDArray[np.float32]:
    """Real rows, undefined values included, and as many of nothing but extremes as it takes."""
    real = collect(simulate(8, ["ETHUSDT.SIM"], duration_seconds=60), "test").rows
    assert np.isnan(real).any()
    random = np.random.default_rng(1)
    odd = random.choice(
        np.array([np.nan, 0.0, -0.0, 1e-30, 1e30, -1e30, 1.0], dtype=np.float32), (ROWS, features.N_FEATURES)
    )
    return np.concatenate([real, odd])[:ROWS]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("oip"), model_store=model_store)
    with Stack(settings, parts={"valkey", *REPLICAS.values()}) as stack:
        yield stack


@pytest.fixture(scope="module")
def scalper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of another model, which the map can give orders to."""
    path = tmp_path_factory.mktemp("scalper") / "scalper.mar"
    write_guest_model(MF1, path)
    return path


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory, model_store: Path, scalper: Path) -> Iterator[str]:
    """`HOST:PORT` of an MLServer that serves the champion with its stock XGBoost runtime, and another model."""
    folder = tmp_path_factory.mktemp("mlserver")
    write_folder(model_store / "champion.mar", folder)
    write_folder(scalper, folder / "scalper", "scalper")
    codec = OpenInference(OpenInferenceSettings(), described(model_store, "champion"))
    with serving(folder) as (process, address):

        def answers() -> bool:
            assert process.poll() is None, (folder / "mlserver.log").read_text()[-2_000:]
            return asyncio.run(probed(codec, address))

        eventually(answers, bool)
        yield address


def described(store: Path, model: str) -> ModelDescription:
    return ModelDescription.read(store / f"{model}.json")


def another_version(description: ModelDescription) -> ModelDescription:
    return description.model_copy(update={"version": "0" * 16})


async def probed(codec: Codec, address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            await codec.open(channel)(codec.request("champion", [bytes(100)], "", MF1), timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
    return True


def expected(store: Path, model: str, rows: NDArray[np.float32], directory: Path) -> NDArray[np.float32]:
    """Scores of the archive's handler in this process, in batches as they will be served."""
    with zipfile.ZipFile(store / f"{model}.mar") as archive:
        archive.extractall(directory)
    manifest = json.loads((directory / "MAR-INF" / "MANIFEST.json").read_text())
    handler = ModelHandler()
    handler.initialize(SimpleNamespace(system_properties={"model_dir": str(directory)}, manifest=manifest))
    gc.unfreeze()
    return np.concatenate([handler.score(rows[first : first + 256]) for first in range(0, len(rows), 256)])


@asynccontextmanager
async def replica_at(address: str, model: str, codec: Codec, version: str | None) -> AsyncIterator[Replica]:
    patient = BatcherSettings(min_patience_seconds=10, max_patience_seconds=10, max_queued_rows=ROWS)
    loop = asyncio.get_running_loop()
    replica = Replica(
        "primary",
        address,
        model,
        version,
        ReplicaLimits(
            ReplicaSettings(call_bound_seconds=20, probe_timeout_seconds=10), patient, BreakerSettings(slow_seconds=10)
        ),
        clock=loop.time,
        random=lambda: 0.5,
        codec=codec,
    )
    async with replica:
        await asyncio.wait_for(replica.proven.wait(), 30)
        yield replica


async def served(
    address: str, model: str, codec: Codec, version: str, rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    async with replica_at(address, model, codec, version) as replica:
        deadline = asyncio.get_running_loop().time() + 60
        futures = [replica.batcher.submit(row.astype("<f4").tobytes(), deadline) for row in rows]
        results = await asyncio.gather(*futures)
        assert replica.model is not None
        assert replica.model.version == version
        assert replica.batcher.batches < len(rows) / 100
    scored = [result for result in results if isinstance(result, Scored)]
    assert len(scored) == len(rows)
    return np.array([result.score for result in scored], dtype=np.float32)


@pytest.mark.parametrize("model", REPLICAS)
async def test_torchserve_gives_the_scores_of_the_handler(
    model: str, stack: Stack, model_store: Path, rows: NDArray[np.float32], tmp_path: Path
) -> None:
    address = str(getattr(stack.endpoints, REPLICAS[model]))
    version = described(model_store, model).version
    scores = await served(address, model, TORCHSERVE, version, rows)
    np.testing.assert_allclose(scores, expected(model_store, model, rows, tmp_path), rtol=0, atol=1e-6)
    assert np.ptp(scores) > 0.1


@needs_mlserver
async def test_mlserver_gives_the_scores_of_the_handler(
    mlserver: str, model_store: Path, rows: NDArray[np.float32], tmp_path: Path
) -> None:
    description = described(model_store, "champion")
    codec = OpenInference(OpenInferenceSettings(), description)
    scores = await served(mlserver, "champion", codec, description.version, rows)
    np.testing.assert_allclose(scores, expected(model_store, "champion", rows, tmp_path), rtol=0, atol=1e-6)


async def outcome_of(address: str, codec: Codec, model: str = "champion", row: bytes = bytes(100)) -> Outcome:
    """What becomes of one batch of one row."""
    async with replica_at_once(address, model, codec) as replica:
        try:
            await replica.ask([row], None)
        except BatchFailedError as failure:
            return failure.outcome
    return Outcome.SUCCESS


@asynccontextmanager
async def replica_at_once(address: str, model: str, codec: Codec) -> AsyncIterator[Replica]:
    """A replica whose first probe may still be under way."""
    loop = asyncio.get_running_loop()
    limits = ReplicaLimits(ReplicaSettings(call_bound_seconds=5, probe_interval_seconds=60))
    async with Replica(
        "primary", address, model, None, limits, clock=loop.time, random=lambda: 0.5, codec=codec
    ) as replica:
        yield replica


def failures(address: str, codec: OpenInference, other: OpenInference) -> Callable[[], Any]:
    async def collected() -> dict[str, Outcome]:
        return {
            "sound": await outcome_of(address, codec),
            "no such model": await outcome_of(address, codec, model="nope"),
            "short row": await outcome_of(address, codec, row=bytes(96)),
            "another version": await outcome_of(address, other),
            "nobody there": await outcome_of(f"127.0.0.1:{free_ports(1)[0]}", codec),
        }

    return collected


EXPECTED_FAILURES = {
    "sound": Outcome.SUCCESS,
    "no such model": Outcome.MODEL_ERROR,
    "short row": Outcome.MODEL_ERROR,
    "another version": Outcome.MODEL_ERROR,
    "nobody there": Outcome.TRANSPORT,
}


@needs_mlserver
async def test_failures_of_mlserver_are_classed_by_their_meaning(mlserver: str, model_store: Path) -> None:
    description = described(model_store, "champion")
    codec = OpenInference(OpenInferenceSettings(), description)
    other = OpenInference(OpenInferenceSettings(), another_version(description))
    assert await failures(mlserver, codec, other)() == EXPECTED_FAILURES
    named = OpenInference(OpenInferenceSettings(output_name="nope"), description)
    assert await outcome_of(mlserver, named) is Outcome.MODEL_ERROR


def decided(server: DecisionServer, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The primary's scores of orders that bring these rows along; who was answered by somebody else asks again."""
    scores = np.full(len(rows), np.nan, dtype=np.float32)
    waiting = list(range(len(rows)))

    def ask() -> list[int]:
        for first in range(0, len(waiting), MAX_BATCH):
            some = waiting[first : first + MAX_BATCH]
            request = pb.DecideBatchRequest(orders=[order(rows[index]) for index in some])
            answer = server.decisions.DecideBatch(request, timeout=60.0)
            for index, result in zip(some, answer.results, strict=True):
                if result.decision.source == pb.SOURCE_PRIMARY:
                    scores[index] = result.decision.score
        waiting[:] = [index for index in waiting if np.isnan(scores[index])]
        return waiting

    eventually(ask, lambda left: not left, patience_seconds=120)
    return scores


def order(row: NDArray[np.float32]) -> pb.Order:
    vector = pb.FeatureVector(feature_set_id=features.MF1.id, values=row.tolist())
    return pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, strategy="test", features=vector)


def check_a_decision_server(
    primary: str, model: str, settings: dict[str, str], stack: Stack, model_store: Path, tmp_path: Path
) -> None:
    """Holds the scores that callers get through a whole server against the handler's."""
    random = np.random.default_rng(3)
    rows = random.normal(size=(ROWS, features.N_FEATURES)).astype(np.float32)
    rows = np.clip(rows, features.MF1.lowest, features.MF1.highest)  # callers' own features are finite and possible
    settings = {**ROOMY, "REPLICAS__CHAMPION_MODEL": model, **settings}
    redis_url = str(stack.endpoints.redis_url)
    with DecisionServer(tmp_path / "server", redis_url, primary=primary, settings=settings) as server:
        eventually(lambda: server.replica("primary").healthy, bool)
        scores = decided(server, rows)
    np.testing.assert_allclose(scores, expected(model_store, model, rows, tmp_path), rtol=0, atol=1e-6)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("model", REPLICAS)
def test_a_decision_server_gives_the_scores_of_the_handler(
    model: str, stack: Stack, model_store: Path, tmp_path: Path
) -> None:
    primary = str(getattr(stack.endpoints, REPLICAS[model]))
    check_a_decision_server(primary, model, {}, stack, model_store, tmp_path)


@needs_mlserver
def test_a_decision_server_gives_the_scores_of_the_handler_through_mlserver(
    mlserver: str, stack: Stack, model_store: Path, tmp_path: Path
) -> None:
    settings = {"REPLICAS__PRIMARY_PROTOCOL": "oip", "OIP__CHAMPION": str(model_store / "champion.json")}
    check_a_decision_server(mlserver, "champion", settings, stack, model_store, tmp_path)


@needs_mlserver
def test_two_models_of_the_map_are_served_by_one_mlserver(
    mlserver: str, stack: Stack, model_store: Path, scalper: Path, tmp_path: Path
) -> None:
    write_folder(scalper, tmp_path, "scalper")
    own = dict.fromkeys(("primary", "secondary"), mlserver)
    spoken = {f"{role}_protocol": "oip" for role in own}
    model = {**own, **spoken, "oip": {"champion": str(tmp_path / "scalper.json")}}
    settings = {
        **ROOMY,
        "REPLICAS__PRIMARY_PROTOCOL": "oip",
        "OIP__CHAMPION": str(model_store / "champion.json"),
        "MODELS": json.dumps({"scalper": model, "fast": {**model, "served_as": "scalper"}}),
    }
    rules = [admin_pb2.ModelMapRule(strategy=name, model=name) for name in ("scalper", "fast")]
    redis_url = str(stack.endpoints.redis_url)
    row = np.clip(np.random.default_rng(5).normal(size=features.N_FEATURES), MF1.lowest, MF1.highest)
    with DecisionServer(tmp_path / "server", redis_url, primary=mlserver, settings=settings) as server:
        asked = ("primary", "scalper/primary", "fast/secondary")
        eventually(lambda: all(server.replica(name).healthy for name in asked), bool)
        request = admin_pb2.SetModelMapRequest(rules=rules, author="ann", reason="test")
        server.admin.SetModelMap(request, timeout=10.0)

        def decided_by(strategy: str) -> pb.Decision:
            ours = order(row.astype(np.float32))
            ours.strategy = strategy
            return eventually(
                lambda: server.decisions.Decide(pb.DecideRequest(order=ours), timeout=10.0).decision,
                lambda one: one.source == pb.SOURCE_PRIMARY,
            )

        by = {strategy: decided_by(strategy) for strategy in ("test", "scalper", "fast")}
    other = read_archive(scalper).version
    versions = {"test": described(model_store, "champion").version, "scalper": other, "fast": other}
    assert {strategy: one.model_version for strategy, one in by.items()} == versions
    assert [one.model_name for one in by.values()] == ["champion", "scalper", "scalper"]
    assert by["scalper"].score == by["fast"].score != by["test"].score
