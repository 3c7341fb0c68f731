"""The metrics of a server process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PROCESS_RESTARTS: Final = Counter("pretrade_process_restarts", "Times that the process in this slot ended by itself.")
EDGE: Final = Gauge("pretrade_edge", "1 for the edge that the calls pass.", ("edge",))
EVENT_LOOP_TASKS: Final = Gauge("pretrade_event_loop_tasks", "Tasks of the event loop: a leak grows.")

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_process(restarts: int, edge: str, loop: asyncio.AbstractEventLoop) -> Iterator[Metric]:
    """One scrape.

    Args:
        restarts: Times that the process in this slot ended by itself.
        edge: `envoy` or `grpcio`.
        loop: The process's event loop.
    """
    yield PROCESS_RESTARTS.family(restarts)
    edges = EDGE.family()
    edges.add_metric((edge,), 1.0)
    yield edges
    yield EVENT_LOOP_TASKS.family(len(asyncio.all_tasks(loop)))
