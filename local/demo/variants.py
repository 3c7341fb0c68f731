"""Versions made from another one, to try canaries with: valid archives, each different in one thing.

They are new versions in every respect: their content has another hash, and their canned scores are their own.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.models.archive import content_version
from server.models.registry import Registry

_MANIFEST: Final = "MAR-INF/MANIFEST.json"
_LATE: Final = """

import time

_handle = ModelHandler.handle


def _handle_late(self, requests, context):
    time.sleep({seconds!r})
    return _handle(self, requests, context)


ModelHandler.handle = _handle_late
"""


def recalibrated(registry: Registry, version: str, factor: float = 1.02) -> str:
    """The same model, a little surer of itself: as good as the other for all that can be seen. Returns its version."""
    return _variant(registry, version, lambda metadata: _scale(metadata, factor))


def inverted(registry: Registry, version: str) -> str:
    """Scores of 1 - s: what comes of a label whose sign was mixed up. Returns its version."""
    return _variant(registry, version, lambda metadata: _scale(metadata, -1.0))


def late(registry: Registry, version: str, seconds: float) -> str:
    """The same scores, so much later. Returns its version."""
    return _variant(registry, version, lambda metadata: None, _LATE.format(seconds=seconds))


def _scale(metadata: dict[str, Any], factor: float) -> None:
    """Multiplies the calibrated log odds, and recomputes the canned scores. The band was one of other scores."""
    metadata.pop("band", None)
    calibration, canned = metadata["calibration"], metadata["canned"]
    calibration["slope"] *= factor
    calibration["intercept"] *= factor
    scores = np.array(canned["scores"], dtype=np.float64)
    with np.errstate(divide="ignore"):  # a score of 0 or 1 stays one
        odds = np.log(scores) - np.log1p(-scores)
    canned["scores"] = (0.5 + 0.5 * np.tanh(0.5 * factor * odds)).astype(np.float32).tolist()


def _variant(
    registry: Registry,
    version: str,
    change: Callable[[dict[str, Any]], None],
    more_code: str = "",
) -> str:
    """Writes the archive of a version with the given differences."""
    with zipfile.ZipFile(registry.path(version)) as archived:
        files = {name: archived.read(name) for name in archived.namelist()}
    metadata = json.loads(files["metadata.json"])
    change(metadata)
    files["metadata.json"] = json.dumps(metadata, sort_keys=True, indent=2).encode()
    files["handler.py"] = files["handler.py"] + more_code.encode()
    new = content_version(files[name] for name in ("handler.py", "metadata.json", "weights.bin"))
    manifest = json.loads(files[_MANIFEST])
    manifest["model"]["modelVersion"] = new
    files[_MANIFEST] = json.dumps(manifest, indent=2).encode()
    path: Path = registry.path(new)
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archived:
        for name, content in files.items():
            archived.writestr(name, content)
    partial.replace(path)
    return new
