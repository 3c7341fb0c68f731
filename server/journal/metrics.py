"""The metrics of the journal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, Histogram, declared
from server.timing.histogram import ROW_EDGES

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.journal.journal import Journal

JOURNAL_WRITABLE: Final = Gauge("pretrade_journal_writable", "1 while entries are made durable.")
JOURNAL_ROWS: Final = Counter("pretrade_journal_rows", "Decisions and other entries made durable.")
JOURNAL_REFUSED: Final = Counter("pretrade_journal_refused", "Decisions and other entries not made durable.")
JOURNAL_OUTAGES: Final = Counter("pretrade_journal_outages", "Times the journal began to refuse decisions.")
JOURNAL_BYTES: Final = Gauge("pretrade_journal_bytes", "What the entries of the journal fill on disk.")
JOURNAL_LIMIT_BYTES: Final = Gauge(
    "pretrade_journal_limit_bytes", "What they may fill: what the settings allow and the volume has left."
)
JOURNAL_FULL: Final = Gauge("pretrade_journal_full", "1 while the entries fill all that they may.")
JOURNAL_DEPTH: Final = Gauge("pretrade_journal_depth", "Decisions and other entries waiting for the writer.")
JOURNAL_COMMIT_SECONDS: Final = Histogram("pretrade_journal_commit_seconds", "Time of a group commit, fsync included.")
JOURNAL_COMMIT_ROWS: Final = Histogram(
    "pretrade_journal_commit_rows", "Decisions and other entries of a group commit.", (), ROW_EDGES
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_journal(journal: Journal) -> Iterator[Metric]:
    """One scrape."""
    yield JOURNAL_WRITABLE.family(journal.writable)
    yield JOURNAL_ROWS.family(journal.written)
    yield JOURNAL_REFUSED.family(journal.refused)
    yield JOURNAL_OUTAGES.family(journal.outages)
    yield JOURNAL_BYTES.family(journal.bytes)
    yield JOURNAL_LIMIT_BYTES.family(journal.limit_bytes)
    yield JOURNAL_FULL.family(journal.full)
    yield JOURNAL_DEPTH.family(journal.depth)
    commits = JOURNAL_COMMIT_SECONDS.family()
    commits.add_metric((), *journal.commits.buckets())
    yield commits
    rows = JOURNAL_COMMIT_ROWS.family()
    rows.add_metric((), *journal.commit_rows.buckets())
    yield rows
