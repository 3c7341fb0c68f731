"""Metrics of the processes that ship the audit and of those that read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.audit.reading.reading import Reading, ReadingProcess
    from server.audit.shipping.shipper import Shipper

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
