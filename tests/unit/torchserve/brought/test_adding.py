"""A brought model is calibrated and described like one of ours, or with what it lacks; its archive scores as it did."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from numpy.typing import NDArray
from support.brought_models import NAMES, Trained
from support.labelled_rows import labelled_rows

from fallback.model_limits import limits_of
from feature_cache.domain import Domain
from feature_cache.feature_set import Feature, FeatureSet
from feature_cache.features import MF1
from torchserve.brought.adding import Added, Adding, add
from torchserve.brought.data import Data, read_data
from torchserve.brought.errors import BroughtError
from torchserve.brought.reading import read_model
from torchserve.dataset import Samples
from torchserve.export import write_archive
from torchserve.handler import ModelHandler, calibrated, log_odds
from torchserve.label import Label

Rows = NDArray[np.float32]
Load = Callable[[Path], ModelHandler]
LABEL = Label(horizon_seconds=0.1)


def table(count: int = 3_000, seed: int = 5, *, with_time: bool = True) -> dict[str, pa.Array]:
    rows, labels = labelled_rows(count, seed)
    columns = {name: pa.array(rows[:, place]) for name, place in MF1.index.items()}
    columns["label"] = pa.array(labels.astype(int))
    if with_time:
        columns["time"] = pa.array(np.arange(count) * 200_000_000)
        columns["instrument"] = pa.array(["BTCUSDT.SIM"] * count)
    return columns


def written(tmp_path: Path, columns: dict[str, pa.Array], suffix: str = ".parquet") -> Path:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        pa.csv.write_csv(pa.table(columns), path)
    else:
        pa.parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return read_data(written(tmp_path, table()), MF1, label=LABEL)


def archived(added: Added, directory: Path) -> Path:
    version = write_archive(added, added.metadata, directory, install=False)
    return directory / "versions" / f"{version}.mar"


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_of_a_brought_model_scores_as_its_library_calibrated(
    name: str, trained: dict[str, Trained], data: Data, tmp_path: Path, load: Load
) -> None:
    model = trained[name]
    brought = read_model(model.path, model.kind, MF1)
    added = add(brought, data, Adding(MF1, fill_undefined=not model.takes_undefined))
    handler = load(archived(added, tmp_path))
    rows = labelled_rows(500, 8)[0]
    slope, intercept = (added.metadata["calibration"][one] for one in ("slope", "intercept"))
    own = model.expected(rows, np.nanmedian(data.samples.rows, axis=0).astype(np.float32))
    np.testing.assert_allclose(handler.score(rows), calibrated(log_odds(own), slope, intercept), rtol=0, atol=1e-6)
    assert added.metadata["kind"] == model.kind
    assert added.difference <= 1e-6
    assert added.lacks == ()
    assert added.metrics["test"].auc > 0.85
    assert added.metadata["target_precision_reached"]
    assert set(added.metadata["reference"]) == {*MF1.names, "score"}
    canned = added.metadata["canned"]
    asked = np.frombuffer(base64.b64decode(canned["rows"]), "<f4").reshape(-1, len(MF1))
    np.testing.assert_array_equal(handler.score(asked), np.array(canned["scores"], np.float32))
    domain = Domain(added.metadata["domain"])
    assert not domain.outside(data.samples.rows).all()
    assert domain.outside(np.full((1, len(MF1)), 1e30, np.float32)).all()
    json.dumps(added.metadata, allow_nan=False)


@pytest.mark.parametrize("step_ns", [100_000_000, 200_000_000, 5_000_000_000])
def test_limits_of_a_model_of_another_set_are_of_what_it_takes(tmp_path: Path, step_ns: int) -> None:
    many = FeatureSet("many", tuple(Feature(f"f{i}", "", "One of many.", -9.0, 9.0) for i in range(70)))
    rows, labels = labelled_rows(3_000, 5, many)
    rows[:, 1] = np.arange(3_000) // 4 % 9  # each value stays for four rows
    columns = {name: pa.array(rows[:, place]) for name, place in many.index.items()} | {"label": pa.array(labels)}
    columns |= {"time": pa.array(np.arange(3_000) * step_ns), "instrument": pa.array(["BTCUSDT.SIM"] * 3_000)}
    booster = lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(rows, labels), 5)
    booster.save_model(tmp_path / "many.txt")
    brought = read_model(tmp_path / "many.txt", "lightgbm", many)
    read = read_data(written(tmp_path, columns), many, label=LABEL)
    added = add(brought, read, Adding(many))
    assert added.lacks == ()
    described = json.loads(json.dumps(added.metadata["domain"], allow_nan=False))
    limits = limits_of({"domain": described}, many)
    assert limits.domain is not None
    assert limits.domain.names == many.names
    beyond = rows[:1].copy()
    beyond[0, 69] = 1e9
    assert not limits.domain.outside(rows).all()
    assert limits.domain.outside(beyond).all()
    looks = {100_000_000: 10, 200_000_000: 10, 5_000_000_000: 200}[step_ns]
    assert limits.domain.most_same[1] == looks, "a row every 5 s stands for 25 looks of a server"


def test_calibration_turns_scores_into_shares_of_what_happens(made: dict[str, Path], data: Data) -> None:
    """A model that trained on another label's share is as sure as the data say, and not as it says."""
    often = data.samples.eligible | (np.arange(len(data.samples.rows)) % 2 == 0)
    moved = replace(data, samples=replace(data.samples, eligible=often))
    brought = read_model(made["trees.txt"], "lightgbm", MF1)
    added = add(brought, moved, Adding(MF1))
    calibration = added.metadata["calibration"]
    scores = calibrated(brought.margin()(moved.samples.rows), calibration["slope"], calibration["intercept"])
    assert scores.mean() == pytest.approx(often.mean(), abs=0.03)
    assert added.metrics["test"].brier < added.metrics["test"].brier_base_rate


