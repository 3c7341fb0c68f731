"""The metrics of the telemetry itself, and the collector that gathers those of all components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client.registry import Collector

from feature_cache.metrics import Counter, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.telemetry.tracing import CountingExporter

SPANS_EXPORTED: Final = Counter("pretrade_spans_exported", "Spans that the collector took.")
SPANS_NOT_EXPORTED: Final = Counter("pretrade_spans_not_exported", "Spans that the collector did not take in time.")

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_spans(exporter: CountingExporter | None) -> Iterator[Metric]:
    """One scrape; without values where nothing is traced."""
    yield SPANS_EXPORTED.family(None if exporter is None else exporter.exported)
    yield SPANS_NOT_EXPORTED.family(None if exporter is None else exporter.failed)


class Metrics(Collector):
    """Every metric of a server process, on the thread of the scrape.

    Args:
        components: Yields the families of one component each.
    """

    def __init__(self, components: Sequence[Callable[[], Iterator[Metric]]]) -> None:
        self._components = components

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        for component in self._components:
            yield from component()
