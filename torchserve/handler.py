"""The handler inside every archive: rows in, calibrated scores out. Self-contained, because the archive is.

The metadata name the runtime that computes a margin: `xgboost`, `torch` (our own network), `onnx`, `torchscript`, or
`ensemble` of these. Its library alone is imported.

Request: the entry `input` holds little-endian float32 rows, `float32[n, n_features]`, row-major, already turned for the
side of the order, NaN where undefined; the entry `feature_set`, where it is sent, the fingerprint of the feature set in
8 hexadecimal digits, and must be the model's. Answer, little-endian::

    magic "PTS1" | n_rows u32 | version 8 bytes | threshold f32 | feature-set fingerprint u32 | expires_at u64
    | scores f32[n_rows]

`version` is the first 8 bytes of the hash of everything in the archive that can change a score; `expires_at` is in Unix
seconds, 0 for never. A score is the calibrated probability 1 / (1 + exp(-(slope * margin + intercept))).

An ensemble also says what its parts say. Its magic is "PTS2", and it adds to the same header and scores::

    | n_parts u32 | n_parts times: version 8 bytes, weight f64 | scores of the parts f32[n_rows, n_parts]
"""

from __future__ import annotations

import base64
import ctypes
import gc
import hashlib
import io
import json
import logging
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HEADER: Final = struct.Struct("<4sI8sfIQ")
MAGIC: Final = b"PTS1"
MAGIC_OF_PARTS: Final = b"PTS2"
N_PARTS: Final = struct.Struct("<I")
PART: Final = struct.Struct("<8sd")
MOST_PARTS: Final = 12
"""Of an ensemble: its answer to 1,024 rows is then less than the 64 KiB that a caller takes."""
HANDLER_FILE: Final = "handler.py"
METADATA_FILE: Final = "metadata.json"
WEIGHTS_FILE: Final = "weights.bin"

_RAW_MARGIN: Final = (
    b'{"type": 1, "training": false, "iteration_begin": 0, "iteration_end": 0, "missing": NaN, "strict_shape": false, '
    b'"cache_id": 0}'
)
"""How XGBoost is to predict: margins, by all trees, with NaN for what is missing."""

LEAST_SHARE: Final = 1e-30
MOST_SHARE: Final = 1 - 2.0**-25
"""Nearest to 0 and 1 that a probability counts: the last one that a float32 tells from 1."""
_ORDERS: Final = 8
"""Of the features, for each background row of an explanation by sampling."""
_EXPLAINING_SEED: Final = 1

MarginFunction = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""float32[n, n_features] → float32[n]: the model's log odds before calibration."""

PartsFunction = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""float32[n, n_features] → the same margins, and float32[n, n_parts]: what the parts of an ensemble say, calibrated."""

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


def onnx_margin(weights: bytes, scored: Mapping[str, Any]) -> MarginFunction:
    """Margins of a model in the Open Neural Network Exchange format, on one thread.

    Args:
        weights: The model, whole in one file.
        scored: `input` and `output` (names), and what `margins_in` and `filled` want.
    """
    import onnxruntime  # noqa: PLC0415  as above

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
    wanted, given = [scored["output"]], scored["input"]

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        (output,) = session.run(wanted, {given: filled(rows, scored)})
        return margins_in(output, scored)

    return margin


def torchscript_margin(weights: bytes, scored: Mapping[str, Any], device: str = "cpu") -> MarginFunction:
    """Margins of a scripted or traced network, on one thread or on a GPU.

    Args:
        weights: What `torch.jit.save` wrote.
        scored: What `margins_in` and `filled` want.
        device: Torch's name for where it computes.
    """
    import torch  # noqa: PLC0415  as above

    torch.set_num_threads(1)
    model = torchscript(weights, device)

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            # A copy: a request's memory cannot be written to, and Torch would warn of that.
            output = model(torch.tensor(filled(rows, scored), device=device))
        return margins_in(output.cpu().numpy(), scored)

    return margin


def torchscript(weights: bytes, device: str) -> Any:
    """The network that `torch.jit.save` wrote."""
    import torch  # noqa: PLC0415  as above

    load: Any = torch.jit.load  # without types
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody works on TorchScript any more, and it works
        return load(io.BytesIO(weights), map_location=device).eval()


def filled(rows: NDArray[np.float32], scored: Mapping[str, Any]) -> NDArray[np.float32]:
    """The rows with `fill` where they are undefined, one value a feature; as they are where that is null."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if scored["fill"] is None:
        return rows
    defined: NDArray[np.float32] = np.where(np.isnan(rows), np.array(scored["fill"], np.float32), rows)
    return defined


