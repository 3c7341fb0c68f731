"""The handler scores what it is sent, says who scored it, and refuses what it cannot score."""

from __future__ import annotations

import io
import itertools
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xgboost
from numpy.typing import NDArray

from feature_cache import features
from torchserve.dataset import Samples
from torchserve.handler import (
    HEADER,
    ModelHandler,
    calibrated,
    device_of,
    margin_of,
    packed_parts,
    torch_margin,
    xgboost_margin,
)
from torchserve.training import TrainedModel

Load = Callable[[Path], ModelHandler]
NAMES = ["champion", "challenger"]


def scores_in(answer: bytes) -> NDArray[np.float32]:
    return np.frombuffer(answer, dtype="<f4", offset=HEADER.size)


def ask(handler: ModelHandler, rows: NDArray[np.float32]) -> bytes:
    (answer,) = handler.handle([{"input": bytearray(rows.astype("<f4").tobytes())}], None)
    assert isinstance(answer, bytes)
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_names_its_model(name: str, store: Path, load: Load, samples: Samples) -> None:
    described = json.loads((store / f"{name}.json").read_text())
    answer = ask(load(store / f"{name}.mar"), samples.rows[:3])
    assert len(answer) == 32 + 3 * 4
    magic, rows, version, threshold, fingerprint, expires_at = HEADER.unpack_from(answer)
    assert (magic, rows, expires_at) == (b"PTS1", 3, 4_102_444_800)
    assert version.hex() == described["version"]
    assert threshold == described["threshold"]
    assert fingerprint == features.MF1.fingerprint


def test_the_champion_scores_as_xgboost_does(
    store: Path, load: Load, samples: Samples, models: dict[str, TrainedModel]
) -> None:
    model = models["champion"]
    booster = xgboost.Booster(model_file=bytearray(model.weights))
    margin = booster.predict(xgboost.DMatrix(samples.rows), output_margin=True).astype(np.float64)
    expected = 1 / (1 + np.exp(-(model.slope * margin + model.intercept)))
    assert np.isnan(samples.rows).any()
    scores = scores_in(ask(load(store / "champion.mar"), samples.rows))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    assert np.ptp(scores) > 0.1


def test_the_challenger_scores_as_its_network_does(
    store: Path, load: Load, samples: Samples, models: dict[str, TrainedModel]
) -> None:
    model = models["challenger"]
    network = model.network
    assert network is not None
    with zipfile.ZipFile(store / "challenger.mar") as archive, archive.open("weights.bin") as weights:
        state = {key: value.double().numpy() for key, value in torch.load(weights, weights_only=True).items()}
    hidden = np.where(np.isnan(samples.rows), network["median"], samples.rows)
    hidden = np.clip((hidden - network["mean"]) / network["scale"], -network["clip"], network["clip"])
    for layer in ("0", "2", "4"):
        hidden = hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        hidden = hidden if layer == "4" else np.maximum(hidden, 0)
    expected = 1 / (1 + np.exp(-(model.slope * hidden[:, 0] + model.intercept)))
    scores = scores_in(ask(load(store / "challenger.mar"), samples.rows))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_scores_the_same_alone_and_in_a_batch(name: str, store: Path, load: Load, samples: Samples) -> None:
    handler = load(store / f"{name}.mar")
    together = scores_in(ask(handler, samples.rows[:50]))
    alone = np.concatenate([scores_in(ask(handler, samples.rows[i : i + 1])) for i in range(50)])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_extreme_rows_score_within_bounds(name: str, value: float, store: Path, load: Load) -> None:
    rows = np.full((2, features.N_FEATURES), value, dtype=np.float32)
    scores = scores_in(ask(load(store / f"{name}.mar"), rows))
    assert scores.shape == (2,)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize("request_", [{"input": b""}, {"input": bytes(99)}, {"input": bytes(101)}, {}, {"input": "x"}])
