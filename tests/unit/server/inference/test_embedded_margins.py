"""Brought models and ensembles score in the server's process as their handler does, to the last bit."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.brought_models import NAMES, Trained, train_all
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
from torchserve.brought.data import Data
from torchserve.brought.reading import read_model
from torchserve.dataset import Samples
from torchserve.export import write_archive
from torchserve.handler import calibrated, margin_of
from torchserve.label import Label

Rows = NDArray[np.float32]
ADDING = Adding(MF1, threshold=0.5)
SINGLE = [name for name in NAMES if name != "net.pt"]
"""All kinds but TorchScript."""
TOGETHER = ["mean", "stack", "nested"]
MEDIANS = np.nanmedian(labelled_rows(500, 5)[0], axis=0).astype(np.float32)


def some_data() -> Data:
    """Rows with labels, which no model was trained on."""
    rows, labels = labelled_rows(3_000, 5)
    samples = Samples(
        rows=rows,
        eligible=labels,
        markout_bps=np.zeros(3_000),
        time_ns=np.arange(3_000, dtype=np.int64) * 200_000_000,
        sell=np.zeros(3_000, np.bool_),
        instrument=np.zeros(3_000, np.int16),
        instruments=("BTCUSDT.SIM",),
        source="test",
        label=Label(horizon_seconds=0.1),
    )
    return Data(samples, has_time=True, step_seconds=0.2)


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
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return train_all(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def archives(store: Path, trained: dict[str, Trained]) -> dict[str, Archive]:
    """A model of each kind but TorchScript, by its file's name, and some of them together."""
    made = {}
    for name in SINGLE:
        brought = read_model(trained[name].path, trained[name].kind, MF1)
        if not trained[name].takes_undefined:
            brought = brought.filling(MEDIANS)
        made[name] = kept(add(brought, None, ADDING), store)
    parts = [part(made["trees.txt"], 2.0), part(made["trees.ubj"], 1.0)]
    made["mean"] = kept(combine("mean", parts, None, ADDING), store)
    several = [part(made[name], 1.0) for name in ("sklearn.onnx", "trees.txt", "trees.ubj", "torch.onnx")]
    made["stack"] = kept(combine("stack", several, some_data(), ADDING), store)
    nested = [part(made["mean"], 3.0), part(made["imputed.joblib"], 1.0)]
    made["nested"] = kept(combine("mean", nested, None, ADDING), store)
    return made


@pytest.mark.parametrize("name", [*SINGLE, *TOGETHER])
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


@pytest.mark.parametrize("name", SINGLE)
def test_scores_are_those_of_the_library_that_trained_the_model(
    name: str, archives: dict[str, Archive], trained: dict[str, Trained]
) -> None:
    rows = labelled_rows(1_000, 12)[0]
    scores = scorer_of(archives[name]).scores(rows.tobytes())
    np.testing.assert_allclose(scores, trained[name].expected(rows, MEDIANS), rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", TOGETHER)
def test_the_parts_of_an_ensemble_say_here_and_on_a_replica_what_they_say_alone(
    name: str, archives: dict[str, Archive], store: Path
) -> None:
    archive, rows = archives[name], labelled_rows(300, 6)[0]
    described = json.loads(archive.files["metadata.json"])["ensemble"]["parts"]
    scorer = scorer_of(archive)
    scores, of_parts = scorer.scores_and_parts(rows.tobytes())
    assert of_parts is not None
    assert [(one.version, one.weight) for one in scorer.parts] == [(one["version"], one["weight"]) for one in described]
    for place, one in enumerate(scorer.parts):
        alone = scorer_of(read_archive(store / "versions" / f"{one.version}.mar"))
        by_itself = [alone.scores(rows[first : first + 256].tobytes()) for first in (0, 256)]
        np.testing.assert_array_equal(of_parts[:, place], np.concatenate(by_itself))
    with RunningModel(archive) as replica:
        for place in (0, 7):
            answered = replica.score(rows[place].tobytes(), 256, place)
            assert (answered.model.version, answered.model.parts) == (archive.version, scorer.parts)
            assert (answered.score, answered.part_scores) == (scores[place], tuple(of_parts[place].tolist()))


def test_a_replay_scores_what_a_replica_and_this_process_scored(archives: dict[str, Archive]) -> None:
    archive = archives["trees.txt"]
    rows = labelled_rows(7, 3)[0]
    scores = scorer_of(archive).scores(rows.tobytes())
    replays = EmbeddedModels(lambda _: archive)
    with RunningModel(archive) as replica:
        for place, row in enumerate(rows):
            assert replays.score(archive.version, row.tobytes(), 7, place)[1] == scores[place]
            assert replica.score(row.tobytes(), 7, place)[1] == scores[place]


async def test_a_brought_champion_is_proven_and_decides_in_process(archives: dict[str, Archive], store: Path) -> None:
    version = archives["trees.txt"].version
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
    archive = archives["trees.txt"]
    with pytest.raises(CannotScoreError, match="'lightgbm' is not scored in the server's process"):
        scorer_of(archive, runtime="torchscript")
    with pytest.raises(CannotScoreError, match="ONNX Runtime: "):
        EmbeddedScorer("champion", archive.version, archive.files["metadata.json"], b"no model")
    with pytest.raises(CannotScoreError, match="99 bytes are not rows of 100"):
        scorer_of(archive).scores(b"\0" * 99)
    monkeypatch.setattr(embedded_margins, "has_onnx", lambda: False)
    with pytest.raises(CannotScoreError, match=r"ONNX Runtime is not installed \(pretrade-server\[embedded\]\)"):
        scorer_of(archive)


def test_undefined_features_get_the_same_values_as_in_the_handler(archives: dict[str, Archive]) -> None:
    archive = archives["trees.txt"]
    about = json.loads(archive.files["metadata.json"])
    scored = {**about["scored"], "fill": np.linspace(-1, 1, len(MF1)).tolist()}
    rows = labelled_rows(50, 4)[0]
    margin = margin_of({**about, "scored": scored}, archive.files["weights.bin"])
    expected = calibrated(margin(rows), **about["calibration"])
    np.testing.assert_array_equal(scorer_of(archive, scored=scored).scores(rows.tobytes()), expected)
    assert not np.array_equal(scorer_of(archive).scores(rows.tobytes()), expected)
