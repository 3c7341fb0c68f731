"""Writes a trained model as a `.mar` archive: the same model gives the same bytes.

The archive is a zip in the layout of `torch-model-archiver`, which itself stamps the time of day into every archive::

    MAR-INF/MANIFEST.json   name, version, handler, weights file
    handler.py              `torchserve/handler.py` as it is
    metadata.json           all that is known of the model except its version
    weights.bin             the weights
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final, Protocol

from feature_cache import har
from torchserve import handler, portable
from torchserve.canned import canned_scores
from torchserve.dataset import Samples
from torchserve.training import TrainedModel, TrainingSettings
from torchserve.validity import expires_at

_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
"""The oldest time a zip can hold."""
_MANIFEST: Final = "MAR-INF/MANIFEST.json"
VERSIONS_DIRECTORY: Final = "versions"
"""Folder of the store that keeps every archive ever written to it, each named by its version."""


class Weighted(Protocol):
    """What an archive is made of besides its metadata."""

    @property
    def name(self) -> str:
        """Whose place it is for."""

    @property
    def weights(self) -> bytes:
        """As its runtime reads them."""


def metadata_of(model: TrainedModel, samples: Samples, settings: TrainingSettings) -> dict[str, Any]:
    """All that is known of a model except its version, which is the hash of this too.

    Args:
        model: The model.
        samples: What it was made from.
        settings: How.
    """
    return {
        "name": model.name,
        "kind": model.kind,
        "feature_set": samples.feature_set.id,
        "feature_set_fingerprint": samples.feature_set.fingerprint,
        "feature_names": list(samples.feature_set.names),
        "label": samples.label.described,
        "threshold": model.threshold,
        "target_precision": model.target_precision,
        "target_precision_reached": model.target_precision_reached,
        "calibration": {"slope": model.slope, "intercept": model.intercept},
        "band": model.band.described,
        "domain": model.domain,
        "runtime": "xgboost" if model.network is None else "torch",
        "network": model.network,
        portable.METADATA: None if model.network is None else portable.described(model.weights, model.network),
        "trained_until": samples.until,
        "expires_at": expires_at(samples, settings.valid_days),
        "canned": canned_scores(model, samples),
        "metrics": {part: asdict(metrics) for part, metrics in model.metrics.items()},
        "reference": {name: asdict(histogram) for name, histogram in model.reference.items()},
        har.METADATA: None if model.volatility is None else asdict(model.volatility),
        "data": {
            "source": samples.source,
            "source_sha256": samples.source_sha256,
            "samples": len(samples.rows),
            "sha256": samples.sha256(),
        },
        "training": settings.model_dump(mode="json"),
        "rounds": model.rounds,
        "libraries": {name: installed_version(name) for name in ("numpy", "torch", "xgboost-cpu")},
    }


def write_archive(model: Weighted, metadata: dict[str, Any], directory: Path, *, install: bool = True) -> str:
    """Writes `versions/VERSION.mar` and `.json` (the metadata with the version), and installs them.

    Args:
        model: The model.
        metadata: See `metadata_of`.
        directory: The store, made when missing.
        install: Whether to write them as `NAME.mar` and `NAME.json`, too, which replicas of that name start with.

    Returns:
        The version: 16 hexadecimal digits.
    """
    source = Path(handler.__file__).read_bytes()
    packed = json.dumps(metadata, sort_keys=True, indent=2).encode()
    version = handler.content_version(source, packed, model.weights)
    manifest = {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {
            "modelName": model.name,
            "serializedFile": handler.WEIGHTS_FILE,
            "handler": handler.HANDLER_FILE,
            "modelVersion": version,
        },
        "archiverVersion": installed_version("torch-model-archiver"),
    }
    files = {
        handler.HANDLER_FILE: source,
        handler.METADATA_FILE: packed,
        handler.WEIGHTS_FILE: model.weights,
        _MANIFEST: json.dumps(manifest, indent=2).encode(),
    }
    described = (json.dumps({"version": version, **metadata}, indent=2) + "\n").encode()
    # Kept when `NAME.mar` is replaced: a decision may have to be recomputed long after its model was.
    kept = directory / VERSIONS_DIRECTORY / version
    written = {kept.with_suffix(".mar"): _zipped(files), kept.with_suffix(".json"): described}
    if install:
        written |= {directory / f"{model.name}{path.suffix}": content for path, content in written.items()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for path, content in written.items():
        if path.parent == kept.parent and path.exists():  # the same content, by its name
            continue
        # Written aside and renamed, so that a server which starts meanwhile never reads half an archive.
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(path)
    return version


def _zipped(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archived:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archived.writestr(entry, content)
    return packed.getvalue()