def test_anything_but_whole_rows_is_refused_as_the_callers_fault(
    request_: dict[str, object], store: Path, load: Load
) -> None:
    from ts.utils.util import PredictionException  # noqa: PLC0415  `load` has imported TorchServe's package

    handler = load(store / "champion.mar")
    with pytest.raises(PredictionException, match="multiple of 100") as refusal:
        handler.handle([request_], None)
    assert refusal.value.error_code == 400


@pytest.mark.parametrize("changed", ["metadata.json", "weights.bin", "handler.py"])
def test_a_changed_archive_is_refused_at_load(changed: str, store: Path, load: Load, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered.mar"
    with zipfile.ZipFile(store / "champion.mar") as original, zipfile.ZipFile(tampered, "w") as copy:
        for name in original.namelist():
            copy.writestr(name, original.read(name) + (b" " if name == changed else b""))
    with pytest.raises(RuntimeError, match="the archive says version"):
        load(tampered)


def test_calibration_holds_for_log_odds_of_any_size() -> None:
    margin = np.array([-1e30, -700, -1, 0, 1, 700, 1e30], dtype=np.float32)
    scores = calibrated(margin, 2.0, 0.0)
    assert scores[[0, -1]].tolist() == [0.0, 1.0]
    assert scores[3] == 0.5
    assert scores[4] == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-7)


@pytest.mark.parametrize("feature_set", [b"mf1", b"", b"00000000", bytearray(b"0badc0de")])
def test_rows_of_another_feature_set_are_refused(feature_set: bytes, store: Path, load: Load) -> None:
    from ts.utils.util import PredictionException  # noqa: PLC0415  as above

    handler = load(store / "champion.mar")
    rows = bytes(4 * features.N_FEATURES)
    ours = f"{features.MF1.fingerprint:08x}"
    (answer,) = handler.handle([{"input": rows, "feature_set": bytearray(ours.encode())}], None)
    assert isinstance(answer, bytes)
    assert scores_in(answer).shape == (1,)
    with pytest.raises(PredictionException, match=f"`feature_set` is .*, this model's is {ours}") as refusal:
        handler.handle([{"input": rows, "feature_set": feature_set}], None)
    assert refusal.value.error_code == 400


@pytest.mark.parametrize("name", NAMES)
def test_what_the_features_contribute_sums_to_the_margin(name: str, store: Path, load: Load, samples: Samples) -> None:
    handler = load(store / f"{name}.mar")
    undefined = np.isnan(samples.rows).any(axis=1)
    rows = np.concatenate([samples.rows[undefined][:10], samples.rows[~undefined][:40]])
    rows = np.concatenate([rows, np.full((1, features.N_FEATURES), 1e30, dtype=np.float32)])
    explained = [handler.explain(row) for row in rows]
    margins = np.array([one["margin"] for one in explained])
    sums = np.array([one["base"] + sum(one["contributions"]) for one in explained])
    np.testing.assert_allclose(sums, margins, rtol=0, atol=2e-5)
    np.testing.assert_allclose(
        calibrated(margins.astype(np.float32), handler._slope, handler._intercept),
        handler.score(rows),
        rtol=0,
        atol=1e-6,
    )
    assert {len(one["contributions"]) for one in explained} == {features.N_FEATURES}
    assert len({one["base"] for one in explained}) == 1
    assert np.ptp(margins) > 0.1


