"""Every metric of the decision server.

The decision path only adds to plain integers; the Prometheus families are built when somebody scrapes.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from pretrade.decision.v1 import decision_pb2 as pb
from server.inference.breaker import State

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from fallback.chain import Chain
    from fallback.order import Case
    from feature_cache.l1 import FeatureCache
    from server.admission import Admission
    from server.audit.journal import Journal
    from server.audit.shipper import Shipper
    from server.control.state import ControlState
    from server.idempotency import IdempotencyWindow
    from server.inference.champion import Champion
    from server.inference.replica import Replica
    from server.inference.shadow import Shadow
    from server.loop_lag import LoopLag

LATENCY_EDGES_SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.010, 0.025, 0.050, 0.100, 0.250, 1.0)
"""Bucket edges; the budgets people ask about are edges, so that a share within a budget is exact."""

_STATES: Final = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


class Histogram:
    """Counts of observed seconds by bucket, and their sum."""

    __slots__ = ("_counts", "_sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_EDGES_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Adds one observation."""
        self._counts[bisect_left(LATENCY_EDGES_SECONDS, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative (upper edge, count) pairs and the sum, as Prometheus wants them."""
        total, pairs = 0, []
        for edge, count in zip((*map(str, LATENCY_EDGES_SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            pairs.append((edge, float(total)))
        return pairs, self._sum


class DecisionMetrics:
    """What the decision path counts."""

    def __init__(self) -> None:
        self.decisions: Counter[tuple[int, int]] = Counter()
        """By (source, action)."""
        self.reasons: Counter[int] = Counter()
        self.degradations: Counter[int] = Counter()
        self.latency = Histogram()
        """Arrival to the reply's hand-over."""
        self.stages: dict[int, Histogram] = {stage: Histogram() for stage in pb.Stage.values()}
        """Seconds used, by stage."""
        self.allowances: dict[int, Histogram] = {stage: Histogram() for stage in pb.Stage.values()}
        """Seconds allowed, by stage."""
        self.skips: Counter[tuple[int, int]] = Counter()
        """By (stage, why it was passed over)."""
        self.commits = Histogram()
        """Journal commits."""
        self.loop_lag = Histogram()
        """Delays of a timer of the event loop."""
        self.late = 0
        """Calls that ended DEADLINE_EXCEEDED."""
        self.cancelled = 0
        """Calls whose caller had gone before the reply."""
        self.errors: Counter[str] = Counter()
        """Calls that got no decision, by reason."""

    def observe(self, case: Case, decision: pb.Decision, now: float) -> None:
        """Counts one decision that is about to be sent."""
        self.decisions[decision.source, decision.action] += 1
        for reason in decision.reasons:
            self.reasons[reason] += 1
        for degradation in case.degradations:
            self.degradations[degradation] += 1
        self.latency.observe(now - case.budget.arrived)
        for stage, allowed, used, skipped in case.budget.uses:
            if skipped:
                self.skips[stage, skipped] += 1
            else:
                self.stages[stage].observe(used)
                self.allowances[stage].observe(allowed)

    def by_source(self) -> dict[str, int]:
        """Decisions by source, every source named."""
        counts = {pb.Source.Name(source).removeprefix("SOURCE_"): 0 for source in pb.Source.values() if source}
        for (source, _), count in self.decisions.items():
            counts[pb.Source.Name(pb.Source.ValueType(source)).removeprefix("SOURCE_")] += count
        return counts


class ServerCollector(Collector):
    """Builds the metric families from the components' plain counters."""

    def __init__(
        self,
        *,
        decisions: DecisionMetrics,
        admission: Admission,
        idempotency: IdempotencyWindow,
        loop_lag: LoopLag,
        control: ControlState,
        champion: Champion,
        chain: Chain,
        restarts: int,
        replicas: tuple[Replica, ...],
        shadow: Shadow,
        journal: Journal,
        shipper: Shipper,
        feature_cache: FeatureCache,
        instruments: tuple[str, ...],
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._decisions = decisions
        self._admission = admission
        self._idempotency = idempotency
        self._loop_lag = loop_lag
        self._control = control
        self._champion = champion
        self._chain = chain
        self._restarts = restarts
        self._replicas = replicas
        self._shadow = shadow
        self._journal = journal
        self._shipper = shipper
        self._feature_cache = feature_cache
        self._instruments = instruments
        self._clock = clock
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        """One scrape, on a thread of its own: counters to which the event loop may add a key are copied in one step."""
        yield from self._decision_families()
        yield from self._replica_families()
        yield from self._attempt_families()
        yield from self._shadow_families()
        yield from self._control_families()
        yield from self._journal_families()
        yield from self._feature_families()
        yield GaugeMetricFamily(
            "pretrade_event_loop_tasks", "Tasks of the event loop: a leak grows.", len(asyncio.all_tasks(self._loop))
        )

    def _decision_families(self) -> Iterator[Metric]:
        metrics = self._decisions
        decisions = CounterMetricFamily("pretrade_decisions", "Decisions sent.", labels=("source", "action"))
        for (source, action), count in metrics.decisions.copy().items():
            decisions.add_metric((_short(pb.Source, source), _short(pb.Action, action)), count)
        yield decisions
        yield _counter("pretrade_decision_reasons", "Reasons of decisions.", "reason", pb.ReasonCode, metrics.reasons)
        yield _counter(
            "pretrade_degradations", "Degradations of decisions.", "degradation", pb.Degradation, metrics.degradations
        )
        latency = HistogramMetricFamily("pretrade_decision_seconds", "Arrival to hand-over of the reply.")
        latency.add_metric((), *metrics.latency.buckets())
        yield latency
        for name, documentation, histograms in (
            ("pretrade_stage_seconds", "Time used by a stage.", metrics.stages),
            ("pretrade_stage_allowed_seconds", "Time allowed to a stage.", metrics.allowances),
        ):
            stages = HistogramMetricFamily(name, documentation, labels=("stage",))
            for stage, histogram in histograms.items():
                if stage:
                    stages.add_metric((_short(pb.Stage, stage),), *histogram.buckets())
            yield stages
        skips = CounterMetricFamily("pretrade_stage_skips", "Stages passed over.", labels=("stage", "reason"))
        for (stage, why), count in metrics.skips.copy().items():
            skips.add_metric((_short(pb.Stage, stage), _short(pb.Degradation, why)), count)
        yield skips
        broken = CounterMetricFamily("pretrade_stage_broken", "Stages that broke off with a bug.", labels=("stage",))
        for name, count in self._chain.broken.copy().items():
            broken.add_metric((name,), count)
        yield broken
        yield CounterMetricFamily("pretrade_late", "Calls that ended DEADLINE_EXCEEDED.", metrics.late)
        yield CounterMetricFamily("pretrade_cancelled", "Calls whose caller had gone.", metrics.cancelled)
        errors = CounterMetricFamily("pretrade_errors", "Calls that got no decision.", labels=("reason",))
        for reason, count in metrics.errors.copy().items():
            errors.add_metric((reason,), count)
        yield errors
        yield GaugeMetricFamily("pretrade_in_flight", "Decisions under way.", self._admission.in_flight)
        yield GaugeMetricFamily("pretrade_admission_limit", "Decisions that may be under way.", self._admission.limit)
        yield CounterMetricFamily("pretrade_shed", "Calls refused by admission.", self._admission.shed)
        yield CounterMetricFamily("pretrade_idempotent_repeats", "Calls answered again.", self._idempotency.repeated)

    def _replica_families(self) -> Iterator[Metric]:
        outcomes = CounterMetricFamily(
            "pretrade_replica_batches", "Batches and probes by outcome.", labels=("replica", "outcome")
        )
        rows = CounterMetricFamily("pretrade_replica_rows", "Rows scored.", labels=("replica",))
        splits = CounterMetricFamily(
            "pretrade_replica_splits", "Batches that failed as a whole and were sent in parts.", labels=("replica",)
        )
        displaced = CounterMetricFamily(
            "pretrade_replica_displaced_rows", "Canary rows given up for live ones.", labels=("replica",)
        )
        in_flight = GaugeMetricFamily(
            "pretrade_replica_in_flight", "Batches in flight, abandoned ones included.", labels=("replica",)
        )
        abandoned = GaugeMetricFamily("pretrade_replica_abandoned", "Batches given up.", labels=("replica",))
        queued = GaugeMetricFamily("pretrade_replica_queued_rows", "Rows waiting.", labels=("replica",))
        state = GaugeMetricFamily("pretrade_breaker_state", "0 closed, 1 half-open, 2 open.", labels=("replica",))
        transitions = CounterMetricFamily(
            "pretrade_breaker_transitions", "Breaker transitions by state entered.", labels=("replica", "state")
        )
        healthy = GaugeMetricFamily("pretrade_replica_healthy", "1 while probes succeed.", labels=("replica",))
        p95 = GaugeMetricFamily("pretrade_replica_p95_seconds", "Recent p95 of a batch.", labels=("replica",))
        for replica in self._replicas:
            name = (replica.name,)
            for outcome, count in replica.outcomes.copy().items():
                outcomes.add_metric((replica.name, outcome.value), count)
            for entered, count in replica.transitions.copy().items():
                transitions.add_metric((replica.name, entered.value), count)
            rows.add_metric(name, replica.batcher.rows)
            splits.add_metric(name, replica.batcher.splits)
            displaced.add_metric(name, replica.batcher.displaced)
            in_flight.add_metric(name, replica.batcher.in_flight)
            abandoned.add_metric(name, replica.batcher.abandoned)
            queued.add_metric(name, replica.batcher.queued)
            state.add_metric(name, _STATES[replica.breaker.state])
            healthy.add_metric(name, replica.healthy)
            p95.add_metric(name, replica.latency.p95)
        yield from (outcomes, rows, splits, displaced, in_flight, abandoned, queued, state, transitions, healthy, p95)

    def _attempt_families(self) -> Iterator[Metric]:
        attempts = CounterMetricFamily(
            "pretrade_attempts", "Model attempts of orders by outcome.", labels=("replica", "outcome")
        )
        for (replica, outcome), count in self._champion.attempts.copy().items():
            attempts.add_metric((replica, outcome.value), count)
        second = CounterMetricFamily(
            "pretrade_second_attempts", "Second model attempts: retries and hedges.", labels=("kind", "fate")
        )
        for (kind, fate), count in self._champion.second_attempts.copy().items():
            second.add_metric((kind, fate), count)
        yield from (attempts, second)

    def _shadow_families(self) -> Iterator[Metric]:
        shadow = self._shadow
        rows = CounterMetricFamily("pretrade_shadow_rows", "Rows for the challenger by fate.", labels=("fate",))
        for fate, count in shadow.fates().items():
            rows.add_metric((fate,), count)
        yield rows

    def _control_families(self) -> Iterator[Metric]:
        control = self._control
        yield GaugeMetricFamily("pretrade_control_version", "Version of the control state in force.", control.version)
        yield CounterMetricFamily("pretrade_control_reloads", "Changes by other processes.", control.reloads)
        yield CounterMetricFamily("pretrade_control_write_failures", "Failed writes.", control.write_failures)
        lag = HistogramMetricFamily("pretrade_loop_lag_seconds", "Delay of a timer of the event loop, every 20 ms.")
        lag.add_metric((), *self._decisions.loop_lag.buckets())
        yield lag
        yield CounterMetricFamily("pretrade_loop_stalls", "Delays of more than 20 ms.", self._loop_lag.stalls)
        yield CounterMetricFamily(
            "pretrade_process_restarts", "Times a process in this place ended by itself.", self._restarts
        )

    def _journal_families(self) -> Iterator[Metric]:
        journal = self._journal
        yield GaugeMetricFamily("pretrade_journal_writable", "1 while rows are made durable.", journal.writable)
        yield CounterMetricFamily("pretrade_journal_rows", "Rows made durable.", journal.written)
        yield CounterMetricFamily("pretrade_journal_refused", "Rows not made durable.", journal.refused)
        yield CounterMetricFamily("pretrade_journal_outages", "Times it became unwritable.", journal.outages)
        yield GaugeMetricFamily("pretrade_journal_bytes", "What the rows of the journal fill.", journal.bytes)
        yield GaugeMetricFamily("pretrade_journal_full", "1 while the rows fill all that they may.", journal.full)
        yield GaugeMetricFamily("pretrade_journal_depth", "Rows waiting for the writer.", journal.depth)
        commits = HistogramMetricFamily("pretrade_journal_commit_seconds", "Time of a group commit.")
        commits.add_metric((), *self._decisions.commits.buckets())
        yield commits
        shipper = self._shipper
        yield GaugeMetricFamily("pretrade_shipper_unshipped", "Durable rows not yet in SQL.", shipper.unshipped)
        yield CounterMetricFamily("pretrade_shipper_outages", "Times shipping began to fail.", shipper.outages)
        yield CounterMetricFamily("pretrade_shipper_restarts", "Times its process was replaced.", shipper.restarts)

        if (topic := shipper.topic) is not None:
            yield GaugeMetricFamily("pretrade_topic_unpublished", "Durable rows not yet on the topic.", topic.behind)
            yield CounterMetricFamily("pretrade_topic_outages", "Times publishing began to fail.", topic.outages)
            yield CounterMetricFamily("pretrade_topic_restarts", "Times its process was replaced.", topic.restarts)
            yield CounterMetricFamily("pretrade_topic_skipped", "Rows trimmed before.", topic.skipped)

    def _feature_families(self) -> Iterator[Metric]:
        age = GaugeMetricFamily("pretrade_feature_age_seconds", "Age from event time.", labels=("instrument",))
        now = self._clock()
        for instrument in self._instruments:
            entry = self._feature_cache.get(instrument)
            if entry is not None:
                age.add_metric((instrument,), entry.age_seconds(now))
        yield age
        yield GaugeMetricFamily(
            "pretrade_feature_cache_connected", "1 while Redis answers.", self._feature_cache.connected
        )


def _short(enum: object, value: int) -> str:
    """An enum value's name without its prefix, for example `PRIMARY`."""
    wrapper = enum
    name: str = wrapper.Name(value)  # type: ignore[attr-defined]  # every enum wrapper of protobuf has it
    prefix: str = wrapper.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")  # type: ignore[attr-defined]
    return name.removeprefix(prefix)


def _counter(name: str, documentation: str, label: str, enum: object, counts: Counter[int]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for value, count in counts.copy().items():
        family.add_metric((_short(enum, value),), count)
    return family
