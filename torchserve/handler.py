"""The handler inside every archive: rows in, calibrated scores out. Self-contained, because the archive is.

Request: the entry `input` holds little-endian float32 rows, `float32[n, n_features]`, row-major, already turned for the
side of the order, NaN where undefined. Answer, little-endian::

    magic "PTS1" | n_rows u32 | version 8 bytes | threshold f32 | feature-set fingerprint u32 | expires_at u64
    | scores f32[n_rows]

`version` is the first 8 bytes of the hash of everything in the archive that can change a score; `expires_at` is in Unix
seconds, 0 for never. A score is the calibrated probability 1 / (1 + exp(-(slope * margin + intercept))).
"""

from __future__ import annotations

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

MarginFunction = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""float32[n, n_features] → float32[n]: the model's log odds before calibration."""


def content_version(handler: bytes, metadata: bytes, weights: bytes) -> str:
    """Hash of all that decides a score: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (handler, metadata, weights):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def xgboost_margin(weights: bytes) -> MarginFunction:
    """Margins of a boosted tree ensemble saved as UBJSON; NaN is its missing value."""
    import xgboost  # noqa: PLC0415  each archive loads only the library of its own model

    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(weights))
    # A loaded model forgets the parameter it was constructed with.
    booster.set_param({"nthread": 1})

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = booster.inplace_predict(rows, predict_type="margin", validate_features=False)
        return scores

    return margin


def torch_margin(weights: bytes, network: dict[str, Any]) -> MarginFunction:
    """Margins of a multilayer perceptron.

    Args:
        weights: A state dict as `torch.save` writes it.
        network: `layers` (sizes, input first), and for every feature `median` (put where NaN is), `mean` and `scale`
            of the training data; standardised values are held within ±`clip`.
    """
    import io  # noqa: PLC0415  only this model needs them
    import itertools  # noqa: PLC0415

    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    layers: list[torch.nn.Module] = []
    with torch.device("meta"):  # the shapes alone: no weights are drawn that the saved ones replace
        for inputs, outputs in itertools.pairwise(network["layers"]):
            layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    model.load_state_dict(torch.load(io.BytesIO(weights), weights_only=True), assign=True)
    model.eval()
    median, mean, scale = (np.array(network[name], dtype=np.float32) for name in ("median", "mean", "scale"))

    def margin(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(standardised(rows, median, mean, scale, network["clip"]))
        with torch.inference_mode():
            scores: NDArray[np.float32] = model(inputs).numpy()[:, 0]
        return scores

    return margin


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
        self._n_features: int = len(metadata["feature_names"])
        self._margin = (
            xgboost_margin(weights) if metadata["kind"] == "xgboost" else torch_margin(weights, metadata["network"])
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
            PredictionException: With HTTP status 400 (gRPC INVALID_ARGUMENT) for bytes that are not whole rows.
        """
        return [self._answer(request.get("input")) for request in requests]

    def score(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[n, n_features] → calibrated float32[n] within [0, 1]."""
        return calibrated(self._margin(rows), self._slope, self._intercept)

    def _answer(self, packed: bytes | bytearray | None) -> bytes:
        row_bytes = 4 * self._n_features
        if not isinstance(packed, bytes | bytearray) or not packed or len(packed) % row_bytes:
            from ts.utils.util import PredictionException  # noqa: PLC0415  training uses this module without TorchServe

            length = len(packed) if isinstance(packed, bytes | bytearray) else "no"
            raise PredictionException(f"`input` has {length} bytes, not a positive multiple of {row_bytes}", 400)
        rows = np.frombuffer(packed, dtype="<f4").reshape(-1, self._n_features)
        scores = self.score(rows)
        return HEADER.pack(MAGIC, len(rows), *self._header_tail) + scores.astype("<f4", copy=False).tobytes()