def margins_in(output: NDArray[Any], scored: Mapping[str, Any]) -> NDArray[np.float32]:
    """float32[n]: the margins in a model's output of `[n]` or `[n, columns]`.

    Args:
        output: Margins, or probabilities, which are held a little inside 0 and 1.
        scored: `column`, and `is_probability`.
    """
    values = np.asarray(output).reshape(len(output), -1)[:, scored["column"]].astype(np.float64)
    return log_odds(values) if scored["is_probability"] else values.astype(np.float32)


def log_odds(shares: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64[n] probabilities → float32[n], finite also for 0 and 1."""
    held = np.clip(shares, LEAST_SHARE, MOST_SHARE)
    odds: NDArray[np.float32] = (np.log(held) - np.log1p(-held)).astype(np.float32)
    return odds


def ensemble_margin(weights: bytes, ensemble: Mapping[str, Any], device: str = "cpu") -> MarginFunction:
    """Margins of several models together; see `ensemble_scores`."""
    scores = ensemble_scores(weights, ensemble, device)
    return lambda rows: scores(rows)[0]


def ensemble_scores(weights: bytes, ensemble: Mapping[str, Any], device: str = "cpu") -> PartsFunction:
    """Margins of several models together, and the score of each.

    `mean` is the log odds of the weighted mean of their scores, `stack` a weighted sum of their margins before
    calibration, and a bias.

    Args:
        weights: What `packed_parts` made.
        ensemble: `how`, `bias` and `parts`: of each its metadata, and `weight`.
        device: See `torchscript_margin`.
    """
    parts = ensemble["parts"]
    with zipfile.ZipFile(io.BytesIO(weights)) as packed:
        each = [packed.read(str(place)) for place in range(len(parts))]
    margins = [margin_of(part, own, device) for part, own in zip(parts, each, strict=True)]
    is_mean = ensemble["how"] == "mean"

    def score(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        total = np.full(len(rows), 0.0 if is_mean else float(ensemble["bias"]))
        scores = np.empty((len(rows), len(parts)), dtype=np.float32)
        for place, (part, of_part) in enumerate(zip(parts, margins, strict=True)):
            own = of_part(rows)
            scores[:, place] = calibrated(own, **part["calibration"])
            total += float(part["weight"]) * (scores[:, place] if is_mean else own).astype(np.float64)
        return log_odds(total) if is_mean else total.astype(np.float32), scores

    return score


def packed_parts(parts: Sequence[bytes]) -> bytes:
    """The weights of several models as those of one; the same parts give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archived:
        for place, weights in enumerate(parts):
            archived.writestr(zipfile.ZipInfo(str(place)), weights)
    return packed.getvalue()


def runtime_of(metadata: Mapping[str, Any]) -> str:
    """What computes a model's margins."""
    named: str | None = metadata.get("runtime")
    return named or ("xgboost" if metadata["network"] is None else "torch")


def margin_of(metadata: Mapping[str, Any], weights: bytes, device: str = "cpu") -> MarginFunction:
    """The margins of any model.

    Args:
        metadata: Of its archive, or of a part of one.
        weights: Of the same.
        device: See `torchscript_margin`.
    """
    runtime = runtime_of(metadata)
    if runtime == "xgboost":
        return xgboost_margin(weights)
    if runtime == "torch":
        return torch_margin(weights, metadata["network"], device)
    if runtime == "onnx":
        return onnx_margin(weights, metadata["scored"])
    if runtime == "torchscript":
        return torchscript_margin(weights, metadata["scored"], device)
    if runtime == "ensemble":
        return ensemble_margin(weights, metadata["ensemble"], device)
    raise RuntimeError(f"this handler knows no runtime {runtime!r}")


def uses_torch(metadata: Mapping[str, Any]) -> bool:
    """Whether Torch computes the margins of a model, or of a part of it."""
    if runtime_of(metadata) == "ensemble":
        return any(map(uses_torch, metadata["ensemble"]["parts"]))
    return runtime_of(metadata) in ("torch", "torchscript")


def device_of(properties: Mapping[str, Any]) -> str:
    """Where Torch is to compute: on the GPU that TorchServe gave this worker (`number_of_gpu`), else on the CPU."""
    number = properties.get("gpu_id")
    if number is None:
        return "cpu"
    import torch  # noqa: PLC0415  as above

    if torch.cuda.is_available():
        return f"cuda:{number}"
    logging.getLogger(__name__).warning("TorchServe gave this worker GPU %s, Torch sees none: on the CPU", number)
    return "cpu"


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


def sampled_shapley(margin: MarginFunction, background: NDArray[np.float32]) -> ExplainFunction:
    """Shapley values by sampling, for a model of which nothing is known but its margins.

    Features are taken from a background row to the explained row one by one, in a random order and in its reverse; what
    a feature changes is averaged over all orders and background rows. The orders are the same for every row, so an
    explanation repeats. Base and contributions sum to the margin but for rounding; a contribution itself is an
    estimate.

    Source: E. Štrumbelj, I. Kononenko, Explaining prediction models and individual predictions with feature
    contributions (2014).

    Args:
        margin: Of the model.
        background: float32[m, n_features], rows that it was calibrated on.
    """
    random = np.random.default_rng(_EXPLAINING_SEED)
    n = background.shape[1]
    half = np.array([random.permutation(n) for _ in range(_ORDERS // 2)])
    orders = np.concatenate([half, half[:, ::-1]])
    # taken[o, j] says which features the row after j steps of order o has from the row that is explained.
    taken = np.argsort(orders, axis=1)[:, None, :] < np.arange(n + 1)[None, :, None]

    def explain(row: NDArray[np.float32]) -> tuple[float, NDArray[np.float64]]:
        contributions, bases = np.zeros(n), []
        for other in background:
            values = margin(np.where(taken, row, other).reshape(-1, n).astype(np.float32)).astype(np.float64)
            steps = values.reshape(len(orders), n + 1)
            np.add.at(contributions, orders, np.diff(steps, axis=1))
            bases.append(steps[0, 0])
        return float(np.mean(bases)), contributions / (len(background) * len(orders))

    return explain


def integrated_gradients(weights: bytes, network: dict[str, Any]) -> ExplainFunction:
    """Gradients of a multilayer perceptron integrated along the line from the mean of its training data to the row.

    The network is linear between the points of the line at which one of its units switches. Those are found layer by
    layer, so the integral is a finite sum and exact.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks (2017).
    """
    import torch  # noqa: PLC0415  as above

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


def torch_margin(weights: bytes, network: dict[str, Any], device: str = "cpu") -> MarginFunction:
    """Margins of a multilayer perceptron.

    Args:
        weights: A state dict as `torch.save` writes it.
        network: `layers` (sizes, input first), and for every feature `median` (put where NaN is), `mean` and `scale`
            of the training data; standardised values are held within ±`clip`.
        device: Torch's name for where it computes.
    """
    import torch  # noqa: PLC0415  only this model needs it

    torch.set_num_threads(1)
    model = perceptron(weights, network["layers"]).to(device)
    median, mean, scale = (np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale"))

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(standardised(rows, median, mean, scale, network["clip"])).to(device)
        with torch.inference_mode():
            scores: NDArray[np.float32] = model(inputs).cpu().numpy()[:, 0]
        return scores

    return margin


def perceptron(weights: bytes, sizes: list[int]) -> Any:
    """The network of a state dict: linear layers of these sizes, input first, with rectifiers between them."""
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
        device = device_of(context.system_properties) if uses_torch(metadata) else "cpu"
        ensemble = metadata.get("ensemble")
        self._parts: list[dict[str, Any]] = [] if ensemble is None else ensemble["parts"]
        self._of_parts = None if ensemble is None else ensemble_scores(weights, ensemble, device)
        self._margin = margin_of(metadata, weights, device) if self._of_parts is None else self._margin_of_parts
        self._slope = float(metadata["calibration"]["slope"])
        self._intercept = float(metadata["calibration"]["intercept"])
        self._described_parts = N_PARTS.pack(len(self._parts)) + b"".join(
            PART.pack(bytes.fromhex(part["version"]), part["weight"]) for part in self._parts
        )
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
            the base is the margin; of an ensemble also `parts`, with the score of each. Or `unavailable`, and why.
        """
        if self._explain is None:
            method, self._explain = _explanation_of(self._metadata, self._weights, self._margin)
            if self._explain is None:
                return {"unavailable": method}
            self._method = method
        base, contributions = self._explain(row)
        scores = [] if self._of_parts is None else self._of_parts(row[None])[1][0].tolist()
        return {
            "method": self._method,
            "margin": float(self._margin(row[None])[0]),
            "base": base,
            "contributions": contributions.tolist(),
            "parts": [
                {"model_version": part["version"], "weight": part["weight"], "score": score}
                for part, score in zip(self._parts, scores, strict=True)
            ],
        }

    def _answer(self, request: dict[str, Any]) -> bytes:
        feature_set = request.get("feature_set")
        if feature_set is not None and bytes(feature_set) != self._feature_set.encode():
            raise _refused(f"`feature_set` is {bytes(feature_set)[:64]!r}, this model's is {self._feature_set}")
        rows = self._rows(request.get("input"))
        if self._of_parts is None:
            return self._packed(MAGIC, self.score(rows))
        margin, scores = self._of_parts(rows)
        together = self._packed(MAGIC_OF_PARTS, calibrated(margin, self._slope, self._intercept))
        return together + self._described_parts + scores.astype("<f4", copy=False).tobytes()

    def _packed(self, magic: bytes, scores: NDArray[np.float32]) -> bytes:
        return HEADER.pack(magic, len(scores), *self._header_tail) + scores.astype("<f4", copy=False).tobytes()

    def _margin_of_parts(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        assert self._of_parts is not None
        return self._of_parts(rows)[0]

    def _rows(self, packed: object) -> NDArray[np.float32]:
        row_bytes = 4 * self._n_features
        if not isinstance(packed, bytes | bytearray) or not packed or len(packed) % row_bytes:
            length = len(packed) if isinstance(packed, bytes | bytearray) else "no"
            raise _refused(f"`input` has {length} bytes, not a positive multiple of {row_bytes}")
        return np.frombuffer(packed, dtype="<f4").reshape(-1, self._n_features)


def _explanation_of(
    metadata: Mapping[str, Any], weights: bytes, margin: MarginFunction
) -> tuple[str, ExplainFunction | None]:
    """How a model is explained, and the function that does; or why it cannot be."""
    runtime = runtime_of(metadata)
    if runtime == "xgboost":
        return "tree_shap", tree_shap(weights)
    if runtime == "torch":
        return "integrated_gradients", integrated_gradients(weights, metadata["network"])
    background = np.frombuffer(base64.b64decode(metadata["background"]), dtype="<f4")
    if not len(background):
        return "the model was added without a dataset, and has no rows that an explanation could start from", None
    return "sampled_shapley", sampled_shapley(margin, background.reshape(-1, len(metadata["feature_names"])))


def _refused(why: str) -> Exception:
    """The error that TorchServe answers with the caller's status, and this message."""
    from ts.utils.util import PredictionException  # noqa: PLC0415  training uses this module without TorchServe

    refusal: Exception = PredictionException(why, 400)
    return refusal
