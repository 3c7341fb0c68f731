"""Brought models and ensembles score in the server's process as their handler does, to the last bit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest
import xgboost
from numpy.typing import NDArray
from support.labelled_rows import labelled_rows

from feature_cache.features import MF1
from server.inference import embedded_margins
from server.inference.embedded import EmbeddedScorer
from server.inference.embedded_margins import CannotScoreError
from server.models.archive import Archive, RunningModel, read_archive
from server.models.embedding import EmbeddedModel, EmbeddedModels
from server.models.registry import record_of
from torchserve.brought.adding import Added, Adding, add
from torchserve.brought.combining import Part, combine
from torchserve.brought.reading import Kind, read_model
from torchserve.export import write_archive
from torchserve.handler import calibrated, margin_of

Rows = NDArray[np.float32]


def kept(added: Added, store: Path) -> Archive:
    version = write_archive(added, added.metadata, store, install=False)
    return read_archive(store / "versions" / f"{version}.mar")


def part(archive: Archive, weight: float) -> Part:
    return Part(archive.version, json.loads(archive.files["metadata.json"]), archive.files["weights.bin"], weight)


def scorer_of(archive: Archive, **changes: Any) -> EmbeddedScorer:
    metadata = json.dumps(json.loads(archive.files["metadata.json"]) | changes).encode()
    return EmbeddedScorer("champion", archive.version, metadata, archive.files["weights.bin"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def archives(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Archive]:
    """A model of LightGBM, one of XGBoost, and both together."""
    directory = tmp_path_factory.mktemp("files")
    rows, labels = labelled_rows(1_000, 1)
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
    lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 20).save_model(directory / "lightgbm")
    booster = xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(rows, labels), 10)
    booster.save_model(directory / "xgboost.ubj")
    files: dict[Kind, Path] = {"lightgbm": directory / "lightgbm", "xgboost": directory / "xgboost.ubj"}
    adding = Adding(MF1, threshold=0.5)
    made = {str(kind): kept(add(read_model(path, kind, MF1), None, adding), store) for kind, path in files.items()}
    parts = [part(made["lightgbm"], 2.0), part(made["xgboost"], 1.0)]
    made["mean"] = kept(combine("mean", parts, None, adding), store)
    return made


@pytest.mark.parametrize("name", ["lightgbm", "xgboost", "mean"])
def test_any_number_of_rows_is_scored_as_by_the_handler(name: str, archives: dict[str, Archive]) -> None:
    archive = archives[name]
    about = json.loads(archive.files["metadata.json"])
    margin = margin_of(about, archive.files["weights.bin"])
    scorer = scorer_of(archive)
    for count in (1, 2, 63, 256, 257, 600):
        rows = labelled_rows(count, count)[0]
        rows[:: max(1, count // 3)] = np.nan
        together = np.concatenate([margin(rows[first : first + 256]) for first in range(0, count, 256)])
        expected = calibrated(together, **about["calibration"])
        np.testing.assert_array_equal(scorer.scores(rows.tobytes()), expected)
    record = record_of(archive, 0.0)
    np.testing.assert_array_equal(scorer.scores(record.canned_rows.tobytes()), record.canned_scores)


def test_a_replay_scores_what_a_replica_and_this_process_scored(archives: dict[str, Archive]) -> None:
    archive = archives["lightgbm"]
    rows = labelled_rows(7, 3)[0]
    scores = scorer_of(archive).scores(rows.tobytes())
    replays = EmbeddedModels(lambda _: archive)
    with RunningModel(archive) as replica:
        for place, row in enumerate(rows):
            assert replays.score(archive.version, row.tobytes(), 7, place)[1] == scores[place]
            assert replica.score(row.tobytes(), 7, place)[1] == scores[place]


async def test_a_brought_champion_is_proven_and_decides_in_process(archives: dict[str, Archive], store: Path) -> None:
    version = archives["lightgbm"].version
    model = EmbeddedModel(store, "champion", lambda: version, lambda: 0.0)
    task = asyncio.create_task(model.run())
    try:
        async with asyncio.timeout(10):
            while model.scorer is None:  # noqa: ASYNC110 - the model has no event for a test
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.wait((task,))
    assert (model.version, model.problem, model.refused) == (version, "", 0)


def test_a_model_that_onnx_does_not_cover_is_refused(
    archives: dict[str, Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archives["lightgbm"]
    with pytest.raises(CannotScoreError, match="'lightgbm' is not scored in the server's process"):
        scorer_of(archive, runtime="torchscript")
    with pytest.raises(CannotScoreError, match="ONNX Runtime: "):
        EmbeddedScorer("champion", archive.version, archive.files["metadata.json"], b"no model")
    with pytest.raises(CannotScoreError, match="99 bytes are not rows of 100"):
        scorer_of(archive).score(b"\0" * 99)
    monkeypatch.setattr(embedded_margins, "has_onnx", lambda: False)
    with pytest.raises(CannotScoreError, match=r"ONNX Runtime is not installed \(pretrade-server\[embedded\]\)"):
        scorer_of(archive)


def test_undefined_features_get_the_same_values_as_in_the_handler(archives: dict[str, Archive]) -> None:
    archive = archives["lightgbm"]
    about = json.loads(archive.files["metadata.json"])
    scored = {**about["scored"], "fill": np.linspace(-1, 1, len(MF1)).tolist()}
    rows = labelled_rows(50, 4)[0]
    margin = margin_of({**about, "scored": scored}, archive.files["weights.bin"])
    expected = calibrated(margin(rows), **about["calibration"])
    np.testing.assert_array_equal(scorer_of(archive, scored=scored).scores(rows.tobytes()), expected)
    assert not np.array_equal(scorer_of(archive).scores(rows.tobytes()), expected)
