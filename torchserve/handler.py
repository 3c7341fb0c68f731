"""The handler inside every archive: rows in, calibrated scores out. Self-contained, because the archive is.

Request: the entry `input` holds little-endian float32 rows, `float32[n, n_features]`, row-major, already turned for the
side of the order, NaN where undefined; the entry `feature_set`, where it is sent, the fingerprint of the feature set in
8 hexadecimal digits, and must be the model's. Answer, little-endian::

    magic "PTS1" | n_rows u32 | version 8 bytes | threshold f32 | feature-set fingerprint u32 | expires_at u64
    | scores f32[n_rows]

`version` is the first 8 bytes of the hash of everything in the archive that can change a score; `expires_at` is in Unix
seconds, 0 for never. A score is the calibrated probability 1 / (1 + exp(-(slope * margin + intercept))).
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HEADER: Final = struct.Struct("<4sI8sfIQ")
MAGIC: Final = b"PTS1"
HANDLER_FILE: Final = "handler.py"
METADATA_FILE: Final = "metadata.json"
WEIGHTS_FILE: Final = "weights.bin"

_RAW_MARGIN: Final = (
    b'{"type": 1, "training": false, "iteration_begin": 0, "iteration_end": 0, "missing": NaN, "strict_shape": false, '
    b'"cache_id": 0}'
)
"""How XGBoost is to predict: margins, by all trees, with NaN for what is missing."""

MarginFunction = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""float32[n, n_features] → float32[n]: the model's log odds before calibration."""

ExplainFunction = Callable[[NDArray[np.float32]], tuple[float, NDArray[np.float64]]]
"""float32[n_features] → base, float64[n_features]: what the margin is without knowing anything of the row, and what
each feature adds to that; together they are the margin."""


def content_version(handler: bytes, metadata: bytes, weights: bytes) -> str:
    """Hash of all that decides a score: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (handler, metadata, weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def xgboost_margin(weights: bytes) -> MarginFunction:
    """Margins of a boosted tree ensemble saved as UBJSON; NaN is its missing value.

    `Booster.inplace_predict` spends 0.1 ms in Python on every call. This calls the same function of XGBoost's C API, as
    documented, and gives the same bits.

    Raises:
        RuntimeError: It does not, with this version of XGBoost.
    """
    import xgboost  # noqa: PLC0415  each archive loads only the library of its own model
    from xgboost.libpath import find_lib_path  # noqa: PLC0415

    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))
    # A loaded model forgets the parameter it was constructed with.
    booster.set_param({"nthread": 1})
    library = ctypes.CDLL(find_lib_path()[0])
    library.XGBGetLastError.restype = ctypes.c_char_p
    shape, dimensions = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64()
    margins = ctypes.POINTER(ctypes.c_float)()
    results = ctypes.byref(shape), ctypes.byref(dimensions), ctypes.byref(margins)

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = np.ascontiguousarray(rows, dtype="<f4")
        array = b'{"data": [%d, true], "shape": [%d, %d], "typestr": "<f4", "version": 3}' % (
            rows.ctypes.data,
            *rows.shape,
        )
        if library.XGBoosterPredictFromDense(booster.handle, array, _RAW_MARGIN, None, *results) != 0:
            raise RuntimeError(library.XGBGetLastError().decode())
        # The memory is the booster's, until its next prediction.
        return np.ctypeslib.as_array(margins, (len(rows),)).copy()

    canned = np.full((3, booster.num_features()), np.nan, dtype=np.float32)
    canned[1:] = [[0.0], [1.0]]
    if not np.array_equal(margin(canned), booster.inplace_predict(canned, predict_type="margin")):
        raise RuntimeError(f"XGBoost {xgboost.__version__} predicts otherwise through its C API")
    return margin


def tree_shap(weights: bytes) -> ExplainFunction:
    """Shapley values of a boosted tree ensemble, by XGBoost itself; the base is the mean over its training data.

    Source: Lundberg et al., From local explanations to global understanding with explainable AI for trees (2020).
    """
    import xgboost  # noqa: PLC0415  as above

    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))

    def explain(row: NDArray[np.float32]) -> tuple[float, NDArray[np.float64]]:
        (values,) = booster.predict(xgboost.DMatrix(row[None], nthread=1), pred_contribs=True).astype(np.float64)
        return float(values[-1]), values[:-1]

    return explain


def integrated_gradients(weights: bytes, network: dict[str, Any]) -> ExplainFunction:
    """Gradients of a multilayer perceptron integrated along the line from the mean of its training data to the row.

    The network is linear between the points of the line at which one of its units switches. Those are found layer by
    layer, so the integral is a finite sum and exact.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks (2017).
    """
    import io  # noqa: PLC0415  as below

    import torch  # noqa: PLC0415

    state = torch.load(io.BytesIO(weights), weights_only=True)
    layers = [
        (state[f"{place}.weight"].double().numpy(), state[f"{place}.bias"].double().numpy())
        for place in range(0, 2 * (len(network["layers"]) - 1), 2)
    ]
    median, mean, scale = (np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale"))

    def explain(row: NDArray[np.float32]) -> tuple[float, NDArray[np.float64]]:
        # The line runs from 0, the standardised mean, to `end`; `at` holds where on it, from 0 to 1, a unit switches.
        end = standardised(row[None], median, mean, scale, network["clip"])[0].astype(np.float64)
        at = np.array([0.0, 1.0])
        for depth in range(1, len(layers)):
            before = _preactivations(layers[:depth], at[:, None] * end)
            start, stop = before[:-1], before[1:]
            switching = (start < 0) != (stop < 0)
            share = start[switching] / (start[switching] - stop[switching])
            place = np.nonzero(switching)[0]
            at = np.unique(np.concatenate([at, at[place] + share * np.diff(at)[place]]))
        middle = (at[:-1] + at[1:]) / 2
        gradient = np.ones((len(middle), 1))
        for depth in range(len(layers), 0, -1):
            gradient = gradient @ layers[depth - 1][0]
            if depth > 1:
                gradient *= _preactivations(layers[: depth - 1], middle[:, None] * end) > 0
        base = float(_preactivations(layers, np.zeros((1, len(end))))[0, 0])
        return base, end * (np.diff(at) @ gradient)

    return explain


def _preactivations(
    layers: list[tuple[NDArray[np.float64], NDArray[np.float64]]], inputs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What the last of these layers computes, before its units switch: float64[n, units]."""
    for depth, (weight, bias) in enumerate(layers):
        inputs = (inputs if depth == 0 else np.maximum(inputs, 0.0)) @ weight.T + bias
    return inputs