def test_without_a_dataset_a_model_keeps_its_probabilities_and_says_what_is_missing(
    made: dict[str, Path], tmp_path: Path, load: Load
) -> None:
    brought = read_model(made["trees.txt"], "lightgbm", MF1)
    with pytest.raises(BroughtError, match="--threshold, or --calibrate DATASET"):
        add(brought, None, Adding(MF1))
    added = add(brought, None, Adding(MF1, threshold=0.7))
    assert added.metadata["calibration"] == {"slope": 1.0, "intercept": 0.0}
    assert added.metadata["threshold"] == np.float32(0.7)
    assert not {"reference", "band", "domain"} & set(added.metadata)
    assert any("drift, OUT_OF_DOMAIN, UNCERTAIN and explanations" in one for one in added.lacks)
    explained = load(archived(added, tmp_path)).explain(labelled_rows(1, 1)[0][0])
    assert explained["unavailable"].startswith("the model was added without a dataset")


def test_a_dataset_without_times_calibrates_and_says_what_it_cannot(made: dict[str, Path], tmp_path: Path) -> None:
    rows = read_data(written(tmp_path, table(with_time=False), ".csv"), MF1, label=LABEL)
    added = add(read_model(made["trees.txt"], "lightgbm", MF1), rows, Adding(MF1))
    assert added.metadata["target_precision_reached"]
    assert added.metadata["expires_at"] == 0
    assert "reference" not in added.metadata
    assert any("no column `time`" in one for one in added.lacks)
    assert any("counts as independent" in one for one in added.notes)


def test_a_network_gets_the_medians_where_a_row_is_undefined(
    made: dict[str, Path], data: Data, tmp_path: Path, load: Load
) -> None:
    brought = read_model(made["net.pt"], "torchscript", MF1, output_is="margin")
    with pytest.raises(BroughtError, match="add it with --fill-undefined and a dataset"):
        add(brought, data, Adding(MF1, threshold=0.5))
    # An untrained network may know nothing: let it be right.
    knowing = brought.margin()(np.nan_to_num(data.samples.rows)) > 0
    told = replace(data, samples=replace(data.samples, eligible=knowing))
    added = add(brought, told, Adding(MF1, fill_undefined=True))
    handler = load(archived(added, tmp_path))
    medians = np.nanmedian(data.samples.rows, axis=0).astype(np.float32)
    row = labelled_rows(20, 4)[0]
    assert np.isnan(row).any()
    np.testing.assert_array_equal(handler.score(row), handler.score(np.where(np.isnan(row), medians, row)))


def test_an_explanation_by_sampling_sums_to_the_margin_and_repeats(
    made: dict[str, Path], data: Data, tmp_path: Path, load: Load
) -> None:
    handler = load(archived(add(read_model(made["trees.txt"], "lightgbm", MF1), data, Adding(MF1)), tmp_path))
    for row in labelled_rows(5, 3)[0]:
        explained = handler.explain(row)
        assert explained["method"] == "sampled_shapley"
        assert explained["base"] + sum(explained["contributions"]) == pytest.approx(explained["margin"], abs=1e-4)
        assert handler.explain(row) == explained
    row = np.zeros(len(MF1), np.float32)
    row[2] = 1.0  # what the label goes by most
    contributions = np.array(handler.explain(row)["contributions"])
    assert int(np.argmax(np.abs(contributions))) == 2
    assert contributions[2] > 1


def test_scores_that_say_nothing_of_the_label_are_refused(made: dict[str, Path], data: Data) -> None:
    turned = replace(data, samples=replace(data.samples, eligible=~data.samples.eligible))
    with pytest.raises(BroughtError, match="its scores say nothing of the label in the dataset: 1 must mean"):
        add(read_model(made["trees.txt"], "lightgbm", MF1), turned, Adding(MF1))
    same: Samples = replace(data.samples, eligible=np.ones(len(data.samples.rows), np.bool_))
    with pytest.raises(BroughtError, match=r"the calibration part of the dataset .* does not hold both labels"):
        add(read_model(made["trees.txt"], "lightgbm", MF1), replace(data, samples=same), Adding(MF1))


