"""Models of every kind, trained elsewhere, are versions side by side in one real TorchServe, with their own scores."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.brought_models import Trained, train_all
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from server.inference.breaker import BreakerSettings
from server.inference.embedded import EmbeddedScorer
from server.inference.embedded_margins import CannotScoreError
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.models.archive import read_archive
from server.models.loading import ModelLoader
from server.models.registry import Registry
from torchserve.brought.adding import Added, Adding, add
from torchserve.brought.combining import Part, combine
from torchserve.brought.reading import read_model
from torchserve.export import write_archive

pytestmark = pytest.mark.stack

ROWS = labelled_rows(300, 2)[0]
MEDIANS = np.nanmedian(ROWS, axis=0).astype(np.float32)
ADDING = Adding(MF1, threshold=0.5)
SERVED = ("trees.txt", "trees.ubj", "pipeline.joblib", "sklearn.onnx", "net.pt", "torch.onnx")
TOGETHER = {"mean": ("trees.txt", "net.pt"), "nested": ("mean", "trees.ubj", "sklearn.onnx")}
"""Ensembles, and what they are made of."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return train_all(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def versions(registry: Registry, trained: dict[str, Trained]) -> dict[str, str]:
    """By the name of the file, or of the ensemble; the first one is what TorchServe starts with."""
    made: dict[str, Added] = {}
    written: dict[str, str] = {}
    for name in SERVED:
        brought = read_model(trained[name].path, trained[name].kind, MF1)
        made[name] = add(brought if trained[name].takes_undefined else brought.filling(MEDIANS), None, ADDING)
    for name in (*SERVED, *TOGETHER):
        if name in TOGETHER:
            parts = [Part(written[one], made[one].metadata, made[one].weights, 1.0) for one in TOGETHER[name]]
            made[name] = combine("mean", parts, None, ADDING)
        written[name] = write_archive(made[name], made[name].metadata, registry.root, install=name == SERVED[0])
    return written


@pytest.fixture(scope="module")
def served_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def stack(registry: Registry, versions: dict[str, str], served_in: Path) -> Iterator[Stack]:
    # TorchServe deals out the GPUs that `nvidia-smi` names. Torch sees none: the workers are to score on the CPU.
    said = served_in / "nvidia-smi"
    said.write_text("#!/bin/sh\nprintf 'index\\n0\\n'\n")
    said.chmod(0o755)
    settings = LocalSettings(dir=served_in, model_store=registry.root, gpus=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(served_in), prepend=os.pathsep)
        with Stack(settings, parts={"primary"}) as stack:
            yield stack


@pytest.mark.long
async def test_versions_of_every_kind_are_served_side_by_side_with_their_librarys_scores(
    stack: Stack, registry: Registry, versions: dict[str, str], trained: dict[str, Trained], served_in: Path
) -> None:
    loop = asyncio.get_running_loop()
    limits = ReplicaLimits(
        ReplicaSettings(probe_timeout_seconds=10.0, warm_up_seconds=0.0), breaker=BreakerSettings(slow_seconds=10.0)
    )
    endpoint = str(stack.endpoints.primary)
    async with Replica("primary", endpoint, "champion", None, limits, clock=loop.time, random=lambda: 0.5) as replica:
        await asyncio.wait_for(replica.proven.wait(), 60)
        loader = ModelLoader(stack.endpoints.management, "{version}.mar", timeout_seconds=120.0)
        for version in versions.values():
            await loader.load(replica, registry.usable(version))
        assert set(await loader.loaded(replica)) == set(versions.values())
        rows = [row.astype("<f4").tobytes() for row in ROWS]
        answers = await asyncio.gather(*(replica.ask(rows, version) for version in versions.values()))
    by_name = dict(zip(versions, answers, strict=True))
    expected = {name: trained[name].expected(ROWS, MEDIANS) for name in SERVED}
    for name, answer in by_name.items():
        assert (answer.model.version, answer.model.threshold) == (versions[name], 0.5)
        if name in TOGETHER:
            assert answer.of_parts is not None
            assert [part.version for part in answer.model.parts] == [versions[one] for one in TOGETHER[name]]
            for place, one in enumerate(TOGETHER[name]):
                np.testing.assert_allclose(answer.of_parts[:, place], by_name[one].scores, rtol=0, atol=1e-6)
            expected[name] = np.mean([expected[one] for one in TOGETHER[name]], axis=0)
        np.testing.assert_allclose(answer.scores, expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert np.isnan(ROWS).any()
    for name, version in versions.items():
        files = read_archive(registry.path(version)).files
        try:
            scorer = EmbeddedScorer("champion", version, files["metadata.json"], files["weights.bin"])
        except CannotScoreError:
            assert "torchscript" in files["metadata.json"].decode(), "all other kinds score in the server's process"
            continue
        np.testing.assert_allclose(scorer.scores(ROWS.tobytes()), by_name[name].scores, rtol=0, atol=1e-6)
    log = (served_in / "logs" / "primary.log").read_text()
    of_torch = log.count("TorchServe gave this worker GPU 0, Torch sees none: on the CPU")
    assert of_torch == 3, "the network in TorchScript, and the ensembles with it"
    assert json.loads(registry.path(versions["net.pt"]).with_suffix(".json").read_text())["runtime"] == "torchscript"
