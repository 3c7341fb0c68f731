"""`pretrade models add`, `combine`, `show`, `export` and `remove`, as somebody types them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import xgboost
from support.brought_models import NAMES, Trained, train_all
from support.labelled_rows import labelled_rows
from typer.testing import CliRunner

from feature_cache.features import MF1
from pretrade.client.cli.main import app
from server.models.archive import RunningModel, read_archive
from server.models.registry import Registry
from torchserve.handler import calibrated, margin_of

CALIBRATED = ["--horizon", "0.1"]


def run(*arguments: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["models", *map(str, arguments)], env={"COLUMNS": "300"})
    assert found.exit_code == code, found.output
    return " ".join(found.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    rows, labels = labelled_rows(2_000, 1)
    parameters = {"objective": "binary", "verbose": -1, "num_threads": 1}
    lightgbm.train(parameters, lightgbm.Dataset(rows, labels), 20).save_model(directory / "trees.txt")
    xgboost.train({"objective": "binary:logistic", "nthread": 1}, xgboost.DMatrix(rows, labels), 10).save_model(
        directory / "trees.ubj"
    )
    rows, labels = labelled_rows(3_000, 5)
    columns = {name: pa.array(rows[:, place]) for name, place in MF1.index.items()}
    columns["eligible"] = pa.array(labels)
    columns["time"] = pa.array(np.arange(3_000) * 200_000_000, pa.timestamp("ns"))
    pa.parquet.write_table(pa.table(columns), directory / "rows.parquet")
    return directory


@pytest.fixture(scope="module")
def registry(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """With a model of LightGBM, and then one of XGBoost, added."""
    store = tmp_path_factory.mktemp("store")
    for name, kind in (("trees.txt", "lightgbm"), ("trees.ubj", "xgboost")):
        data = ["--calibrate", files / "rows.parquet", *CALIBRATED]
        said = run("add", files / name, "--kind", kind, *data, "--store", store)
        assert "on its last part: precision 0.9" in said
        assert "it may decide on markets until 1970-01-31 00:10 UTC: on today's market it has expired" in said
        assert "next: pretrade canary start" in said
    return Registry(store)


def versions(registry: Registry) -> dict[str, str]:
    return {record.kind: record.version for record in registry.records()}


def test_what_was_added_is_the_candidate_and_says_where_it_comes_from(registry: Registry) -> None:
    by_kind = versions(registry)
    assert registry.resolve("candidate") == by_kind["xgboost"]
    record = registry.usable(by_kind["lightgbm"])
    assert record.limits.has_band
    assert record.limits.domain is not None
    said = run("show", by_kind["lightgbm"], "--store", registry.root)
    # The rows are of 1970.
    assert "expiry may decide on markets until 1970-01-31 00:10 UTC: on today's market it has expired" in said
    assert "lightgbm, for the place of the champion, brought and not trained here" in said
    assert "standing brought, not trained here: not held against the baselines" in said
    standing = registry.standing(by_kind["lightgbm"])
    assert standing.card is not None
    assert "**This model was brought, not trained here.**" in standing.card.read_text()


@pytest.mark.long
@pytest.mark.parametrize("how", ["mean", "stack"])
def test_models_are_combined_and_an_explanation_shows_the_parts(how: str, registry: Registry, files: Path) -> None:
    by_kind = versions(registry)
    lightgbm_, xgboost_ = by_kind["lightgbm"], by_kind["xgboost"]
    parts = [f"{lightgbm_}=3", f"{xgboost_}=1"] if how == "mean" else [lightgbm_, xgboost_]
    data = ["--calibrate", files / "rows.parquet", *CALIBRATED]
    run("combine", f"--{how}", *parts, *data, "--store", registry.root)
    archive = read_archive(registry.path(registry.resolve("candidate")))
    about = json.loads(archive.files["metadata.json"])
    row = labelled_rows(1, 77)[0]
    scores, margins = [], []
    for version in (lightgbm_, xgboost_):
        files_of = read_archive(registry.path(version)).files
        part = json.loads(files_of["metadata.json"])
        margins.append(margin_of(part, files_of["weights.bin"])(row))
        scores.append(calibrated(margins[-1], **part["calibration"]))
    if how == "mean":
        share = (3 * scores[0] + scores[1]).astype(np.float64) / 4
        together = np.log(share / (1 - share))
    else:
        weights = [part["weight"] for part in about["ensemble"]["parts"]]
        together = weights[0] * margins[0] + weights[1] * margins[1] + about["ensemble"]["bias"]
    with RunningModel(archive) as model:
        identity, score, part_scores = model.score(row.astype("<f4").tobytes(), 1, 0)
        explained = model.explain(row.astype("<f4").tobytes())
    assert identity.version == archive.version
    assert score == pytest.approx(float(calibrated(together, **about["calibration"])[0]), abs=1e-6)
    assert part_scores == (float(scores[0][0]), float(scores[1][0]))
    assert explained.method == "sampled_shapley"
    assert [(one.version, one.score) for one in explained.parts] == [
        (lightgbm_, float(scores[0][0])),
        (xgboost_, float(scores[1][0])),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return train_all(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_every_kind_is_added_and_exported_as_it_is_served(
    name: str, trained: dict[str, Trained], files: Path, tmp_path: Path
) -> None:
    model, store = trained[name], ["--store", tmp_path / "store"]
    kind = [model.path, "--kind", model.kind, *(["--trusted"] if model.kind == "sklearn" else [])]
    fill = [] if model.takes_undefined else ["--fill-undefined"]
    said = run("add", *kind, *fill, "--calibrate", files / "rows.parquet", *CALIBRATED, *store)
    assert "next: pretrade canary start" in said
    version = Registry(tmp_path / "store").resolve("candidate")
    run("export", version, tmp_path / "out", *store)
    about = json.loads((tmp_path / "out" / f"{version}.json").read_text())
    assert about["kind"] == model.kind
    weights = {"xgboost": "model.ubj", "torchscript": "model.pt"}.get(model.kind, "model.onnx")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{version}.mar",
        f"{version}.json",
        weights,
        "card",
    }
    rows = labelled_rows(200, 9)[0]
    medians = np.nanmedian(labelled_rows(3_000, 5)[0], axis=0).astype(np.float32)
    scores = calibrated(margin_of(about, (tmp_path / "out" / weights).read_bytes())(rows), 1.0, 0.0)
    np.testing.assert_allclose(scores, model.expected(rows, medians), rtol=0, atol=1e-6)


def test_a_network_of_ours_is_exported_as_torchs_weights_and_as_onnx(model_store: Path, tmp_path: Path) -> None:
    version = json.loads((model_store / "challenger.json").read_text())["version"]
    run("export", version, tmp_path / "out", "--store", model_store)
    about = json.loads((tmp_path / "out" / f"{version}.json").read_text())
    assert {path.suffix for path in (tmp_path / "out").glob("[sm]*.*")} == {".pt", ".onnx"}
    rows = labelled_rows(200, 9)[0]
    in_torch = margin_of(about, (tmp_path / "out" / "state.pt").read_bytes())(rows)
    as_onnx = {"runtime": "onnx", "network": None, "scored": about["onnx"]["scored"]}
    in_onnx = margin_of(as_onnx, (tmp_path / "out" / "model.onnx").read_bytes())(rows)
    scores = [calibrated(margins, **about["calibration"]) for margins in (in_torch, in_onnx)]
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-6)


def test_an_ensemble_is_exported_with_its_parts(registry: Registry, tmp_path: Path) -> None:
    by_kind = versions(registry)
    parts = [by_kind["lightgbm"], by_kind["xgboost"]]
    run("combine", "--mean", *parts, "--threshold", "0.4", "--store", registry.root)
    version = registry.resolve("candidate")
    run("export", version, tmp_path / "out", "--store", registry.root)
    about = json.loads((tmp_path / "out" / f"{version}.json").read_text())
    rows = labelled_rows(200, 9)[0]
    exported = margin_of(about, (tmp_path / "out" / "parts.zip").read_bytes())(rows)
    files_of = read_archive(registry.path(version)).files
    np.testing.assert_array_equal(exported, margin_of(about, files_of["weights.bin"])(rows))
    assert [part["version"] for part in about["ensemble"]["parts"]] == parts


def test_a_version_is_exported_whole(registry: Registry, tmp_path: Path) -> None:
    version = versions(registry)["xgboost"]
    run("export", version, tmp_path / "out", "--store", registry.root)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{version}.mar",
        f"{version}.json",
        "model.ubj",
        "card",
    }
    booster = xgboost.Booster(model_file=tmp_path / "out" / "model.ubj")
    assert booster.num_features() == len(MF1)


def test_a_version_for_another_model_of_the_server_is_the_candidate_of_that_one(
    registry: Registry, files: Path
) -> None:
    before = registry.aliases().get("candidate")
    adding = ["add", files / "trees.txt", "--kind", "lightgbm", "--threshold", "0.3", "--store", registry.root]
    said = run(*adding, "--model", "scalper")
    scalper = Registry(registry.root, "scalper")
    version = scalper.resolve("candidate")
    assert registry.aliases().get("candidate") == before
    assert f"next: pretrade models alias champion {version} --model scalper" in said
    scalper.set_alias("champion", version)
    said = run(*adding, "--model", "scalper")
    assert f"next: pretrade canary start {scalper.resolve('candidate')} --model scalper" in said
    alone = ["--store", registry.root, "--dir", registry.root / "no-stack"]
    assert f"{version} is the scalper/champion" in run("remove", version, "--yes", *alone, code=1)


def test_only_a_version_that_nothing_needs_is_removed(registry: Registry, files: Path) -> None:
    run("add", files / "trees.txt", "--kind", "lightgbm", "--threshold", "0.25", "--store", registry.root)
    version = registry.resolve("candidate")
    alone = ["--store", registry.root, "--dir", registry.root / "no-stack"]
    assert "is the candidate: `pretrade models alias` points" in run("remove", version, "--yes", *alone, code=1)
    assert "candidate is an alias: name the version" in run("remove", "candidate", "--yes", *alone, code=1)
    registry.set_alias("candidate", versions(registry)["xgboost"])
    assert "can then no longer be replayed" in run("remove", version, *alone, code=1)
    assert registry.path(version).is_file()
    run("remove", version, "--yes", *alone)
    assert not registry.path(version).exists()
    assert not (registry.root / "cards" / version).exists()
    assert "no model" in run("remove", version, "--yes", *alone, code=1)


def test_what_is_refused_says_what_to_change(registry: Registry, files: Path, tmp_path: Path) -> None:
    before = {record.version for record in registry.records()}
    store, trees = ["--store", registry.root], files / "trees.txt"
    (tmp_path / "model.joblib").write_bytes(pickle.dumps("no model"))
    version = versions(registry)["lightgbm"]
    cases: list[tuple[list[object], int, str]] = [
        (["add", trees, "--kind", "catboost"], 2, "one of onnx, xgboost, lightgbm, sklearn, torchscript"),
        (["add", trees, "--kind", "lightgbm"], 1, "the threshold is yours to say: --threshold, or --calibrate"),
        (["add", trees, "--kind", "lightgbm", "--threshold", "2"], 1, "must be from 0 to 1, a probability"),
        (["add", trees, "--kind", "lightgbm", "--features", "mf9"], 2, "no set 'mf9'; known are mf1/"),
        (["add", tmp_path / "model.joblib", "--kind", "sklearn"], 2, "runs whatever code is in it: say --trusted"),
        (["add", tmp_path / "model.joblib", "--kind", "sklearn", "--trusted"], 1, "a str gives no probabilities"),
        (["add", trees, "--kind", "lightgbm", "--threshold", "0.5", "--name", "best"], 2, "neither champion nor"),
        (
            ["add", trees, "--kind", "lightgbm", "--threshold", "0.5", "--model", "a/../b"],
            2,
            "'a/../b' is no name for a",
        ),
        (["combine", "--mean", version, "--model", "candidate"], 2, "'candidate' is no name for a model"),
        (["combine", version], 2, "say one of the two"),
        (["combine", "--mean", version], 1, "one model is no ensemble: name two or more"),
        (["combine", "--mean", version, version], 1, "a version is named twice: give it the sum"),
        (["combine", "--mean", f"{version}=a", version], 1, "must be VERSION or VERSION=WEIGHT, for example"),
        (["combine", "--mean", f"{version}=inf", "candidate"], 1, "=inf: a weight must be above 0, and finite"),
        (["combine", "--mean", version, "candidate", "--threshold", "2"], 1, "must be from 0 to 1, a probability"),
        (["combine", "--stack", version, "candidate"], 1, "a stack is fitted: name the rows"),
        (["combine", "--mean", *[version] * 13], 1, "13 parts: an ensemble has 12 at most"),
        (["combine", "--mean", version, "ab" * 8], 1, "no model 'abababababababab'"),
    ]
    for arguments, code, message in cases:
        assert message in run(*arguments, *store, code=code)
    assert {record.version for record in registry.records()} == before
