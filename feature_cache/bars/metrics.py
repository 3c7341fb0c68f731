"""The metrics of the keeper of bars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.registry import Collector

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from feature_cache.bars.keeper import Keeper

BARS_WRITTEN: Final = Counter("pretrade_bars_written", "Bars written, those that were written again included.")
BARS_NEWEST_SECONDS: Final = Gauge(
    "pretrade_bars_newest_seconds", "Event time at which the newest bar that was written ended, since the Unix epoch."
)
BARS_PARTITIONS: Final = Gauge("pretrade_bars_partitions", "Partitions of the topic that this process holds.")
BARS_REFUSED_RECORDS: Final = Counter("pretrade_bars_refused_records", "Records that are no sound market event.")
BARS_KAFKA_FAILURES: Final = Counter("pretrade_bars_kafka_failures", "Times that the reading was interrupted.")
BARS_DATABASE_FAILURES: Final = Counter(
    "pretrade_bars_database_failures", "Times that the database refused or did not answer."
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


class BarsCollector(Collector):
    """Builds the metrics from the keeper's own counters when they are scraped."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def collect(self) -> Iterator[Metric]:
        """Every metric of the keeper."""
        keeper = self._keeper
        yield BARS_WRITTEN.family(keeper.written)
        yield BARS_NEWEST_SECONDS.family(keeper.newest_ns / 1e9)
        yield BARS_PARTITIONS.family(len(keeper.partitions))
        yield BARS_REFUSED_RECORDS.family(keeper.refused)
        yield BARS_KAFKA_FAILURES.family(keeper.interruptions)
        yield BARS_DATABASE_FAILURES.family(keeper.refusals)
