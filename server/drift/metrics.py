"""The metrics of drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from pretrade.admin.v1 import admin_pb2

DRIFT_PSI: Final = Gauge(
    "pretrade_drift_psi",
    "Population stability of recent inputs, and of the score, against the model's.",
    ("model", "feature"),
)
DRIFT_LIMIT: Final = Gauge(
    "pretrade_drift_psi_limit",
    "What as many values without drift exceed once in a hundred comparisons.",
    ("model", "feature"),
)
DRIFT_UNDEFINED: Final = Gauge("pretrade_drift_undefined_ratio", "Share of undefined values.", ("model", "feature"))
DRIFT_ROWS: Final = Gauge(
    "pretrade_drift_rows", "Different inputs in the newest comparison; 0 without one.", ("model",)
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_drift(states: Mapping[str, admin_pb2.DriftStatus]) -> Iterator[Metric]:
    """One scrape of the newest comparisons, by model."""
    psi, limit, undefined, rows = (one.family() for one in (DRIFT_PSI, DRIFT_LIMIT, DRIFT_UNDEFINED, DRIFT_ROWS))
    for model, state in states.items():
        for one in state.features:
            psi.add_metric((model, one.name), one.psi)
            undefined.add_metric((model, one.name), one.undefined)
            if one.HasField("limit"):
                limit.add_metric((model, one.name), one.limit)
        rows.add_metric((model,), state.rows if state.features else 0)
    yield from (psi, limit, undefined, rows)
