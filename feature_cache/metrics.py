"""What a metric is, and how those of a process are served.

Each component declares its metrics beside the code that yields them. A scrape and `docs/metrics.md` show exactly what
is declared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


@dataclass(frozen=True, slots=True)
class _Declared:
    name: str
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The base unit, which the name ends with where there is one."""
        suffix = self.name.rsplit("_", 1)[-1]
        return suffix if suffix in {"seconds", "bytes"} else "0 or 1" if self.meaning.startswith("1 ") else "count"


@dataclass(frozen=True, slots=True)
class Counter(_Declared):
    """Only grows while the process lives."""

    kind: ClassVar[str] = "counter"

    @property
    def scraped_name(self) -> str:
        """What a query calls it."""
        return f"{self.name}_total"

    def family(self, value: float | None = None) -> CounterMetricFamily:
        """Its family, with its only sample where there are no labels."""
        return CounterMetricFamily(self.name, self.meaning, value, None if value is not None else self.labels)


@dataclass(frozen=True, slots=True)
class Gauge(_Declared):
    """Goes up and down."""

    kind: ClassVar[str] = "gauge"

    @property
    def scraped_name(self) -> str:
        """What a query calls it."""
        return self.name

    def family(self, value: float | None = None) -> GaugeMetricFamily:
        """Its family, with its only sample where there are no labels."""
        return GaugeMetricFamily(self.name, self.meaning, value, None if value is not None else self.labels)


@dataclass(frozen=True, slots=True)
class Histogram(_Declared):
    """Counts of observations by bucket; a time's buckets are the budgets."""

    edges: tuple[float, ...] = ()
    """Upper edges of its buckets where it is no time."""

    kind: ClassVar[str] = "histogram"

    @property
    def scraped_name(self) -> str:
        """What a query calls it, before `_bucket`, `_sum` and `_count`."""
        return self.name

    def family(self) -> HistogramMetricFamily:
        """Its family, still empty."""
        return HistogramMetricFamily(self.name, self.meaning, labels=self.labels)


Declaration = Counter | Gauge | Histogram


def declared(module: Mapping[str, object]) -> tuple[Declaration, ...]:
    """The metrics that a module declares at its top, in their order."""
    return tuple(each for each in module.values() if isinstance(each, Counter | Gauge | Histogram))
