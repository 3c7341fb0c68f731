"""Every metric of the decision server.

The decision path only adds to plain integers; the Prometheus families are built when somebody scrapes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, get_args

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from fallback.chain import StageName
from feature_cache.store.codec import BookState
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.events import TURNS
from server.canary.evidence import Verdict
from server.control.flags import FLAGS
from server.decision.reports import Cause, DecisionReports
from server.inference.breaker import State
from server.journal.reply_status import CAUSES
from server.telemetry import families
from server.timing.histogram import ROW_EDGES, Histogram

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from fallback.chain import Chain
    from fallback.order import Case
    from feature_cache.store.l1 import FeatureCache
    from server.audit.reading.reading import Reading
    from server.audit.shipping.shipper import Shipper
    from server.composition.canary import CanaryParts
    from server.configuration import Configuration
    from server.control.state import ControlState
    from server.decision.admission import Admission
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.record import Decided
    from server.decision.replies import Replies
    from server.drift.watch import DriftWatch
    from server.inference.champion import Champion
    from server.inference.replica import Replica
    from server.journal.journal import Journal
    from server.security.security import Security
    from server.telemetry.tracing import CountingExporter
    from server.timing.loop_lag import LoopLag

_STATES: Final = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


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
        """Journal commits, in seconds."""
        self.commit_rows = Histogram(ROW_EDGES)
        """Rows of a journal commit."""
        self.loop_lag = Histogram()
        """Delays of a timer of the event loop."""
        self.late = 0
        """Calls that ended DEADLINE_EXCEEDED."""
        self.cancelled = 0
        """Calls whose caller had gone before the reply."""
        self.explanations: Counter[int] = Counter()
        """Explanations asked for beside replies, by status."""
        self.errors: Counter[str] = Counter({"INTERNAL": 0})
        """Calls that got no decision, by reason."""

    def observe(self, case: Case, decided: Decided, now: float) -> None:
        """Counts one decision that is about to be sent."""
        self.decisions[decided.source, decided.action] += 1
        for reason in decided.reasons:
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

    def committed(self, rows: int, seconds: float) -> None:
        """Counts one journal commit."""
        self.commits.observe(seconds)
        self.commit_rows.observe(rows)

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
        configuration: Configuration[Any],
        champion: Champion,
        chain: Chain,
        restarts: int,
        replicas: tuple[Replica, ...],
        canary: CanaryParts,
        journal: Journal,
        replies: Replies,
        shipper: Shipper,
        reports: DecisionReports,
        exporter: CountingExporter | None,
        readings: Sequence[Reading],
        drift: DriftWatch,
        feature_cache: FeatureCache,
        instruments: tuple[str, ...],
        security: Security,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._decisions = decisions
        self._admission = admission
        self._idempotency = idempotency
        self._loop_lag = loop_lag
        self._control = control
        self._configuration = configuration
        self._champion = champion
        self._chain = chain
        self._restarts = restarts
        self._replicas = replicas
        self._canary = canary
        self._journal = journal
        self._replies = replies
        self._shipper = shipper
        self._reports = reports
        self._exporter = exporter
        self._readings = readings
        self._drift = drift
        self._feature_cache = feature_cache
        self._instruments = instruments
        self._security = security
        self._clock = clock
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        """One scrape, on a thread of its own: counters to which the event loop may add a key are copied in one step."""
        yield from self._decision_families()
        yield from self._replica_families()
        yield from self._attempt_families()
        yield from self._shadow_families()
        yield from self._canary_families()
        yield from self._control_families()
        yield from self._journal_families()
        yield from self._feature_families()
        yield from self._security.metrics()
        yield from self._telling_families()
        yield families.EVENT_LOOP_TASKS.family(len(asyncio.all_tasks(self._loop)))

    def _decision_families(self) -> Iterator[Metric]:
        metrics = self._decisions
        decisions = families.DECISIONS.family()
        for source, action in itertools.product(pb.Source.values(), pb.Action.values()):
            if source and action:
                labels = (_short(pb.Source, source), _short(pb.Action, action))
                decisions.add_metric(labels, metrics.decisions[source, action])
        yield decisions
        yield _by_name(families.DECISION_REASONS.family(), pb.ReasonCode, metrics.reasons)
        yield _by_name(families.DEGRADATIONS.family(), pb.Degradation, metrics.degradations)
        latency = families.DECISION_SECONDS.family()
        latency.add_metric((), *metrics.latency.buckets())
        yield latency
        for stages, histograms in (
            (families.STAGE_SECONDS.family(), metrics.stages),
            (families.STAGE_ALLOWED_SECONDS.family(), metrics.allowances),
        ):
            for stage, histogram in histograms.items():
                if stage:
                    stages.add_metric((_short(pb.Stage, stage),), *histogram.buckets())
            yield stages
        skips = families.STAGE_SKIPS.family()
        for (stage, why), count in metrics.skips.copy().items():
            skips.add_metric((_short(pb.Stage, stage), _short(pb.Degradation, why)), count)
        yield skips
        broken = families.STAGE_BROKEN.family()
        for name in get_args(StageName):
            broken.add_metric((name,), self._chain.broken[name])
        yield broken
        yield families.LATE.family(metrics.late)
        yield families.CANCELLED.family(metrics.cancelled)
        errors = families.ERRORS.family()
        for reason, count in metrics.errors.copy().items():
            errors.add_metric((reason,), count)
        yield errors
        yield _by_name(families.EXPLANATIONS.family(), pb.ExplanationStatus, metrics.explanations)
        yield families.IN_FLIGHT.family(self._admission.in_flight)
        yield families.ADMISSION_LIMIT.family(self._admission.limit)
        yield families.SHED.family(self._admission.shed)
        yield families.IDEMPOTENT_REPEATS.family(self._idempotency.repeated)
        yield families.IDEMPOTENT_WITHDRAWN.family(self._idempotency.withdrawn)
        yield families.IDEMPOTENT_REFUSED.family(self._idempotency.refused)
        yield families.IDEMPOTENT_LOST.family(self._idempotency.lost)

    def _replica_families(self) -> Iterator[Metric]:
        outcomes = families.REPLICA_BATCHES.family()
        rows = families.REPLICA_ROWS.family()
        splits = families.REPLICA_SPLITS.family()
        displaced = families.REPLICA_DISPLACED_ROWS.family()
        in_flight = families.REPLICA_IN_FLIGHT.family()
        slots = families.REPLICA_SLOTS.family()
        row_limit = families.REPLICA_ROW_LIMIT.family()
        abandoned = families.REPLICA_ABANDONED.family()
        queued = families.REPLICA_QUEUED_ROWS.family()
        state = families.BREAKER_STATE.family()
        transitions = families.BREAKER_TRANSITIONS.family()
        healthy = families.REPLICA_HEALTHY.family()
        p95 = families.REPLICA_P95_SECONDS.family()
        histograms = [
            families.REPLICA_QUEUE_WAIT_SECONDS.family(),
            families.REPLICA_BATCH_ROWS.family(),
            families.REPLICA_BATCH_SECONDS.family(),
        ]
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
            slots.add_metric(name, replica.batcher.slots)
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
            rows,
            splits,
            displaced,
            in_flight,
            slots,
            row_limit,
            abandoned,
            queued,
            state,
            transitions,
            healthy,
            p95,
        )
        yield from histograms

    def _attempt_families(self) -> Iterator[Metric]:
        attempts = families.ATTEMPTS.family()
        for (replica, outcome), count in self._champion.attempts.copy().items():
            attempts.add_metric((replica, outcome.value), count)
        second = families.SECOND_ATTEMPTS.family()
        for labels in itertools.product(("retry", "hedge"), ("granted", "refused", "won")):
            second.add_metric(labels, self._champion.second_attempts[labels])
        yield from (attempts, second)

    def _shadow_families(self) -> Iterator[Metric]:
        rows = families.SHADOW_ROWS.family()
        for fate, count in self._canary.shadow.fates().items():
            rows.add_metric((fate,), count)
        pairs = families.SHADOW_PAIRS.family()
        recorder = self._canary.recorder
        for fate, count in (("recorded", recorder.recorded), ("lost", recorder.lost)) if recorder else ():
            pairs.add_metric((fate,), count)
        yield from (rows, pairs)

    def _canary_families(self) -> Iterator[Metric]:
        routing, rollout = self._canary.routing, self._canary.rollout
        canary = routing.canary
        yield families.CANARY_WEIGHT.family(0.0 if canary is None else canary.weight)
        orders = families.CANARY_ORDERS.family()
        orders.add_metric(("answered",), routing.answered)
        orders.add_metric(("passed_over",), routing.orders - routing.answered)
        turns = families.CANARY_TURNS.family()
        for turn in TURNS:
            turns.add_metric((turn,), rollout.events[turn])
        verdicts, excess = families.CANARY_VERDICT.family(), families.CANARY_EXCESS.family()
        samples = families.CANARY_SAMPLES.family()
        if canary is not None:
            found = rollout.evidence.verdict
            for verdict in Verdict:
                verdicts.add_metric((verdict.value.replace(" ", "_"),), verdict is found)
            for check in rollout.evidence.checks.values():
                samples.add_metric((check.name,), check.samples)
                if check.samples:
                    excess.add_metric((check.name,), check.canary - check.champion)
        calls = families.SLO_CALLS.family()
        objective = self._canary.objective
        for outcome, count in (("met", objective.met), ("missed", objective.missed)):
            calls.add_metric((outcome,), count)
        burn = families.SLO_BURN_RATE.family()
        for seconds, rate in rollout.burn_rates.items():
            burn.add_metric((f"{seconds}s",), rate)
        yield from (orders, turns, verdicts, excess, samples, calls, burn)

    def _control_families(self) -> Iterator[Metric]:
        control = self._control
        yield families.CONTROL_VERSION.family(control.version)
        states = families.TRADING_STATE.family()
        for state in admin_pb2.TradingState.values():
            if state:
                states.add_metric((_short(admin_pb2.TradingState, state),), state == control.trading_state)
        yield states
        flags = families.FLAG.family()
        for name in FLAGS:
            flags.add_metric((name,), getattr(control, name))
        yield flags
        store = control.store
        yield families.CONTROL_RELOADS.family(store.reloads)
        yield families.CONTROL_WRITE_FAILURES.family(store.write_failures)
        yield families.CONFIG_RELOAD_FAILURES.family(self._configuration.failures)
        yield families.CONTROL_STALE.family(store.stale)
        yield families.CONTROL_PENDING.family(store.pending)
        yield families.CONTROL_UNRECORDED.family(len(store.unrecorded()))
        yield families.CONTROL_DOUBTS.family(store.doubts)
        yield families.CONTROL_OUTAGES.family(store.shared.outages if store.shared is not None else 0)
        lag = families.LOOP_LAG_SECONDS.family()
        lag.add_metric((), *self._decisions.loop_lag.buckets())
        yield lag
        yield families.LOOP_STALLS.family(self._loop_lag.stalls)
        yield families.PROCESS_RESTARTS.family(self._restarts)

    def _journal_families(self) -> Iterator[Metric]:
        journal = self._journal
        yield families.JOURNAL_WRITABLE.family(journal.writable)
        yield families.JOURNAL_ROWS.family(journal.written)
        yield families.JOURNAL_REFUSED.family(journal.refused)
        yield families.JOURNAL_OUTAGES.family(journal.outages)
        yield families.JOURNAL_BYTES.family(journal.bytes)
        yield families.JOURNAL_LIMIT_BYTES.family(journal.limit_bytes)
        yield families.JOURNAL_FULL.family(journal.full)
        yield families.JOURNAL_DEPTH.family(journal.depth)
        commits = families.JOURNAL_COMMIT_SECONDS.family()
        commits.add_metric((), *self._decisions.commits.buckets())
        yield commits
        rows = families.JOURNAL_COMMIT_ROWS.family()
        rows.add_metric((), *self._decisions.commit_rows.buckets())
        yield rows
        replies = self._replies
        unconfirmed = families.REPLIES_UNCONFIRMED.family()
        for cause in CAUSES:
            unconfirmed.add_metric((cause,), replies.unconfirmed[cause] + journal.marked[cause])
        yield unconfirmed
        yield families.REPLIES_OWED.family(replies.owed)
        yield families.REPLY_NOTES_WAITING.family(replies.waiting)
        yield families.REPLY_NOTES_LOST.family(replies.lost)
        shipper = self._shipper
        yield families.SHIPPER_UNSHIPPED.family(shipper.unshipped)
        yield families.SHIPPER_OUTAGES.family(shipper.outages)
        yield families.SHIPPER_RESTARTS.family(shipper.restarts)

        if (topic := shipper.topic) is not None:
            yield families.TOPIC_UNPUBLISHED.family(topic.behind)
            yield families.TOPIC_OUTAGES.family(topic.outages)
            yield families.TOPIC_RESTARTS.family(topic.restarts)
            yield families.TOPIC_SKIPPED.family(topic.skipped)

    def _feature_families(self) -> Iterator[Metric]:
        age = families.FEATURE_AGE_SECONDS.family()
        present = families.FEATURES_PRESENT.family()
        known = families.FEATURES_BOOK_KNOWN.family()
        now = self._clock()
        for instrument in self._instruments:
            entry = self._feature_cache.get(instrument)
            if entry is not None:
                age.add_metric((instrument,), entry.age_seconds(now))
            present.add_metric((instrument,), entry is not None)
            known.add_metric((instrument,), entry is not None and entry.snapshot.state is not BookState.UNKNOWN)
        yield from (age, present, known)
        cache = self._feature_cache
        yield families.FEATURES_TAKEN.family(cache.updates)
        yield families.FEATURES_REJECTED.family(cache.rejected)
        yield families.FEATURES_EXPIRED.family(cache.expired)
        yield families.FEATURES_AHEAD.family(cache.ahead)
        yield families.FEATURE_CACHE_DISCONNECTS.family(cache.disconnects)
        yield families.FEATURE_CACHE_CONNECTED.family(self._feature_cache.connected)

    def _telling_families(self) -> Iterator[Metric]:
        chosen, lost = families.REPORTS_CHOSEN.family(), families.REPORTS_LOST.family()
        for outlet in self._reports.outlets:
            for cause in get_args(Cause):
                chosen.add_metric((outlet.name, cause), outlet.chosen[cause])
            lost.add_metric((outlet.name,), outlet.lost)
        yield from (chosen, lost)
        exporter = self._exporter
        yield families.SPANS_EXPORTED.family(None if exporter is None else exporter.exported)
        yield families.SPANS_NOT_EXPORTED.family(None if exporter is None else exporter.failed)
        asked, ended, waiting = (
            family.family() for family in (families.READER_QUESTIONS, families.READER_ENDED, families.READER_WAITING)
        )
        for reading in self._readings:
            asked.add_metric((reading.name,), reading.asked)
            ended.add_metric((reading.name,), reading.ended)
            waiting.add_metric((reading.name,), reading.waiting)
        yield from (asked, ended, waiting)
        yield from self._drifts()

    def _drifts(self) -> Iterator[Metric]:
        psi, limit, undefined = (
            family.family() for family in (families.DRIFT_PSI, families.DRIFT_LIMIT, families.DRIFT_UNDEFINED)
        )
        state = self._drift.state
        for one in state.drifts:
            psi.add_metric((one.name,), one.psi)
            undefined.add_metric((one.name,), one.undefined)
            if one.limit is not None:
                limit.add_metric((one.name,), one.limit)
        yield from (psi, limit, undefined)
        yield families.DRIFT_ROWS.family(state.rows if state.drifts else 0)


def _short(enum: object, value: int) -> str:
    """An enum value's name without its prefix, for example `PRIMARY`."""
    wrapper = enum
    name: str = wrapper.Name(value)  # type: ignore[attr-defined]  # every enum wrapper of protobuf has it
    prefix: str = wrapper.DESCRIPTOR.values[0].name.removesuffix("UNSPECIFIED")  # type: ignore[attr-defined]
    return name.removeprefix(prefix)


def _by_name(family: CounterMetricFamily, enum: object, counts: Counter[int]) -> Metric:
    """The family with a sample for every value, 0 included: a rate does not see a sample that begins at 1."""
    for value in enum.values():  # type: ignore[attr-defined]  # as above
        if value:
            family.add_metric((_short(enum, value),), counts[value])
    return family
