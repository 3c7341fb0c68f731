"""The metrics of the event loop's own delays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Histogram, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.timing.loop_lag import LoopLag

LOOP_LAG_SECONDS: Final = Histogram("pretrade_loop_lag_seconds", "Delay of a timer of the event loop, every 20 ms.")
LOOP_STALLS: Final = Counter("pretrade_loop_stalls", "Delays of more than 20 ms.")

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_loop_lag(loop_lag: LoopLag) -> Iterator[Metric]:
    """One scrape."""
    lag = LOOP_LAG_SECONDS.family()
    lag.add_metric((), *loop_lag.delays.buckets())
    yield lag
    yield LOOP_STALLS.family(loop_lag.stalls)
