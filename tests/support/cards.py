"""What training leaves beside a model: the figures of its card."""

from __future__ import annotations

import json
from typing import Any

from server.models.registry import CARD_FILE, CARDS, EVALUATION_FILE, Registry


def _figures(precision: float) -> dict[str, Any]:
    return {"precision": [precision, precision - 0.01, precision + 0.01], "auc": [None, None, None]}


def measure(registry: Registry, version: str, **changes: Any) -> None:
    """Leaves beside a version what training leaves: of the model, of another one of that training, and of baselines.

    Args:
        registry: Where the version is.
        version: Of a model of the kind `xgboost`.
        changes: Parts of the evaluation that are to be otherwise.
    """
    folder = registry.root / CARDS / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD_FILE).write_text("# Model card")
    measured = {
        "samples": 7_792,
        "independent": 1_560.0,
        "label": {"text": "markout over 0.5 s not worse than -1 bp"},
        "base_rate": [0.91, 0.90, 0.92],
        "figures": {
            "torch": _figures(0.8),
            "rules": _figures(0.95),
            "xgboost": _figures(0.96),
            "always trade": _figures(0.91),
        },
        "comparisons": {"xgboost": {"always trade": [0.05, 0.04, 0.06], "rules": [0.01, 0.0, 0.02]}, "torch": {}},
        "reliability": {"xgboost": [{"samples": 10, "mean_score": 0.75, "eligible": 0.7}], "torch": []},
        "standing": {"xgboost": "beats all baselines beyond chance"},
    }
    (folder / EVALUATION_FILE).write_text(json.dumps(measured | changes))