def torch_margin(weights: bytes, network: dict[str, Any]) -> MarginFunction:
    """Margins of a multilayer perceptron.

    Args:
        weights: A state dict as `torch.save` writes it.
        network: `layers` (sizes, input first), and for every feature `median` (put where NaN is), `mean` and `scale`
            of the training data; standardised values are held within ±`clip`.
    """
    import torch  # noqa: PLC0415  only this model needs it

    torch.set_num_threads(1)
    model = perceptron(weights, network["layers"])
    median, mean, scale = (np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale"))

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(standardised(rows, median, mean, scale, network["clip"]))
        with torch.inference_mode():
            scores: NDArray[np.float32] = model(inputs).numpy()[:, 0]
        return scores

    return margin


def perceptron(weights: bytes, sizes: list[int]) -> Any:
    """The network of a state dict: linear layers of these sizes, input first, with rectifiers between them."""
    import io  # noqa: PLC0415  as above
    import itertools  # noqa: PLC0415

    import torch  # noqa: PLC0415

    layers: list[torch.nn.Module] = []
    with torch.device("meta"):  # the shapes alone: no weights are drawn that the saved ones replace
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True), assign=True)
    return model.eval()


def standardised(
    rows: NDArray[np.float32],
    median: NDArray[np.float32],
    mean: NDArray[np.float32],
    scale: NDArray[np.float32],
    clip: float,
) -> NDArray[np.float32]:
    """What the network sees: the median where a row holds NaN, mean 0, scale 1, within ±`clip`."""
    filled = np.where(np.isnan(rows), median, rows)
    with np.errstate(over="ignore"):  # what is too large for a float32 is beyond the clip as well
        return ((filled - mean) / scale).clip(np.float32(-clip), np.float32(clip))


def calibrated(margin: NDArray[np.float32], slope: float, intercept: float) -> NDArray[np.float32]:
    """float32[n] margins → float32[n] scores within [0, 1]."""
    # As tanh, because exp overflows for the log odds of a very sure model.
    return (0.5 + 0.5 * np.tanh(0.5 * (slope * margin.astype(np.float64) + intercept))).astype(np.float32)


