"""Runtimes that score a champion's rows in process, for comparison: XGBoost as in the handler, and faster ones.

The runtimes other than XGBoost and Torch come with the extra `runtimes`; those that are not installed are left out.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchserve.handler import MarginFunction, xgboost_margin

Rows = NDArray[np.float32]


def champion_margins(weights: bytes, n_features: int) -> Mapping[str, MarginFunction]:
    """Runtime → margins, float32[n, n_features] → float[n]; all on one thread."""
    import xgboost  # noqa: PLC0415  slow to import

    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))
    booster.set_param({"nthread": 1})
    builders: Mapping[str, tuple[str, Callable[[], MarginFunction]]] = {
        "xgboost C API (the handler)": ("xgboost", lambda: xgboost_margin(weights)),
        "xgboost inplace_predict": (
            "xgboost",
            lambda: lambda rows: booster.inplace_predict(rows, predict_type="margin", validate_features=False),
        ),
        "xgboost DMatrix": (
            "xgboost",
            lambda: lambda rows: booster.predict(xgboost.DMatrix(rows, nthread=1), output_margin=True),
        ),
        "treelite gtil": ("treelite", lambda: _treelite(booster)),
        "tl2cgen": ("tl2cgen", lambda: _tl2cgen(booster)),
        "onnxruntime": ("onnxruntime", lambda: _onnx(booster, n_features)),
    }
    return {name: build() for name, (package, build) in builders.items() if importlib.util.find_spec(package)}


def network_margins(weights: bytes, network: dict[str, Any]) -> Mapping[str, MarginFunction]:
    """The challenger as the handler has it, and scripted; the same signature."""
    import torch  # noqa: PLC0415  slow to import

    from torchserve.handler import perceptron, standardised, torch_margin  # noqa: PLC0415

    scripted = torch.jit.freeze(torch.jit.script(perceptron(weights, network["layers"])))
    median, mean, scale = (np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale"))

    def script(rows: Rows) -> Rows:
        with torch.inference_mode():
            margins: Rows = scripted(
                torch.from_numpy(standardised(rows, median, mean, scale, network["clip"]))
            ).numpy()[:, 0]
        return margins

    return {"torch (the handler)": torch_margin(weights, network), "torch scripted": script}


def _treelite(booster: Any) -> MarginFunction:
    import treelite  # noqa: PLC0415  an extra

    model = _treelite_model(booster)
    return lambda rows: treelite.gtil.predict(model, rows, nthread=1, pred_margin=True).ravel()


def _treelite_model(booster: Any) -> Any:
    import treelite  # noqa: PLC0415  an extra

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.json"
        path.write_bytes(booster.save_raw(raw_format="json"))
        return treelite.frontend.load_xgboost_model(str(path))


def _tl2cgen(booster: Any) -> MarginFunction:
    import tl2cgen  # noqa: PLC0415  an extra

    directory = Path(tempfile.mkdtemp(prefix="pretrade-tl2cgen-"))
    library = str(directory / "model.so")
    tl2cgen.export_lib(_treelite_model(booster), toolchain="gcc", libpath=library, params={})
    predictor = tl2cgen.Predictor(library, nthread=1)
    return lambda rows: predictor.predict(tl2cgen.DMatrix(rows, dtype="float32"), pred_margin=True).ravel()


def _onnx(booster: Any, n_features: int) -> MarginFunction:
    import onnxmltools  # noqa: PLC0415  an extra
    import onnxruntime  # noqa: PLC0415  an extra
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415  an extra

    model = onnxmltools.convert_xgboost(booster, initial_types=[("input", FloatTensorType([None, n_features]))])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    probabilities = session.get_outputs()[-1].name

    def margin(rows: Rows) -> Rows:
        (both,) = session.run([probabilities], {"input": rows})
        share = both[:, 1].astype(np.float64)
        margins: Rows = np.log(share / (1 - share))
        return margins

    return margin


def metadata_and_weights(archive: Path) -> tuple[dict[str, Any], bytes]:
    """Of a `.mar`."""
    with zipfile.ZipFile(archive) as archived:
        return json.loads(archived.read("metadata.json")), archived.read("weights.bin")
