"""The model repository API: one contract for MLServer itself and for a server that is scripted as Triton documents it.

MLServer runs where its own environment is: `make mlserver` makes it. Triton itself is not run.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import lightgbm
import numpy as np
import pytest
from support.guest_model import registry_with_one
from support.labelled_rows import labelled_rows
from support.mlserver import MLSERVER, serving
from support.model_server import certify
from support.triton import Triton, triton

from feature_cache.features import MF1
from local.demo.variants import recalibrated
from server.inference.breaker import BreakerSettings
from server.inference.oip import ModelDescription, OpenInference, OpenInferenceSettings
from server.inference.outcome import BatchFailedError, Outcome
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.models.loading import ModelLoader
from server.models.management import LoadError
from server.models.registry import Registry
from server.security.client_tls import ClientTls
from server.security.private import write_private
from server.security.settings import ClientTlsSettings
from server.security.trial import TrialAuthority
from torchserve.brought.adding import Adding, add
from torchserve.brought.reading import read_model
from torchserve.export import write_archive
from torchserve.mlserver import write_folder
from torchserve.triton import write_version

ROW = bytes(MF1.row_bytes)
TRITON_NAMES = {"input_name": "input__0", "output_name": "output__0", "version_names": "number"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One version of boosted trees, the first of all tests here."""
    return registry_with_one(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def first(registry: Registry) -> str:
    return registry.records()[0].version


@pytest.fixture(scope="module")
def second(registry: Registry, first: str) -> str:
    return recalibrated(registry, first, 1.5)


@dataclass
class Dialect:
    """A server of the protocol, with the repository that a test puts versions into."""

    address: str
    settings: OpenInferenceSettings
    registry: Registry
    put: Callable[[str], None]
    """Lays a version's files into the repository."""
    take: Callable[[str], None]
    """Takes them out."""
    spoil: Callable[[str], object]
    """Lays files into it that are no model."""

    def loader(self, seconds: float = 30.0) -> ModelLoader:
        return ModelLoader({"primary": self.address}, "", seconds, oip=self.settings)

    @asynccontextmanager
    async def replica(self, version: str, tls: ClientTls | None = None) -> AsyncIterator[Replica]:
        described = ModelDescription.model_validate_json(json.dumps(description(self.registry, version)))
        limits = ReplicaLimits(
            ReplicaSettings(probe_timeout_seconds=5.0, warm_up_seconds=0.0), breaker=BreakerSettings(slow_seconds=5.0)
        )
        made = Replica(
            "primary",
            self.address,
            "champion",
            None,
            limits,
            clock=asyncio.get_running_loop().time,
            random=lambda: 0.5,
            codec=OpenInference(self.settings, described),
            tls=tls,
        )
        async with made as replica:
            await asyncio.wait_for(replica.proven.wait(), 30)
            yield replica


def description(registry: Registry, version: str) -> dict[str, Any]:
    record = registry.usable(version)
    return {
        "version": version,
        "threshold": record.threshold,
        "feature_set_fingerprint": record.features.fingerprint,
        "expires_at": record.expires_at,
    }


def number(version: str) -> int:
    return int(version[:15], 16)


@asynccontextmanager
async def scripted_triton(
    tmp_path: Path, registry: Registry, *served: str, with_config: bool = True, **how: Any
) -> AsyncIterator[tuple[Triton, Dialect]]:
    repository = tmp_path / "repository"
    repository.mkdir()

    def put(version: str) -> None:
        write_version(registry.path(version), repository)

    def folder(version: str) -> Path:
        return repository / "champion" / str(number(version))

    for version in served:
        put(version)
    config = {"triton_configs": {"champion": repository / "champion.config.json"}} if with_config else {}
    settings = OpenInferenceSettings.model_validate({**TRITON_NAMES, **config})
    async with triton(repository, "champion", **how) as server:
        yield (
            server,
            Dialect(
                server.address,
                settings,
                registry,
                put,
                lambda version: shutil.rmtree(folder(version)),
                lambda version: (folder(version) / "xgboost.json").write_text("{"),
            ),
        )


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory, registry: Registry, first: str) -> Iterator[Dialect]:
    """A real MLServer, which serves the first version."""
    if not MLSERVER.exists():
        pytest.skip("MLServer's own environment is not there: make mlserver")
    repository = tmp_path_factory.mktemp("mlserver")

    def put(version: str) -> None:
        write_folder(registry.path(version), repository / version)

    put(first)
    with serving(repository) as (_, address):
        yield Dialect(
            address,
            OpenInferenceSettings(),
            registry,
            put,
            lambda version: shutil.rmtree(repository / version),
            lambda version: (repository / version / "model.json").write_text("{"),
        )


