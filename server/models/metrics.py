"""The metrics of the model in the server's own process, and of when models expire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from fallback.embedded import Embedded
    from server.inference.embedded_check import EmbeddedCheck
    from server.inference.model_map import ModelMap
    from server.inference.replica import Replica
    from server.models.embedding import EmbeddedModel
    from server.models.expiry import ModelExpiry

EMBEDDED_READY: Final = Gauge(
    "pretrade_embedded_ready", "1 while the champion's own version is loaded here.", ("model",)
)
EMBEDDED_LOADS: Final = Counter(
    "pretrade_embedded_loads",
    "Attempts to load a version: loaded, or refused before it answered anything.",
    ("model", "fate"),
)
EMBEDDED_ROWS: Final = Counter(
    "pretrade_embedded_rows", "Rows for the embedded model: scored or failed.", ("model", "fate")
)
EMBEDDED_CHECKS: Final = Counter(
    "pretrade_embedded_checks",
    "Sampled rows of the embedded model that the primary was to score too.",
    ("model", "fate"),
)
MODEL_EXPIRES_IN_SECONDS: Final = Gauge(
    "pretrade_model_expires_in_seconds",
    "Time of the market until the replica's model may not decide any more, negative once it may not; of models that"
    " expire.",
    ("replica",),
)

MODEL_REACHED: Final = Gauge(
    "pretrade_model_reached",
    "1 while the model map can give an order to the model, 0 while no rule leads to it.",
    ("model",),
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_embedded(
    models: Iterable[tuple[str, EmbeddedModel, Embedded, EmbeddedCheck]],
) -> Iterator[Metric]:
    """One scrape, of every named model."""
    ready, loads, rows, checks = (
        one.family() for one in (EMBEDDED_READY, EMBEDDED_LOADS, EMBEDDED_ROWS, EMBEDDED_CHECKS)
    )
    for name, model, stage, check in models:
        ready.add_metric((name,), model.scorer is not None)
        loads.add_metric((name, "loaded"), model.loads)
        loads.add_metric((name, "refused"), model.refused)
        rows.add_metric((name, "scored"), stage.scored)
        rows.add_metric((name, "failed"), stage.failed)
        for fate, count in check.fates.items():
            checks.add_metric((name, fate), count)
    yield from (ready, loads, rows, checks)


def of_expiry(replicas: Iterable[Replica], expiry: ModelExpiry) -> Iterator[Metric]:
    """One scrape: of replicas that have answered, once a market is known."""
    family = MODEL_EXPIRES_IN_SECONDS.family()
    for replica in replicas:
        left = None if replica.model is None else expiry.left_seconds(replica.model.expires_at)
        if left is not None:
            family.add_metric((replica.name,), left)
    yield family


def of_map(names: Iterable[str], model_map: ModelMap) -> Iterator[Metric]:
    """One scrape, of every named model."""
    family = MODEL_REACHED.family()
    for name in names:
        family.add_metric((name,), name in model_map.reached)
    yield family
