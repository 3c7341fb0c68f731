"""The wire format between pretrade and its TorchServe handler.

A request carries rows of little-endian float32 in the entry `input`, and the feature set that they belong to in the
entry `feature_set`, so that a model refuses rows it was not trained on. The answer is a 32-byte header, little-endian::

    magic "PTS1" | rows u32 | version 8 bytes | threshold f32 | feature-set fingerprint u32 | expires_at u64

and one calibrated float32 score a row. An ensemble says "PTS2", and after its scores what its parts say::

    n_parts u32 | n_parts times: version 8 bytes, weight f64 | scores f32[rows, n_parts]

Source: `torchserve/handler.py`; a contract test compares both.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fallback.order import Part
from feature_cache import feature_sets
from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1
from pretrade.wire.torchserve import inference_pb2
from server.inference.outcome import BatchFailedError, Outcome

_HEADER: Final = struct.Struct("<4sI8sfIQ")
_MAGIC: Final = b"PTS1"
_MAGIC_OF_PARTS: Final = b"PTS2"
_N_PARTS: Final = struct.Struct("<I")
_PART: Final = struct.Struct("<8sd")
_MOST_PARTS: Final = 12
"""As in the handler."""
LAST_EXPIRY: Final = 2**63 - 1
"""What the audit can hold. With a later one no decision of the model could be written down."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model answered, and what it says about itself."""

    name: str
    version: str
    """First 16 hex digits of its content hash."""
    threshold: float
    """TRADE at or above it; in [0, 1]."""
    expires_at: int
    """Unix seconds; 0 for never."""
    feature_set: FeatureSet = MF1
    """That its rows are of."""
    parts: tuple[Part, ...] = ()
    """Of an ensemble."""


@dataclass(frozen=True, slots=True)
class ScoreBatch:
    """The answer to one batch."""

    model: ModelIdentity
    scores: NDArray[np.float32]
    """float32[rows]; not yet checked."""
    of_parts: NDArray[np.float32] | None = None
    """Of an ensemble: float32[rows, parts], in [0, 1] where the row's score is."""


def request(
    model_name: str, rows: list[bytes], version: str = "", feature_set: FeatureSet = MF1
) -> inference_pb2.PredictionsRequest:
    """The request for a batch, of one version or of the default one.

    Each row is a vector of the set as little-endian float32, turned for its order's side.
    """
    entries = {"input": b"".join(rows), "feature_set": b"%08x" % feature_set.fingerprint}
    return inference_pb2.PredictionsRequest(model_name=model_name, model_version=version, input=entries)


def parse_answer(model_name: str, n_rows: int, answer: bytes) -> ScoreBatch:
    """Parses the answer to a batch of `n_rows`. Its cost is bounded by `n_rows`, whatever the answer holds.

    Raises:
        BatchFailedError: BAD_ANSWER, with what is wrong.
    """
    end = _HEADER.size + 4 * n_rows
    has_parts = answer.startswith(_MAGIC_OF_PARTS)
    if len(answer) < end or (len(answer) > end and not has_parts):
        raise BatchFailedError(Outcome.BAD_ANSWER, f"{len(answer)} bytes for {n_rows} rows, expected {end}")
    magic, rows, version, threshold, fingerprint, expires_at = _HEADER.unpack_from(answer)
    if magic not in (_MAGIC, _MAGIC_OF_PARTS) or rows != n_rows:
        raise BatchFailedError(Outcome.BAD_ANSWER, f"magic {magic!r} and {rows} rows for {n_rows}")
    feature_set = feature_sets.by_fingerprint(fingerprint)
    if feature_set is None:
        raise BatchFailedError(
            Outcome.BAD_ANSWER, f"feature set {fingerprint:08x} is not known here: {feature_sets.names()}"
        )
    if not 0.0 <= threshold <= 1.0:
        raise BatchFailedError(Outcome.BAD_ANSWER, f"threshold {threshold}")
    if expires_at > LAST_EXPIRY:
        raise BatchFailedError(Outcome.BAD_ANSWER, f"expires at {expires_at}")
    # The threshold is compared as the float32 the model was exported with, like the scores.
    scores = np.frombuffer(answer, dtype=ROW, count=n_rows, offset=_HEADER.size)
    parts, of_parts = _parts(answer, end, scores) if has_parts else ((), None)
    return ScoreBatch(
        ModelIdentity(model_name, version.hex(), threshold, expires_at, feature_set, parts), scores, of_parts
    )


def _parts(answer: bytes, at: int, scores: NDArray[np.float32]) -> tuple[tuple[Part, ...], NDArray[np.float32]]:
    """The parts of an ensemble, and what they say: what stands in an answer from a place on.

    Raises:
        BatchFailedError: BAD_ANSWER, with what is wrong.
    """
    count = _N_PARTS.unpack_from(answer, at)[0] if len(answer) >= at + _N_PARTS.size else 0
    each, rows = at + _N_PARTS.size, len(scores)
    start = each + _PART.size * count
    if not 0 < count <= _MOST_PARTS or len(answer) != start + 4 * rows * count:
        raise BatchFailedError(Outcome.BAD_ANSWER, f"{len(answer)} bytes for {rows} rows of {count} parts")
    parts = tuple(Part(version.hex(), weight) for version, weight in _PART.iter_unpack(answer[each:start]))
    of_parts = np.frombuffer(answer, dtype=ROW, offset=start).reshape(rows, count)
    usable = (scores >= 0) & (scores <= 1)
    if not ((of_parts >= 0) & (of_parts <= 1))[usable].all() or not all(math.isfinite(one.weight) for one in parts):
        raise BatchFailedError(Outcome.BAD_ANSWER, "a score of a part is not from 0 to 1, or a weight is not finite")
    return parts, of_parts
