"""The metrics of replicas, of orders' attempts at them, and of shadow rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, Histogram, declared
from server.inference.breaker import State
from server.timing.histogram import ROW_EDGES

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.inference.champion import Champion
    from server.inference.replica import Replica
    from server.inference.shadow import Shadow

_STATES: Final = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}

REPLICA_BATCHES: Final = Counter("pretrade_replica_batches", "Batches and probes by outcome.", ("replica", "outcome"))
REPLICA_CALLS: Final = Counter(
    "pretrade_replica_calls",
    "Calls by the client that made them: `direct`, or `grpc` where that is not usable.",
    ("replica", "client"),
)
REPLICA_ROWS: Final = Counter("pretrade_replica_rows", "Rows scored.", ("replica",))
REPLICA_SPLITS: Final = Counter(
    "pretrade_replica_splits", "Batches that failed as a whole and were sent in parts.", ("replica",)
)
REPLICA_DISPLACED_ROWS: Final = Counter(
    "pretrade_replica_displaced_rows", "Canary rows given up for live ones.", ("replica",)
)
REPLICA_IN_FLIGHT: Final = Gauge(
    "pretrade_replica_in_flight", "Batches in flight, abandoned ones included.", ("replica",)
)
REPLICA_ROW_LIMIT: Final = Gauge("pretrade_replica_row_limit", "Rows that a batch may have now.", ("replica",))
REPLICA_ABANDONED: Final = Gauge(
    "pretrade_replica_abandoned", "Batches given up whose answer may still come.", ("replica",)
)
REPLICA_QUEUED_ROWS: Final = Gauge("pretrade_replica_queued_rows", "Rows waiting for a batch.", ("replica",))
REPLICA_HEALTHY: Final = Gauge("pretrade_replica_healthy", "1 while probes succeed.", ("replica",))
REPLICA_P95_SECONDS: Final = Gauge("pretrade_replica_p95_seconds", "Recent p95 of a batch.", ("replica",))
REPLICA_QUEUE_WAIT_SECONDS: Final = Histogram(
    "pretrade_replica_queue_wait_seconds", "Time of an order's row until its batch left.", ("replica",)
)
REPLICA_BATCH_ROWS: Final = Histogram("pretrade_replica_batch_rows", "Rows of a batch.", ("replica",), ROW_EDGES)
REPLICA_BATCH_SECONDS: Final = Histogram(
    "pretrade_replica_batch_seconds", "Time of a batch, until its answer or until it was given up.", ("replica",)
)
BREAKER_STATE: Final = Gauge("pretrade_breaker_state", "0 closed, 1 half-open, 2 open.", ("replica",))
BREAKER_TRANSITIONS: Final = Counter(
    "pretrade_breaker_transitions", "Breaker transitions by state entered.", ("replica", "state")
)
ATTEMPTS: Final = Counter("pretrade_attempts", "Model attempts of orders by outcome.", ("replica", "outcome"))
SECOND_ATTEMPTS: Final = Counter(
    "pretrade_second_attempts", "Second model attempts: retries and hedges.", ("kind", "fate")
)
SHADOW_ROWS: Final = Counter("pretrade_shadow_rows", "Rows for the challenger by fate.", ("fate",))

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_replicas(replicas: Iterable[Replica]) -> Iterator[Metric]:
    """One scrape."""
    outcomes = REPLICA_BATCHES.family()
    calls = REPLICA_CALLS.family()
    rows = REPLICA_ROWS.family()
    splits = REPLICA_SPLITS.family()
    displaced = REPLICA_DISPLACED_ROWS.family()
    in_flight = REPLICA_IN_FLIGHT.family()
    row_limit = REPLICA_ROW_LIMIT.family()
    abandoned = REPLICA_ABANDONED.family()
    queued = REPLICA_QUEUED_ROWS.family()
    state = BREAKER_STATE.family()
    transitions = BREAKER_TRANSITIONS.family()
    healthy = REPLICA_HEALTHY.family()
    p95 = REPLICA_P95_SECONDS.family()
    histograms = [
        REPLICA_QUEUE_WAIT_SECONDS.family(),
        REPLICA_BATCH_ROWS.family(),
        REPLICA_BATCH_SECONDS.family(),
    ]
    for replica in replicas:
        name = (replica.name,)
        for outcome, count in replica.outcomes.copy().items():
            outcomes.add_metric((replica.name, outcome.value), count)
        for client, count in replica.calls_by_client.items():
            calls.add_metric((replica.name, client), count)
        for entered, count in replica.transitions.copy().items():
            transitions.add_metric((replica.name, entered.value), count)
        rows.add_metric(name, replica.batcher.rows)
        splits.add_metric(name, replica.batcher.splits)
        displaced.add_metric(name, replica.batcher.displaced)
        in_flight.add_metric(name, replica.batcher.in_flight)
        row_limit.add_metric(name, replica.batcher.row_limit)
        abandoned.add_metric(name, replica.batcher.abandoned)
        queued.add_metric(name, replica.batcher.queued)
        state.add_metric(name, _STATES[replica.breaker.state])
        healthy.add_metric(name, replica.healthy)
        p95.add_metric(name, replica.latency.p95)
        batcher = replica.batcher
        counted = (batcher.queue_waits, batcher.batch_sizes, batcher.batch_times)
        for family, histogram in zip(histograms, counted, strict=True):
            family.add_metric(name, *histogram.buckets())
    yield from (
        outcomes,
        calls,
        rows,
        splits,
        displaced,
        in_flight,
        row_limit,
        abandoned,
        queued,
        state,
        transitions,
        healthy,
        p95,
    )
    yield from histograms


def of_attempts(champions: Sequence[Champion]) -> Iterator[Metric]:
    """One scrape, of all models together; the replicas' names tell theirs apart."""
    attempts = ATTEMPTS.family()
    for champion in champions:
        for (replica, outcome), count in champion.attempts.copy().items():
            attempts.add_metric((replica, outcome.value), count)
    second = SECOND_ATTEMPTS.family()
    for labels in itertools.product(("retry", "hedge"), ("granted", "refused", "won")):
        second.add_metric(labels, sum(champion.second_attempts[labels] for champion in champions))
    yield from (attempts, second)


def of_shadow(shadows: Sequence[Shadow]) -> Iterator[Metric]:
    """One scrape, of all models together."""
    rows, fates = SHADOW_ROWS.family(), [shadow.fates() for shadow in shadows]
    for fate in fates[0]:
        rows.add_metric((fate,), sum(of_model[fate] for of_model in fates))
    yield rows