def test_a_dataset_is_checked_column_by_column(tmp_path: Path) -> None:
    good = table(600)
    half = np.full(600, 0.5)
    milliseconds = pa.array(np.arange(600) * 200 + 1_763_942_400_000)
    causes: list[tuple[dict[str, pa.Array | None], str]] = [
        ({"ofi_1s": None, "ofi_5s": None}, "has no column ofi_1s, ofi_5s, of mf1/.*: add them"),
        ({"label": None}, "has no column eligible or label: name the 0/1 label with --label-column"),
        ({"label": pa.array(half)}, "column label must hold 0 and 1 alone"),
        (
            {"imbalance_l1": pa.array(half * 100)},
            "column imbalance_l1 goes from 50 to 50, mf1 has it from -1 to 1: is it",
        ),
        ({"ofi_1s": pa.array(half * np.inf)}, "column ofi_1s holds an infinity: write what is undefined as NaN"),
        ({"ofi_1s": pa.array(["much"] * 600)}, "column ofi_1s holds something else than numbers"),
        ({"time": pa.array(half)}, "column time must be timestamps or nanoseconds"),
        ({"time": milliseconds}, r"time must be nanoseconds since 1970, and looks like milliseconds \(1763942400000\)"),
        ({"time": pa.array(np.arange(600) + 1_763_942_400)}, "looks like seconds .*: multiply it by 1,000,000,000"),
        ({"time": pa.array([10**18] * 600, pa.timestamp("us"))}, "column time must be of the years 1678 to 2261"),
        ({"sell": pa.array(half)}, "column sell must hold true or false, and no hole"),
        ({"side": pa.array(["short"] * 600)}, "column side must hold buy or sell, not 'short'"),
    ]
    for change, message in causes:
        columns = {name: column for name, column in {**good, **change}.items() if column is not None}
        with pytest.raises(BroughtError, match=message):
            read_data(written(tmp_path, columns), MF1)
    with pytest.raises(BroughtError, match="has 100 rows: calibration, threshold and test need at least 500"):
        read_data(written(tmp_path, table(100)), MF1)


def test_what_is_undefined_in_every_row_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    columns = table() | {"n_50": pa.array(np.full(3_000, np.nan)), "rv_1s_bps": pa.array(np.full(3_000, np.nan))}
    read = read_data(written(tmp_path, columns), MF1, label=LABEL)
    added = add(read_model(made["trees.txt"], "lightgbm", MF1), read, Adding(MF1))
    (told,) = (note for note in added.notes if "undefined in every row" in note)
    assert told.endswith(": n_50, rv_1s_bps")


def test_what_is_null_is_undefined(tmp_path: Path) -> None:
    columns = table(600)
    columns["ofi_1s"] = pa.array([None] * 600, pa.float64())
    assert np.isnan(read_data(written(tmp_path, columns), MF1).samples.rows[:, MF1.index["ofi_1s"]]).all()


def test_the_side_is_read_as_datasets_and_as_orders_say_it(tmp_path: Path) -> None:
    sells = np.arange(600) % 3 == 0
    orders = table(600) | {"side": pa.array(np.where(sells, "sell", "buy"))}
    np.testing.assert_array_equal(read_data(written(tmp_path, orders), MF1).samples.sell, sells)
    both = orders | {"sell": pa.array(~sells)}
    np.testing.assert_array_equal(read_data(written(tmp_path, both), MF1).samples.sell, ~sells)


def test_sells_alone_are_watched_like_buys_alone(made: dict[str, Path], tmp_path: Path) -> None:
    brought = read_model(made["trees.txt"], "lightgbm", MF1)
    columns = table()
    still = np.arange(3_000) // 7 * 1e-6  # one feature stays for seven rows while the others change
    columns["ret_30s_bps"] = pa.array(still.astype(np.float32))
    found = {}
    for side in ("buy", "sell"):
        data = read_data(written(tmp_path, columns | {"side": pa.array([side] * 3_000)}), MF1, label=LABEL)
        assert data.step_seconds == 0.2
        found[side] = add(brought, data, Adding(MF1)).metadata
    same = {side: one["domain"]["most_same"][MF1.index["ret_30s_bps"]] for side, one in found.items()}
    assert same["sell"] == same["buy"] > 10, "ten looks are the bound where nothing was seen"
    parts = {side: one["reference"]["score"]["instruments"]["BTCUSDT.SIM"] for side, one in found.items()}
    assert parts["sell"]["independent"] > 0
    assert found["sell"]["reference"]["spread_bps"] == found["buy"]["reference"]["spread_bps"]