@pytest.fixture(params=["triton", "triton that decides by itself", "mlserver 1.3", "mlserver"])
async def dialect(
    request: pytest.FixtureRequest, tmp_path: Path, registry: Registry, first: str
) -> AsyncIterator[Dialect]:
    if request.param == "mlserver":
        yield request.getfixturevalue("mlserver")
        return
    with_config, older = request.param == "triton", request.param == "mlserver 1.3"
    async with scripted_triton(tmp_path, registry, first, with_config=with_config, older=older) as (_, made):
        yield made


async def scores_of(replica: Replica, registry: Registry, version: str) -> tuple[str, bool]:
    """The version that answers where this one is wanted, and whether its scores are those of its archive."""
    record = registry.usable(version)
    answer = await replica.ask([row.astype("<f4").tobytes() for row in record.canned_rows], version)
    return answer.model.version, bool(np.allclose(answer.scores, record.canned_scores, rtol=0, atol=1e-6))


async def test_a_version_is_loaded_beside_the_other_and_asked_for_by_name(
    dialect: Dialect, registry: Registry, first: str, second: str
) -> None:
    loader = dialect.loader()
    async with dialect.replica(first) as replica:
        dialect.put(second)
        assert await loader.loaded(replica) == [first]
        await loader.load(replica, registry.usable(second))
        await loader.load(replica, registry.usable(second))  # there already
        assert set(await loader.loaded(replica)) == {first, second}
        assert [await scores_of(replica, registry, one) for one in (first, second)] == [(first, True), (second, True)]
        assert (await replica.ask([ROW], None)).model.version == first, "the one described, whatever the server prefers"

        await loader.make_default(replica, second)
        dialect.take(first)
        await loader.unload(replica, first)
        await loader.unload(replica, first)  # gone already
        assert await loader.loaded(replica) == [second]
        with pytest.raises(BatchFailedError) as gone:
            await replica.ask([ROW], first)
        assert gone.value.outcome is Outcome.MODEL_ERROR
        # And back, as after a rollback to a version that was unloaded.
        dialect.put(first)
        await loader.load(replica, registry.usable(first))
        dialect.take(second)
        await loader.unload(replica, second)
        assert await loader.loaded(replica) == [first]


async def test_a_version_whose_files_are_missing_or_broken_is_refused_and_the_other_one_goes_on(
    dialect: Dialect, registry: Registry, first: str, second: str
) -> None:
    loader = dialect.loader()
    async with dialect.replica(first) as replica:
        name = replica.codec.served_name(second)
        with pytest.raises(LoadError, match=f"does not serve version {name}.*must be in its model repository"):
            await loader.load(replica, registry.usable(second))
        dialect.put(second)
        dialect.spoil(second)
        with pytest.raises(LoadError, match="primary did not load"):
            await loader.load(replica, registry.usable(second))
        assert await loader.loaded(replica) == [first]
        assert await scores_of(replica, registry, first) == (first, True)
        dialect.take(second)


async def test_a_version_that_another_server_loaded_stays_when_one_more_is_loaded(
    tmp_path: Path, registry: Registry, first: str, second: str
) -> None:
    third = recalibrated(registry, first, 2.0)
    async with scripted_triton(tmp_path, registry, first) as (server, made):
        loader = made.loader()
        async with made.replica(first) as replica, made.replica(first) as of_another_server:
            made.put(second)
            made.put(third)
            await loader.load(of_another_server, registry.usable(second))
            assert len(await loader.loaded(replica)) == 2
            await loader.load(replica, registry.usable(third))
            assert server.versions("champion") == sorted(map(number, (first, second, third)))
            await loader.unload(replica, second)
            assert server.versions("champion") == sorted(map(number, (first, third))), "its files are still there"
            sent = json.loads(server.loads[-1].parameters["config"].string_param)
            assert sent["backend"] == "fil"
            assert sent["version_policy"] == {"specific": {"versions": sorted(map(number, (first, third)))}}


async def test_a_version_stays_loaded_while_its_files_are_there_and_the_repository_decides(
    tmp_path: Path, registry: Registry, first: str, second: str
) -> None:
    async with (
        scripted_triton(tmp_path, registry, first, second, with_config=False) as (server, made),
        made.replica(first) as replica,
    ):
        await made.loader().unload(replica, second)
        assert server.versions("champion") == sorted(map(number, (first, second)))
        assert not server.loads[-1].parameters, "its own configuration counts"


