"""The champion, scored in this process: boosted trees by XGBoost's C API, others by ONNX Runtime.

The archive's own `handler.py` is not run: it is made for a process of its own. This does what it does for trees, and
gives the same scores to the last bit, because it calls the same function of the same library. A network that Torch
scores on a replica is scored in ONNX here (`torchserve/portable.py`), within 1e-6.

Only XGBoost's shared library is loaded, from the `xgboost` package. The package itself is never imported: that takes
half a second and brings SciPy along. The extra `pretrade-server[embedded]` installs it, and ONNX Runtime
(`embedded_margins.py`).
"""

from __future__ import annotations

import base64
import ctypes
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fallback.order import Part
from feature_cache import feature_sets
from feature_cache.feature_set import FeatureSet
from server.inference.embedded_margins import (
    CannotScoreError,
    EnsembleMargins,
    Margins,
    OnnxMargins,
    calibrated,
    has_onnx,
)
from server.inference.wire import LAST_EXPIRY

_MOST_ROWS: Final = 256
"""That one call of the library scores. A larger batch takes several."""
_NOT_INSTALLED: Final = "XGBoost is not installed (pretrade-server[embedded])"
_PREDICTION: Final = (
    b'{"type": 1, "training": false, "iteration_begin": 0, "iteration_end": 0, "missing": NaN, "strict_shape": false, '
    b'"cache_id": 0}'
)
"""Margins, by all trees, with NaN for what is missing: what the archive's handler asks for."""


def problem_of_library() -> str:
    """Why no model can be scored here; empty when one can."""
    return "" if _library_path() is not None or has_onnx() else _NOT_INSTALLED


