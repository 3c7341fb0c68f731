"""The archive of a model that takes a guest's feature set, made as training makes archives."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1
from server.models.archive import Archive, content_version, read_archive
from server.models.registry import VERSIONS, Registry
from torchserve import handler

MANIFEST = "MAR-INF/MANIFEST.json"


def rows_of(feature_set: FeatureSet, n: int) -> NDArray[np.float32]:
    """Some rows within what the set's definition leaves possible."""
    drawn = np.random.default_rng(3).normal(size=(n, len(feature_set))).astype(np.float32)
    return np.clip(drawn, feature_set.lowest, feature_set.highest)


def write_guest_model(feature_set: FeatureSet, path: Path, name: str = "champion") -> Archive:
    """Boosted trees that look at all features of a set, in an archive."""
    import xgboost  # noqa: PLC0415  most tests need none

    rows = rows_of(feature_set, 500)
    trees = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 3, "nthread": 1, "seed": 1},
        xgboost.DMatrix(rows, label=rows.sum(axis=1) > 0),
        num_boost_round=8,
    )
    weights = bytes(trees.save_raw("ubj"))
    margin = handler.xgboost_margin(weights)
    canned = rows[:4]
    scores = handler.calibrated(margin(canned), 1.0, 0.0)
    metadata: dict[str, Any] = {
        "name": name,
        "kind": "xgboost",
        "feature_set": feature_set.id,
        "feature_set_fingerprint": feature_set.fingerprint,
        "feature_names": list(feature_set.names),
        "threshold": 0.5,
        "calibration": {"slope": 1.0, "intercept": 0.0},
        "network": None,
        "expires_at": 0,
        "canned": {
            "rows": base64.b64encode(canned.astype(ROW).tobytes()).decode(),
            "scores": [float(score) for score in scores],
        },
    }
    source = Path(handler.__file__).read_bytes()
    packed = json.dumps(metadata, sort_keys=True).encode()
    version = content_version((source, packed, weights))
    manifest = {"model": {"modelName": name, "handler": handler.HANDLER_FILE, "modelVersion": version}}
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in (
            (handler.HANDLER_FILE, source),
            (handler.METADATA_FILE, packed),
            (handler.WEIGHTS_FILE, weights),
            (MANIFEST, json.dumps(manifest).encode()),
        ):
            archive.writestr(part, content)
    return read_archive(path)


def registry_with_one(root: Path) -> Registry:
    """A registry in `root` with one version, of boosted trees on `mf1`."""
    (root / VERSIONS).mkdir()
    archive = write_guest_model(MF1, root / "new.mar")
    (root / "new.mar").rename(root / VERSIONS / f"{archive.version}.mar")
    return Registry(root)
