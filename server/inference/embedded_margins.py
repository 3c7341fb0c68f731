"""Margins in this process of models that are not boosted trees of XGBoost: in ONNX, and of several models together.

ONNX Runtime scores on the caller's thread. What it is asked, and what is made of its answer, is what the archive's
`handler.py` asks and makes, so the scores are the handler's to the last bit where both have the same version of ONNX
Runtime. With another version they may differ in the last bits. An archive's reference scores are compared before it
answers, to 1e-6; a replay compares bits, and reports such a difference.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fallback.order import Part

_LEAST_SHARE: Final = 1e-30
_MOST_SHARE: Final = 1 - 2.0**-25
"""As in the handler."""


class CannotScoreError(ValueError):
    """A model cannot be scored in this process, or gave no score."""


class Margins(Protocol):
    """Scores rows before calibration."""

    def margins(self, rows: bytes) -> NDArray[np.float32]:
        """float32[n] of rows of little-endian float32. Raises `CannotScoreError`."""


def has_onnx() -> bool:
    """Whether ONNX Runtime is installed; it is not imported by that."""
    return importlib.util.find_spec("onnxruntime") is not None


class OnnxMargins:
    """A model in ONNX, on the caller's thread.

    Args:
        weights: The model.
        scored: How its output is read: `scored` of the metadata.
        width: Features in a row.

    Raises:
        CannotScoreError: ONNX Runtime is not installed, or cannot load the model.
    """

    def __init__(self, weights: bytes, scored: Mapping[str, Any], width: int) -> None:
        if not has_onnx():
            raise CannotScoreError("ONNX Runtime is not installed (pretrade-server[embedded])")
        import onnxruntime  # noqa: PLC0415 - in the thread that loads a model, and only for such a model

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4
        self._width = width
        self._input, self._outputs = scored["input"], [scored["output"]]
        self._column, self._is_probability = int(scored["column"]), bool(scored["is_probability"])
        self._fill = None if scored["fill"] is None else np.array(scored["fill"], dtype=np.float32)
        try:
            self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of classes that the library does not name
            raise CannotScoreError(f"ONNX Runtime: {str(error).strip().partition(chr(10))[0]}") from error

    def margins(self, rows: bytes) -> NDArray[np.float32]:
        """float32[n]."""
        if not rows or len(rows) % (4 * self._width):
            raise CannotScoreError(f"{len(rows)} bytes are not rows of {4 * self._width}")
        given = np.frombuffer(rows, dtype=np.float32).reshape(-1, self._width)
        if self._fill is not None:
            given = np.where(np.isnan(given), self._fill, given)
        try:
            (output,) = self._session.run(self._outputs, {self._input: given})
        except Exception as error:  # as above
            raise CannotScoreError(f"ONNX Runtime: {str(error).strip().partition(chr(10))[0]}") from error
        values = output.reshape(len(output), -1)[:, self._column].astype(np.float64)
        return _log_odds(values) if self._is_probability else values.astype(np.float32)


class EnsembleMargins:
    """Several models together, as the handler puts them together.

    Args:
        weights: Those of all parts.
        ensemble: `ensemble` of the metadata.
        margins_of: The margins of a part, by its metadata and weights.

    Raises:
        CannotScoreError: A part cannot be scored here.
    """

    def __init__(
        self, weights: bytes, ensemble: Mapping[str, Any], margins_of: Callable[[Mapping[str, Any], bytes], Margins]
    ) -> None:
        self._parts = ensemble["parts"]
        self._is_mean = ensemble["how"] == "mean"
        self._bias = 0.0 if self._is_mean else float(ensemble["bias"])
        with zipfile.ZipFile(io.BytesIO(weights)) as packed:
            each = [packed.read(str(place)) for place in range(len(self._parts))]
        self._margins = [margins_of(part, own) for part, own in zip(self._parts, each, strict=True)]
        self.parts: Final = tuple(Part(str(part["version"]), float(part["weight"])) for part in self._parts)
        """The models, and how much each counts."""

    def margins(self, rows: bytes) -> NDArray[np.float32]:
        """float32[n]."""
        return self.margins_and_parts(rows)[0]

    def margins_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same, and what each part says, calibrated: float32[n, parts]."""
        total: NDArray[np.float64] | float = self._bias
        scores = []
        for part, of_part in zip(self._parts, self._margins, strict=True):
            own = of_part.margins(rows)
            scores.append(calibrated(own, part["calibration"]["slope"], part["calibration"]["intercept"]))
            total = total + float(part["weight"]) * (scores[-1] if self._is_mean else own).astype(np.float64)
        together = np.asarray(total)
        margins = _log_odds(together) if self._is_mean else together.astype(np.float32)
        return margins, np.stack(scores, axis=1)


def calibrated(margin: NDArray[np.float32], slope: float, intercept: float) -> NDArray[np.float32]:
    """float32[n] margins → float32[n] scores within [0, 1]."""
    # As tanh, because exp overflows for the log odds of a very sure model.
    return (0.5 + 0.5 * np.tanh(0.5 * (slope * margin.astype(np.float64) + intercept))).astype(np.float32)


def _log_odds(shares: NDArray[np.float64]) -> NDArray[np.float32]:
    held = np.clip(shares, _LEAST_SHARE, _MOST_SHARE)
    odds: NDArray[np.float32] = (np.log(held) - np.log1p(-held)).astype(np.float32)
    return odds