class EmbeddedScorer:
    """Scores rows as the archive's handler does: margin, calibration, float32.

    With trees it blocks its caller for some 75 µs with one row and 110 µs with 64. One thread uses it at a time.

    Args:
        name: Under which the model is served.
        version: The content hash of the archive.
        metadata: Of the archive.
        weights: Of the archive: the ensemble as UBJSON.

    Raises:
        CannotScoreError: XGBoost is not installed, or this is another kind of model or one of another feature set.
    """

    def __init__(self, name: str, version: str, metadata: bytes, weights: bytes) -> None:
        try:
            described = json.loads(metadata)
            kind, fingerprint = described["kind"], described["feature_set_fingerprint"]
            self.name = name
            self.version = version
            # Compared as the float32 that the handler sends.
            self.threshold = float(np.float32(described["threshold"]))
            self.expires_at = int(described["expires_at"])
            self._slope = float(described["calibration"]["slope"])
            self._intercept = float(described["calibration"]["intercept"])
        except (ValueError, KeyError, TypeError) as error:
            raise CannotScoreError(f"its metadata are incomplete: {error!r}") from error
        if not 0 <= self.expires_at <= LAST_EXPIRY:
            raise CannotScoreError(f"it expires at {self.expires_at}, which is no time")
        feature_set = feature_sets.by_fingerprint(fingerprint)
        if feature_set is None:
            raise CannotScoreError(f"its feature set {fingerprint:08x} is not known here: {feature_sets.names()}")
        self.feature_set = feature_set
        self._margins = _margins_of(described, weights, kind, feature_set)
        self._ensemble = self._margins if isinstance(self._margins, EnsembleMargins) else None
        self.parts: tuple[Part, ...] = () if self._ensemble is None else self._ensemble.parts
        """Of an ensemble."""

    def scores(self, rows: bytes) -> NDArray[np.float32]:
        """The calibrated scores of any number of rows, float32[n]; not yet checked.

        Args:
            rows: Vectors of the model's set as little-endian float32.

        Raises:
            CannotScoreError: There are none.
        """
        return self.scores_and_parts(rows)[0]

    def scores_and_parts(self, rows: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """The same, and of an ensemble what each part says, float32[n, parts]."""
        most = _MOST_ROWS * self.feature_set.row_bytes
        pieces = [rows[first : first + most] for first in range(0, max(1, len(rows)), most)]
        if self._ensemble is None:
            return self._calibrated([self._margins.margins(piece) for piece in pieces]), None
        margins, of_parts = zip(*map(self._ensemble.margins_and_parts, pieces), strict=True)
        return self._calibrated(margins), np.concatenate(of_parts)

    def _calibrated(self, margins: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return calibrated(margins[0] if len(margins) == 1 else np.concatenate(margins), self._slope, self._intercept)


def _margins_of(described: Mapping[str, Any], weights: bytes, kind: str, feature_set: FeatureSet) -> Margins:
    """What computes the margins of a model, or of a part of one. Raises `CannotScoreError`."""
    runtime = described.get("runtime") or ("xgboost" if described["network"] is None else "torch")
    if runtime == "xgboost":
        return _Trees(weights, feature_set)
    if runtime == "onnx":
        return OnnxMargins(weights, described["scored"], len(feature_set))
    if runtime == "torch" and (network := described.get("onnx")):
        return OnnxMargins(base64.b64decode(network["model"]), network["scored"], len(feature_set))
    if runtime == "ensemble":
        return EnsembleMargins(
            weights, described["ensemble"], lambda part, own: _margins_of(part, own, str(part["kind"]), feature_set)
        )
    raise CannotScoreError(f"a model of the kind {kind!r} is not scored in the server's process")


class _Trees:
    """An ensemble in the library, and the memory in which it gets its rows."""

    def __init__(self, weights: bytes, feature_set: FeatureSet) -> None:
        self._booster = ctypes.c_void_p()
        path = _library_path()
        if path is None:
            raise CannotScoreError(_NOT_INSTALLED)
        # Loading leaves the interpreter to the other threads. A prediction does not: it is shorter than the turn of a
        # thread that would take the interpreter meanwhile.
        loading, self._library = _libraries(path)
        self._done(loading.XGBoosterCreate(None, ctypes.c_uint64(0), ctypes.byref(self._booster)))
        self._done(loading.XGBoosterLoadModelFromBuffer(self._booster, weights, ctypes.c_uint64(len(weights))))
        # After the weights: a loaded model forgets it.
        self._done(loading.XGBoosterSetParam(self._booster, b"nthread", b"1"))
        width = ctypes.c_uint64()
        self._done(loading.XGBoosterGetNumFeature(self._booster, ctypes.byref(width)))
        if width.value != len(feature_set):
            raise CannotScoreError(f"its trees want {width.value} features, {feature_set.id} has {len(feature_set)}")
        self._row_bytes = feature_set.row_bytes
        self._rows = ctypes.create_string_buffer(_MOST_ROWS * self._row_bytes)
        self._arrays: dict[int, bytes] = {}
        """By the number of bytes: how the library is told where the rows are."""
        self._margins = ctypes.POINTER(ctypes.c_float)()
        shape, dimensions = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64()
        self._results = ctypes.byref(shape), ctypes.byref(dimensions), ctypes.byref(self._margins)

    def __del__(self) -> None:
        if self._booster.value is not None:
            self._library.XGBoosterFree(self._booster)

    def margins(self, rows: bytes) -> NDArray[np.float32]:
        """float32[n]."""
        array = self._arrays.get(len(rows))
        if array is None:
            count, rest = divmod(len(rows), self._row_bytes)
            if rest or not 0 < count <= _MOST_ROWS:
                raise CannotScoreError(f"{len(rows)} bytes are not rows of {self._row_bytes}")
            array = self._arrays[len(rows)] = (
                b'{"data": [%d, true], "shape": [%d, %d], "typestr": "<f4", "version": 3}'
                % (ctypes.addressof(self._rows), count, self._row_bytes // 4)
            )
        ctypes.memmove(self._rows, rows, len(rows))
        self._done(self._library.XGBoosterPredictFromDense(self._booster, array, _PREDICTION, None, *self._results))
        # A copy: the memory is the library's, until the next call.
        return np.frombuffer(ctypes.string_at(self._margins, 4 * (len(rows) // self._row_bytes)), dtype=np.float32)

    def _done(self, status: int) -> None:
        if status != 0:
            said = self._library.XGBGetLastError().decode(errors="replace")
            raise CannotScoreError(f"XGBoost: {said.strip().partition(chr(10))[0]}")


@cache
def _library_path() -> Path | None:
    """XGBoost's shared library; None when the package is not installed."""
    package = importlib.util.find_spec("xgboost")
    if package is None or package.origin is None:
        return None
    name = {"darwin": "libxgboost.dylib", "win32": "xgboost.dll"}.get(sys.platform, "libxgboost.so")
    path = Path(package.origin).parent / "lib" / name
    return path if path.is_file() else None


@cache
def _libraries(path: Path) -> tuple[Any, Any]:
    """The library twice: calls of the first give up the interpreter meanwhile, calls of the second do not."""
    found = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
    for library in found:
        library.XGBGetLastError.restype = ctypes.c_char_p
    return found
