"""Metrics of the processes that ship the audit and of those that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.audit.reading.reading import Reading, ReadingProcess
    from server.audit.shipping.shipper import Shipper
    from server.audit.watch import AuditWatch

SHIPPER_UNSHIPPED: Final = Gauge(
    "pretrade_shipper_unshipped", "Durable journal entries not yet in SQL; each holds the decisions of a commit."
)
SHIPPER_OUTAGES: Final = Counter("pretrade_shipper_outages", "Times shipping began to fail.")
SHIPPER_RESTARTS: Final = Counter("pretrade_shipper_restarts", "Times the shipping process was replaced.")
TOPIC_UNPUBLISHED: Final = Gauge("pretrade_topic_unpublished", "Durable journal entries not yet on the topic.")
TOPIC_OUTAGES: Final = Counter("pretrade_topic_outages", "Times publishing began to fail.")
TOPIC_RESTARTS: Final = Counter("pretrade_topic_restarts", "Times the publishing process was replaced.")
TOPIC_SKIPPED: Final = Counter(
    "pretrade_topic_skipped", "Entries that left the journal unpublished, because it was half full."
)
READER_QUESTIONS: Final = Counter(
    "pretrade_reader_questions", "Questions to the processes that read the audit, by kind.", ("question",)
)
READER_ENDED: Final = Counter("pretrade_reader_ended", "Times a process that reads the audit ended.", ("reader",))
READER_WAITING: Final = Gauge("pretrade_reader_waiting", "Questions that have no answer yet, by kind.", ("question",))
AUDIT_CHECKS_FAILED: Final = Counter(
    "pretrade_audit_checks_failed", "Looks at labels and journals that failed: their metrics are missing then."
)
CALIBRATION_ERROR: Final = Gauge(
    "pretrade_calibration_error",
    "Mean distance of the champion's score and of the share that was eligible by its labels, by bin of the score.",
    ("model",),
)
CALIBRATION_LIMIT: Final = Gauge(
    "pretrade_calibration_error_limit",
    "What the error of a calibrated model exceeds once in a thousand comparisons.",
    ("model",),
)
CALIBRATION_PREDICTED: Final = Gauge(
    "pretrade_calibration_predicted_ratio", "Mean score of the champion's labelled decisions.", ("model",)
)
CALIBRATION_OBSERVED: Final = Gauge(
    "pretrade_calibration_observed_ratio", "Share of the champion's labelled decisions that was eligible.", ("model",)
)
CALIBRATION_INDEPENDENT: Final = Gauge(
    "pretrade_calibration_independent", "Labelled decisions, those that share their outcome counted once.", ("model",)
)
LABEL_LAG: Final = Gauge(
    "pretrade_label_lag_seconds", "From the newest decision with a label to the newest decision; none without a label."
)
STRANDED: Final = Gauge(
    "pretrade_journal_stranded_entries", "Journal entries that are not in SQL and whose journal no process writes."
)
DESERTED: Final = Gauge(
    "pretrade_journal_deserted",
    "Journals that SQL knows, that were never closed, and of which no server has said anything for 15 minutes.",
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_shipping(shipper: Shipper) -> Iterator[Metric]:
    """One scrape."""
    yield SHIPPER_UNSHIPPED.family(shipper.unshipped)
    yield SHIPPER_OUTAGES.family(shipper.outages)
    yield SHIPPER_RESTARTS.family(shipper.restarts)
    if (topic := shipper.topic) is not None:
        yield TOPIC_UNPUBLISHED.family(topic.behind)
        yield TOPIC_OUTAGES.family(topic.outages)
        yield TOPIC_RESTARTS.family(topic.restarts)
        yield TOPIC_SKIPPED.family(topic.skipped)


def of_reading(processes: Sequence[ReadingProcess], questions: Sequence[Reading]) -> Iterator[Metric]:
    """One scrape."""
    asked, ended, waiting = (family.family() for family in (READER_QUESTIONS, READER_ENDED, READER_WAITING))
    for one in questions:
        asked.add_metric((one.name,), one.asked)
        waiting.add_metric((one.name,), one.waiting)
    for process in processes:
        ended.add_metric((process.name,), process.ended)
    yield from (asked, ended, waiting)


def of_watch(watch: AuditWatch) -> Iterator[Metric]:
    """One scrape of what the audit says of itself."""
    yield AUDIT_CHECKS_FAILED.family(watch.failures)
    newest = watch.newest
    if newest is None:
        return
    figures = {
        gauge: gauge.family()
        for gauge in (
            CALIBRATION_ERROR,
            CALIBRATION_LIMIT,
            CALIBRATION_PREDICTED,
            CALIBRATION_OBSERVED,
            CALIBRATION_INDEPENDENT,
        )
    }
    for model, one in newest.calibrations.items():
        figures[CALIBRATION_ERROR].add_metric((model,), one.error)
        figures[CALIBRATION_PREDICTED].add_metric((model,), one.predicted)
        figures[CALIBRATION_OBSERVED].add_metric((model,), one.observed)
        figures[CALIBRATION_INDEPENDENT].add_metric((model,), one.independent)
        if one.HasField("limit"):
            figures[CALIBRATION_LIMIT].add_metric((model,), one.limit)
    yield from figures.values()
    if newest.HasField("label_lag_seconds"):
        yield LABEL_LAG.family(newest.label_lag_seconds)
    yield STRANDED.family(sum(newest.stranded.values()))
    yield DESERTED.family(len(newest.deserted))
