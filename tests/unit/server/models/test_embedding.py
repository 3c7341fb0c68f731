"""The model in this process: the champion's version, proven before it answers, swapped in between two decisions."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from feature_cache import features
from local.demo.variants import inverted, late, recalibrated
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import ModelFailedError, ModelUnknownError
from server.inference.embedded import EmbeddedScorer
from server.models import embedding
from server.models.archive import content_version, read_archive
from server.models.embedding import EmbeddedModel, EmbeddedModels
from server.models.registry import Registry

ROW = np.zeros(features.N_FEATURES, dtype="<f4").tobytes()


class World:
    """A registry, and which version is the champion's."""

    def __init__(self, root: Path, archive: Path) -> None:
        self.registry = Registry(root)
        self.trained = read_archive(archive).version
        self.champion = ""
        self.now = 1_000.0
        self.registry.path("").parent.mkdir(parents=True)
        shutil.copy(archive, self.registry.path(self.trained))
        self.model = EmbeddedModel(root, "champion", lambda: self.champion, lambda: self.now)

    def variant(self, change: Callable[[dict[str, Any]], object], weights: bytes | None = None) -> str:
        """A version whose metadata or weights are others."""
        path = self.registry.path(self.trained)
        with zipfile.ZipFile(path) as archived:
            files = {name: archived.read(name) for name in archived.namelist()}
        metadata = json.loads(files["metadata.json"])
        change(metadata)
        files["metadata.json"] = json.dumps(metadata).encode()
        files["weights.bin"] = files["weights.bin"] if weights is None else weights
        version = content_version(files[name] for name in ("handler.py", "metadata.json", "weights.bin"))
        manifest = json.loads(files["MAR-INF/MANIFEST.json"])
        manifest["model"]["modelVersion"] = version
        files["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()
        with zipfile.ZipFile(self.registry.path(version), "w") as archived:
            for name, content in files.items():
                archived.writestr(name, content)
        return version

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - the model has no event for a test
                await asyncio.sleep(0.01)

    async def scorer(self) -> EmbeddedScorer:
        """What scores once the champion is loaded."""
        await self.until(lambda: self.model.scorer is not None)
        assert self.model.scorer is not None
        return self.model.scorer

    async def refused(self, version: str) -> str:
        """Why a version is not loaded; nothing is scored with it."""
        before = self.model.refused
        self.champion = version
        await self.until(lambda: self.model.refused > before)
        assert self.model.scorer is None
        return self.model.problem


@pytest.fixture
def world(tmp_path: Path, model_store: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(embedding, "_LOOK_SECONDS", 0.01)
    return World(tmp_path / "store", model_store / "champion.mar")


@asynccontextmanager
async def following(model: EmbeddedModel) -> AsyncIterator[None]:
    task = asyncio.create_task(model.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def test_the_champions_version_is_loaded_and_a_new_one_takes_its_place(world: World) -> None:
    model = world.model
    assert (model.lack, model.version) == (pb.DEGRADATION_EMBEDDED_NO_MODEL, "")
    assert "no champion is known yet" in model.problem
    async with following(model):
        world.champion = world.trained
        first = await world.scorer()
        assert (model.version, model.problem, model.fault) == (world.trained, "", "")
        assert model.lack == pb.DEGRADATION_UNSPECIFIED
        score = first.scores(ROW)[0]

        world.champion = new = recalibrated(world.registry, world.trained, 2.0)
        assert model.scorer is None, "what is no longer the champion's decides nothing more"
        assert model.lack == pb.DEGRADATION_EMBEDDED_OTHER_VERSION
        second = await world.scorer()
        assert (second.version, model.loads, model.refused) == (new, 2, 0)
        assert second.scores(ROW)[0] != score
        assert first.scores(ROW)[0] == score, "a decision that has begun with the old one ends with it"


async def test_the_alias_counts_only_while_no_champion_is_known(world: World) -> None:
    world.registry.set_alias("champion", world.trained)
    async with following(world.model):
        await world.until(lambda: world.model.scorer is not None)
        world.champion = served = recalibrated(world.registry, world.trained)
        assert world.model.scorer is None
        await world.until(lambda: world.model.version == served)
        assert world.registry.aliases()["champion"] == world.trained


async def test_an_archive_that_comes_later_is_loaded_then(world: World) -> None:
    path = world.registry.path(world.trained)
    away = path.rename(path.with_suffix(".away"))
    async with following(world.model):
        with capture_logs() as logs:
            assert "no archive of model version" in await world.refused(world.trained)
            world.now += 11.0
            await world.until(lambda: world.model.refused == 2)
        assert sum(line["event"].startswith("embedded model refused") for line in logs) == 1, "once for one cause"
        away.rename(path)
        world.now += 11.0
        await world.until(lambda: world.model.scorer is not None)


async def test_what_is_broken_or_different_is_refused_before_it_answers(world: World) -> None:
    causes: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda metadata: metadata.update(feature_set_fingerprint=1), "it wants features"),
        (lambda metadata: metadata["calibration"].update(intercept=3.0), "off its reference scores"),
        (lambda metadata: metadata["calibration"].update(slope=float("nan")), "nan off its reference scores"),
        (lambda metadata: metadata["canned"].update(rows="", scores=[]), "no reference scores"),
        (lambda metadata: metadata.pop("calibration"), "incomplete"),
        (lambda metadata: metadata.update(runtime="torch"), "not scored in the server's process"),
        (lambda metadata: metadata.pop("canned"), "unreadable"),
    ]
    async with following(world.model):
        for change, cause in causes:
            assert cause in await world.refused(world.variant(change))
        assert "XGBoost" in await world.refused(world.variant(lambda metadata: None, b"no trees"))
        damaged = "22" * 8
        world.registry.path(damaged).write_bytes(b"no zip")
        assert "no archive of model version" in await world.refused(damaged)
        assert world.model.refused == len(causes) + 2
        assert world.model.fault == world.model.problem != ""
        world.champion = world.trained
        await world.until(lambda: world.model.scorer is not None)
        assert (world.model.loads, world.model.fault) == (1, "")


async def test_a_sound_archive_of_another_kind_of_champion_scores_as_it_says(world: World) -> None:
    async with following(world.model):
        for version in (inverted(world.registry, world.trained), late(world.registry, world.trained, 60.0)):
            world.champion = version
            await world.until(lambda: world.model.scorer is not None)
            assert world.model.version == version, "its handler is not run"


async def test_without_a_model_store_or_xgboost_there_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    none = EmbeddedModel(None, "champion", lambda: world.trained, lambda: world.now)
    async with following(none):
        await asyncio.sleep(0.05)
        assert (none.scorer, none.lack, none.fault) == (None, pb.DEGRADATION_UNSPECIFIED, "")
        assert none.problem.startswith("no model")
    monkeypatch.setattr(embedding, "problem_of_library", lambda: "XGBoost is not installed")
    async with following(world.model):
        world.champion = world.trained
        await asyncio.sleep(0.05)
        assert (world.model.scorer, world.model.fault) == (None, "")
        assert world.model.lack == pb.DEGRADATION_EMBEDDED_NO_MODEL
        assert "XGBoost is not installed" in world.model.problem


def test_a_replay_scores_with_the_version_that_it_names(world: World) -> None:
    models = EmbeddedModels(lambda version: read_archive(world.registry.path(version)))
    other = recalibrated(world.registry, world.trained, 2.0)
    scores = {version: models.score(version, ROW, 1, 0) for version in (world.trained, other)}
    assert {one.model.version for one in scores.values()} == {world.trained, other}
    assert scores[world.trained][1] != scores[other][1]
    assert models.score(world.trained, ROW, 3, 2) == scores[world.trained]
    with pytest.raises(ModelUnknownError):
        models.score("00" * 8, ROW, 1, 0)
    with pytest.raises(ModelFailedError, match="gave no score"):
        models.score(world.trained, b"", 1, 0)
