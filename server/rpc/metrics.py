"""Metrics of what is asked and watched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.rpc.audit import AuditServicer
    from server.rpc.market import MarketReading
    from server.rpc.signals import Signals

DECISION_WATCHERS: Final = Gauge("pretrade_decision_watchers", "Callers who watch decisions.")
FEATURE_WATCHERS: Final = Gauge("pretrade_feature_watchers", "Callers who watch features.")
FEATURE_LOOKS_SKIPPED: Final = Counter(
    "pretrade_feature_looks_skipped", "Looks at features that were left out because a watcher did not read in time."
)
SIGNALS_INCOMPLETE: Final = Counter(
    "pretrade_signals_incomplete", "Answers of ListSignals without decisions that the audit may have, as it was away."
)
BARS_UNREADABLE: Final = Counter(
    "pretrade_bars_unreadable", "Calls of ListBars that were refused, as the database of bars could not be read."
)
BOOKS_UNREADABLE: Final = Counter("pretrade_books_unreadable", "Answers of GetBook without a book, as Redis was away.")

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_watchers(audit: AuditServicer, signals: Signals, market: MarketReading) -> Iterator[Metric]:
    """One scrape."""
    yield DECISION_WATCHERS.family(audit.watchers)
    yield FEATURE_WATCHERS.family(signals.watchers)
    yield FEATURE_LOOKS_SKIPPED.family(signals.skipped)
    yield SIGNALS_INCOMPLETE.family(signals.without_decisions)
    yield BARS_UNREADABLE.family(market.without_bars)
    yield BOOKS_UNREADABLE.family(market.without_books)