def test_the_networks_contributions_are_its_gradients_integrated(
    store: Path, load: Load, samples: Samples, models: dict[str, TrainedModel]
) -> None:
    network = models["challenger"].network
    assert network is not None
    row = samples.rows[len(samples.rows) // 2]
    explained = load(store / "challenger.mar").explain(row)
    state = torch.load(io.BytesIO(models["challenger"].weights), weights_only=True)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(network["layers"]):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    model.load_state_dict(state)
    model.double()
    filled = np.where(np.isnan(row), network["median"], row)
    end = np.clip((filled - np.array(network["mean"])) / np.array(network["scale"]), -network["clip"], network["clip"])
    steps = 20_000
    line = (torch.arange(steps, dtype=torch.float64)[:, None] + 0.5) / steps * torch.from_numpy(end)
    line.requires_grad_(True)
    (gradients,) = torch.autograd.grad(model(line).sum(), line)
    expected = end * gradients.mean(dim=0).numpy()
    np.testing.assert_allclose(explained["contributions"], expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.01


def test_a_feature_that_no_tree_looks_at_contributes_nothing(store: Path, load: Load, samples: Samples) -> None:
    handler = load(store / "champion.mar")
    booster = xgboost.Booster(model_file=bytearray(zipfile.ZipFile(store / "champion.mar").read("weights.bin")))
    used = {int(name.removeprefix("f")) for name in booster.get_score()}
    unused = sorted(set(range(features.N_FEATURES)) - used)
    contributions = np.array(handler.explain(samples.rows[-1])["contributions"])
    assert not contributions[unused].any()
    assert contributions[sorted(used)].any()


def test_the_champions_margins_are_xgboosts_to_the_last_bit(samples: Samples, models: dict[str, TrainedModel]) -> None:
    weights = models["champion"].weights
    booster = xgboost.Booster(model_file=bytearray(weights))
    margin = xgboost_margin(weights)
    before = margin(samples.rows[:5])
    kept = before.copy()
    for count in (1, 7, 64, 256, len(samples.rows)):
        rows = samples.rows[:count]
        expected = booster.inplace_predict(rows, predict_type="margin")
        np.testing.assert_array_equal(margin(rows), expected)
        np.testing.assert_array_equal(margin(np.asfortranarray(rows)), expected)
    np.testing.assert_array_equal(before, kept)  # not the booster's own memory, which later calls fill
    with pytest.raises(RuntimeError, match="olumns"):
        margin(samples.rows[:3, :-1])


def test_torch_computes_on_the_gpu_that_torchserve_gives_a_worker_where_torch_sees_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert device_of({"gpu_id": None}) == device_of({}) == "cpu"
    assert not caplog.messages
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of({"gpu_id": 1}) == "cpu"
    assert caplog.messages == ["TorchServe gave this worker GPU 1, Torch sees none: on the CPU"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of({"gpu_id": 1}) == "cuda:1"


BROUGHT = {
    "runtime": "torchscript",
    "network": None,
    "scored": {"column": 0, "is_probability": False, "fill": [0.0] * len(features.MF1)},
}


def scripted() -> bytes:
    """A network of somebody else's, as TorchScript."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is no longer worked on
        trace: Any = torch.jit.trace  # without types
        buffer = io.BytesIO()
        torch.jit.save(trace(torch.nn.Linear(len(features.MF1), 1), torch.zeros(2, len(features.MF1))), buffer)
    return buffer.getvalue()


def test_a_network_is_moved_to_its_device(samples: Samples, models: dict[str, TrainedModel]) -> None:
    """On a device that computes nothing: there is no GPU here, and the weights must have gone where the rows go."""
    model = models["challenger"]
    assert model.network is not None
    with pytest.raises(NotImplementedError, match="meta"):
        torch_margin(model.weights, model.network, "meta")(samples.rows[:3])
    with pytest.raises(NotImplementedError, match="meta"):
        margin_of(BROUGHT, scripted(), "meta")(samples.rows[:3])
    about = {"calibration": {"slope": 1.0, "intercept": 0.0}, "weight": 1.0}
    networks = ((BROUGHT, scripted()), ({"runtime": "torch", "network": model.network}, model.weights))
    for network, weights in networks:  # each by itself, since the first part fails
        ensemble = {"runtime": "ensemble", "ensemble": {"how": "stack", "bias": 0.0, "parts": [network | about]}}
        alone = margin_of(network, weights)(samples.rows[:3])
        np.testing.assert_array_equal(margin_of(ensemble, packed_parts([weights]))(samples.rows[:3]), alone)
        with pytest.raises(NotImplementedError, match="meta"):
            margin_of(ensemble, packed_parts([weights]), "meta")(samples.rows[:3])
    with pytest.raises(RuntimeError, match="knows no runtime 'other'"):
        margin_of({"runtime": "other", "network": None}, b"")