async def test_the_last_version_of_a_model_is_unloaded_with_the_model(
    tmp_path: Path, registry: Registry, first: str
) -> None:
    async with scripted_triton(tmp_path, registry, first) as (server, made), made.replica(first) as replica:
        await made.loader().unload(replica, first)
        assert server.versions("champion") == []
        assert await made.loader().loaded(replica) == []


async def test_a_triton_that_is_not_in_explicit_mode_says_so(
    tmp_path: Path, registry: Registry, first: str, second: str
) -> None:
    async with scripted_triton(tmp_path, registry, first) as (server, made):
        server.polling = True
        made.put(second)
        async with made.replica(first) as replica:
            with pytest.raises(LoadError, match="UNAVAILABLE explicit model load / unload is not allowed"):
                await made.loader().load(replica, registry.usable(second))


async def test_a_version_with_other_scores_than_its_archive_is_not_taken(
    tmp_path: Path, registry: Registry, first: str, second: str
) -> None:
    async with scripted_triton(tmp_path, registry, first) as (server, made):
        made.put(second)
        server.factor = 0.999
        async with made.replica(first) as replica:
            with pytest.raises(LoadError, match="off its canned scores"):
                await made.loader().load(replica, registry.usable(second))


async def test_scores_and_models_go_over_tls_with_our_certificate(
    tmp_path: Path, registry: Registry, first: str, second: str
) -> None:
    authority = TrialAuthority()
    pair, ours = certify(authority), authority.certify("pretrade")
    credentials = grpc.ssl_server_credentials([(pair.key, pair.certificate)], authority.pem, True)
    files = {"ca": authority.pem, "certificate": ours.certificate, "key": ours.key}
    for name, content in files.items():
        write_private(tmp_path / name, content.decode())
    settings = ClientTlsSettings.model_validate({name: tmp_path / name for name in files})
    async with scripted_triton(tmp_path, registry, first, credentials=credentials) as (server, made):
        made.put(second)
        loader = made.loader()
        async with made.replica(first, ClientTls("primary", settings, lambda: 0.0)) as replica:
            await loader.load(replica, registry.usable(second))
            assert set(await loader.loaded(replica)) == {first, second}
            assert await scores_of(replica, registry, second) == (second, True)
        asked = len(server.asked)
        in_the_open = Replica(
            "primary",
            made.address,
            "champion",
            None,
            ReplicaLimits(),
            clock=asyncio.get_running_loop().time,
            random=lambda: 0.5,
            codec=replica.codec,
        )
        async with in_the_open:
            with pytest.raises(BatchFailedError) as failure:
                await in_the_open.ask([ROW], None)
            assert failure.value.outcome is Outcome.TRANSPORT
            assert await loader.loaded(in_the_open) == []
        assert len(server.asked) == asked


async def test_a_brought_model_in_onnx_is_loaded_beside_its_predecessor_and_scores_as_its_archive(
    tmp_path: Path,
) -> None:
    rows, labels = labelled_rows(1_000, 1)
    booster = lightgbm.train(
        {"objective": "binary", "verbose": -1, "num_threads": 1}, lightgbm.Dataset(rows, labels), 9
    )
    booster.save_model(tmp_path / "trees.txt")
    brought = read_model(tmp_path / "trees.txt", "lightgbm", MF1)
    registry = Registry(tmp_path / "registry")
    made = [add(brought, None, Adding(MF1, threshold=threshold)) for threshold in (0.4, 0.6)]
    old, new = (write_archive(one, one.metadata, registry.root, install=False) for one in made)
    async with scripted_triton(tmp_path, registry, old) as (server, dialect):
        loader = dialect.loader()
        async with dialect.replica(old) as replica:
            dialect.put(new)
            await loader.load(replica, registry.usable(new))
            assert server.versions("champion") == sorted(map(number, (old, new)))
            assert [await scores_of(replica, registry, one) for one in (old, new)] == [(old, True), (new, True)]
            assert json.loads(server.loads[-1].parameters["config"].string_param)["backend"] == "onnxruntime"
            answer = await replica.ask([row.tobytes() for row in rows[:50]], new)
    np.testing.assert_allclose(answer.scores, booster.predict(rows[:50], num_threads=1), rtol=0, atol=1e-6)