class ModelHandler:
    """What TorchServe's worker calls: `initialize` once, then `handle` for every request, on one thread."""

    def initialize(self, context: Any) -> None:
        """Loads the archive that TorchServe unpacked, and scores once so that the first caller finds it warm.

        Raises:
            RuntimeError: The files are not those the archive was made of.
        """
        directory = Path(context.system_properties["model_dir"])
        handler, metadata_bytes, weights = (
            (directory / name).read_bytes() for name in (HANDLER_FILE, METADATA_FILE, WEIGHTS_FILE)
        )
        version = content_version(handler, metadata_bytes, weights)
        declared = context.manifest["model"]["modelVersion"]
        if version != declared:
            raise RuntimeError(f"the archive says version {declared}, its files are {version}")
        metadata = json.loads(metadata_bytes)
        self._weights, self._metadata, self._version = weights, metadata, version
        self._explain: ExplainFunction | None = None
        self._feature_set = f"{metadata['feature_set_fingerprint']:08x}"
        self._n_features: int = len(metadata["feature_names"])
        self._margin = (
            xgboost_margin(weights) if metadata["network"] is None else torch_margin(weights, metadata["network"])
        )
        self._slope = float(metadata["calibration"]["slope"])
        self._intercept = float(metadata["calibration"]["intercept"])
        self._header_tail = (
            bytes.fromhex(version),
            metadata["threshold"],
            metadata["feature_set_fingerprint"],
            metadata["expires_at"],
        )
        for rows in (1, 64):
            self.score(np.full((rows, self._n_features), np.nan, dtype=np.float32))
        # The worker would print two lines for every request.
        logging.getLogger().setLevel(logging.WARNING)
        # The libraries' objects live as long as the process: leave them out of every later collection.
        gc.collect()
        gc.freeze()

    def handle(self, requests: list[dict[str, Any]], _context: Any) -> list[bytes]:
        """One answer for each request of TorchServe's batch (of one: batching happens in front of it).

        Raises:
            PredictionException: With HTTP status 400 (gRPC INVALID_ARGUMENT) for anything but whole rows of the model's
                feature set.
        """
        return [self._answer(request) for request in requests]

    def score(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, n_features] → calibrated float32[n] within [0, 1]."""
        return calibrated(self._margin(rows), self._slope, self._intercept)

    def explain(self, row: NDArray[np.float32]) -> dict[str, Any]:
        """Why the model scores a row, float32[n_features], as it does; not called by TorchServe.

        Returns:
            `method`, `margin` (log odds before calibration), `base`, and `contributions`, one a feature, whose sum with
            the base is the margin.
        """
        is_trees = self._metadata["network"] is None
        if self._explain is None:
            self._explain = (
                tree_shap(self._weights) if is_trees else integrated_gradients(self._weights, self._metadata["network"])
            )
        base, contributions = self._explain(row)
        return {
            "method": "tree_shap" if is_trees else "integrated_gradients",
            "margin": float(self._margin(row[None])[0]),
            "base": base,
            "contributions": contributions.tolist(),
        }

    def _answer(self, request: dict[str, Any]) -> bytes:
        feature_set = request.get("feature_set")
        if feature_set is not None and bytes(feature_set) != self._feature_set.encode():
            raise _refused(f"`feature_set` is {bytes(feature_set)[:64]!r}, this model's is {self._feature_set}")
        rows = self._rows(request.get("input"))
        scores = self.score(rows)
        return HEADER.pack(MAGIC, len(rows), *self._header_tail) + scores.astype("<f4", copy=False).tobytes()

    def _rows(self, packed: object) -> NDArray[np.float32]:
        row_bytes = 4 * self._n_features
        if not isinstance(packed, bytes | bytearray) or not packed or len(packed) % row_bytes:
            length = len(packed) if isinstance(packed, bytes | bytearray) else "no"
            raise _refused(f"`input` has {length} bytes, not a positive multiple of {row_bytes}")
        return np.frombuffer(packed, dtype="<f4").reshape(-1, self._n_features)


def _refused(why: str) -> Exception:
    """The error that TorchServe answers with the caller's status, and this message."""
    from ts.utils.util import PredictionException  # noqa: PLC0415  training uses this module without TorchServe

    refusal: Exception = PredictionException(why, 400)
    return refusal
