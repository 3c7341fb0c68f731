"""The counts of the decision path, and its metrics.

The path only adds to plain integers; the Prometheus families are built for each scrape, on a thread of its own.
Counters to which the event loop may add a key are copied in one step.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, get_args

from fallback.chain import StageName
from feature_cache.metrics import Counter, Gauge, Histogram, declared
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision import tally
from server.decision.reports import Cause
from server.decision.strategies import StrategyCounts
from server.journal.reply_status import CAUSES
from server.timing.histogram import ROW_EDGES
from server.timing.histogram import Histogram as Observations

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily
    from prometheus_client.metrics_core import Metric

    from fallback.chain import Chain
    from server.decision.admission import Admission
    from server.decision.decided_block import DecidedBlock
    from server.decision.idempotency import IdempotencyWindow
    from server.decision.other_sets import OtherSets
    from server.decision.pending import Pending
    from server.decision.replies import Replies
    from server.decision.reports import DecisionReports
    from server.journal.journal import Journal

DECISIONS: Final = Counter("pretrade_decisions", "Decisions sent.", ("source", "action"))
STRATEGY_DECISIONS: Final = Counter(
    "pretrade_strategy_decisions",
    "Decisions sent, by strategy; those of further strategies are counted together.",
    ("strategy", "action"),
)
DECISION_REASONS: Final = Counter("pretrade_decision_reasons", "Reasons of decisions.", ("reason",))
DEGRADATIONS: Final = Counter("pretrade_degradations", "Degradations of decisions.", ("degradation",))
DECISION_SECONDS: Final = Histogram("pretrade_decision_seconds", "Arrival to hand-over of the reply.")
STAGE_SECONDS: Final = Histogram("pretrade_stage_seconds", "Time used by a stage.", ("stage",))
STAGE_ALLOWED_SECONDS: Final = Histogram("pretrade_stage_allowed_seconds", "Time allowed to a stage.", ("stage",))
STAGE_SKIPS: Final = Counter("pretrade_stage_skips", "Stages passed over.", ("stage", "reason"))
STAGE_BROKEN: Final = Counter("pretrade_stage_broken", "Stages that broke off with a bug.", ("stage",))
LATE: Final = Counter("pretrade_late", "Calls that ended DEADLINE_EXCEEDED.")
CANCELLED: Final = Counter("pretrade_cancelled", "Calls whose caller had gone.")
ERRORS: Final = Counter("pretrade_errors", "Calls, and orders in batches and streams, that failed.", ("reason",))
EXPLANATIONS: Final = Counter("pretrade_explanations", "Explanations asked for beside replies.", ("status",))
IN_FLIGHT: Final = Gauge("pretrade_in_flight", "Decisions under way.")
ADMISSION_LIMIT: Final = Gauge("pretrade_admission_limit", "Decisions that may be under way.")
ADMISSION_WAITING: Final = Gauge(
    "pretrade_admission_waiting", "Orders without a deadline, and batches, that wait for a place."
)
SHED: Final = Counter("pretrade_shed", "Calls refused by admission; with Envoy also before they are taken up.")
IDEMPOTENT_REPEATS: Final = Counter("pretrade_idempotent_repeats", "Calls answered again.")
IDEMPOTENT_WITHDRAWN: Final = Counter(
    "pretrade_idempotent_withdrawn", "Calls answered again with something safer: a guard or the audit objected since."
)
IDEMPOTENT_REFUSED: Final = Counter(
    "pretrade_idempotent_refused", "Calls shed because no further key could be remembered."
)
IDEMPOTENT_LOST: Final = Counter(
    "pretrade_idempotent_lost", "Decisions made so late that another process may have decided in their place."
)
REPLIES_UNCONFIRMED: Final = Counter(
    "pretrade_replies_unconfirmed", "Decisions that were not what their callers heard; each is noted.", ("fate",)
)
REPLIES_OWED: Final = Gauge(
    "pretrade_replies_owed", "Decisions on disk of which it is not known yet whether their callers received them."
)
REPLY_NOTES_WAITING: Final = Gauge("pretrade_reply_notes_waiting", "Notes about replies that are not durable yet.")
REPLY_NOTES_LOST: Final = Counter("pretrade_reply_notes_lost", "Notes about replies given up because too many waited.")
LANE_CALLS: Final = Counter(
    "pretrade_lane_calls", "Calls of Decide that came by Envoy's lane, past ASGI, by who answered.", ("answered_by",)
)
BLOCK_ORDERS: Final = Histogram(
    "pretrade_block_orders", "Orders of a block that was decided in columns; `_sum` counts all of them.", (), ROW_EDGES
)
ORDERS_ALONE: Final = Counter(
    "pretrade_orders_alone", "Orders that were decided one by one, by why not in columns.", ("why",)
)
SET_FEATURE_AGE_SECONDS: Final = Gauge(
    "pretrade_set_feature_age_seconds",
    "Age from exchange event time of the features of a computed set that a model takes.",
    ("set", "instrument"),
)
SET_FEATURES_PRESENT: Final = Gauge(
    "pretrade_set_features_present",
    "1 while there are features of a computed set that a model takes within their TTL.",
    ("set", "instrument"),
)
SET_ROWS_MISSING: Final = Counter(
    "pretrade_set_rows_missing",
    "Orders without a row of the feature set that their model takes; the part is the caller, or the set whose features"
    " were missing or stale.",
    ("set", "part"),
)
REPORTS_CHOSEN: Final = Counter(
    "pretrade_reports_chosen", "Decisions chosen to be reported, lost ones included.", ("sink", "cause")
)
REPORTS_LOST: Final = Counter("pretrade_reports_lost", "Of these, those beyond the sink's rate or queue.", ("sink",))

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""

Alone = Literal[
    "lone",
    "few",
    "deadlines",
    "key",
    "features",
    "trace",
    "market",
    "control",
    "chain",
    "stage",
    "no_score",
    "flight",
    "mixed",
    "guards",
    "audit",
    "bug",
]
"""Why an order is decided by itself and not in columns; `docs/sizing.md` explains each."""


class DecisionMetrics:
    """What the decision path counts."""

    def __init__(self) -> None:
        self.decisions: collections.Counter[tuple[int, int]] = collections.Counter()
        """By (source, action)."""
        self.strategies = StrategyCounts()
        self.reasons: collections.Counter[int] = collections.Counter()
        self.degradations: collections.Counter[int] = collections.Counter()
        self.latency = Observations()
        """Arrival to the reply's hand-over."""
        self.stages: dict[int, Observations] = {stage: Observations() for stage in pb.Stage.values()}
        """Seconds used, by stage."""
        self.allowances: dict[int, Observations] = {stage: Observations() for stage in pb.Stage.values()}
        """Seconds allowed, by stage."""
        self.skips: collections.Counter[tuple[int, int]] = collections.Counter()
        """By (stage, why it was passed over)."""
        self.late = 0
        """Calls that ended DEADLINE_EXCEEDED."""
        self.cancelled = 0
        """Calls whose caller had gone before the reply."""
        self.explanations: collections.Counter[int] = collections.Counter()
        """Explanations asked for beside replies, by status."""
        self.lane_calls: collections.Counter[str] = collections.Counter({"lane": 0, "application": 0})
        """Calls that came by Envoy's lane, by who answered: the lane itself, or the application of all other calls."""
        self.blocks = Observations(ROW_EDGES)
        """Orders of each block that was decided in columns."""
        self.alone: collections.Counter[Alone] = collections.Counter()
        """Orders that were decided one by one. Each is counted where its way parts from that of a block."""
        self.errors: collections.Counter[str] = collections.Counter({"INTERNAL": 0})
        """Calls, and orders in batches and streams, that failed, by reason."""

    def observe(self, cases: Sequence[Pending], now: float) -> None:
        """Counts cases that were decided, and are about to be answered."""
        # Whoever meets a bug in one of the cases asks again for each: nothing is counted before all were looked at.
        decided = [case.decided for case in cases if case.decided is not None]
        answers = [(one.source, one.action) for one in decided]
        strategies = [(case.order.strategy, case.decided.action) for case in cases if case.decided is not None]
        reasons = [reason for one in decided for reason in one.reasons]
        degradations = [degradation for case in cases for degradation in case.degradations]
        seconds = [now - case.budget.arrived for case in cases]
        self.decisions.update(answers)
        self.strategies.count(strategies)
        self.reasons.update(reasons)
        self.degradations.update(degradations)
        self.latency.observe_all(seconds)
        tally.count([case.budget.uses for case in cases], self.stages, self.allowances, self.skips)

    def observe_block(self, decided: DecidedBlock, now: float) -> None:
        """The same for decisions that were made in columns."""
        block, count = decided.block, len(decided)
        self.blocks.observe(count)
        for action, times in collections.Counter(block.actions).items():
            self.decisions[block.source, action] += times
        self.strategies.count(zip([order.strategy for order in block.orders], block.actions, strict=True))
        self.reasons.update(block.reasons)
        self.reasons.update(itertools.chain.from_iterable(block.objections))
        for degradation in block.degradations:
            self.degradations[degradation] += count
        if block.own is None:
            self.latency.observe(now - decided.arrived, count)
            tally.count([block.budget.uses], self.stages, self.allowances, self.skips, count)
            return
        self.latency.observe_all([now - own.arrived for own in block.own])
        tally.count([[own.admission for own in block.own]], self.stages, self.allowances, self.skips)
        tally.count([block.budget.uses[1:]], self.stages, self.allowances, self.skips, count)

    def by_source(self) -> dict[str, int]:
        """Decisions by source, every source named."""
        counts = {enum_name(pb.Source, source): 0 for source in pb.Source.values() if source}
        for (source, _), count in self.decisions.items():
            counts[enum_name(pb.Source, source)] += count
        return counts


def of_decisions(metrics: DecisionMetrics) -> Iterator[Metric]:
    """One scrape of what became of calls."""
    decisions = DECISIONS.family()
    for source, action in itertools.product(pb.Source.values(), pb.Action.values()):
        if source and action:
            labels = (enum_name(pb.Source, source), enum_name(pb.Action, action))
            decisions.add_metric(labels, metrics.decisions[source, action])
    yield decisions
    strategies, counted = STRATEGY_DECISIONS.family(), dict(metrics.strategies.counts)
    for strategy, action in itertools.product(sorted({strategy for strategy, _ in counted}), pb.Action.values()):
        if action:
            strategies.add_metric((strategy, enum_name(pb.Action, action)), counted.get((strategy, action), 0))
    yield strategies
    yield _by_name(DECISION_REASONS.family(), pb.ReasonCode, metrics.reasons)
    yield _by_name(DEGRADATIONS.family(), pb.Degradation, metrics.degradations)
    latency = DECISION_SECONDS.family()
    latency.add_metric((), *metrics.latency.buckets())
    yield latency
    for stages, histograms in (
        (STAGE_SECONDS.family(), metrics.stages),
        (STAGE_ALLOWED_SECONDS.family(), metrics.allowances),
    ):
        for stage, histogram in histograms.items():
            if stage:
                stages.add_metric((enum_name(pb.Stage, stage),), *histogram.buckets())
        yield stages
    skips = STAGE_SKIPS.family()
    for (stage, why), count in metrics.skips.copy().items():
        skips.add_metric((enum_name(pb.Stage, stage), enum_name(pb.Degradation, why)), count)
    yield skips
    yield LATE.family(metrics.late)
    yield CANCELLED.family(metrics.cancelled)
    errors = ERRORS.family()
    for reason, count in metrics.errors.copy().items():
        errors.add_metric((reason,), count)
    yield errors
    yield _by_name(EXPLANATIONS.family(), pb.ExplanationStatus, metrics.explanations)
    lane_calls = LANE_CALLS.family()
    for answered_by, count in metrics.lane_calls.copy().items():
        lane_calls.add_metric((answered_by,), count)
    yield lane_calls
    blocks = BLOCK_ORDERS.family()
    blocks.add_metric((), *metrics.blocks.buckets())
    yield blocks
    alone = ORDERS_ALONE.family()
    for why in get_args(Alone):
        alone.add_metric((why,), metrics.alone[why])
    yield alone


def of_chain(chain: Chain) -> Iterator[Metric]:
    """One scrape of the stages."""
    broken = STAGE_BROKEN.family()
    for name in get_args(StageName):
        broken.add_metric((name,), chain.broken[name])
    yield broken


def of_admission(admission: Admission) -> Iterator[Metric]:
    """One scrape."""
    yield IN_FLIGHT.family(admission.in_flight)
    yield ADMISSION_LIMIT.family(admission.limit)
    yield ADMISSION_WAITING.family(admission.waiting)
    yield SHED.family(admission.shed)


def of_idempotency(idempotency: IdempotencyWindow) -> Iterator[Metric]:
    """One scrape."""
    yield IDEMPOTENT_REPEATS.family(idempotency.repeated)
    yield IDEMPOTENT_WITHDRAWN.family(idempotency.withdrawn)
    yield IDEMPOTENT_REFUSED.family(idempotency.refused)
    yield IDEMPOTENT_LOST.family(idempotency.lost)


def of_replies(replies: Replies, journal: Journal) -> Iterator[Metric]:
    """One scrape; the journal tells of replies, too: of those that were under way when a process died."""
    unconfirmed = REPLIES_UNCONFIRMED.family()
    for cause in CAUSES:
        unconfirmed.add_metric((cause,), replies.unconfirmed[cause] + journal.marked[cause])
    yield unconfirmed
    yield REPLIES_OWED.family(replies.owed)
    yield REPLY_NOTES_WAITING.family(replies.waiting)
    yield REPLY_NOTES_LOST.family(replies.lost)


def of_sets(others: OtherSets, instruments: Sequence[str], clock: Callable[[], float]) -> Iterator[Metric]:
    """Of feature sets besides `mf1`.

    Args:
        others: Puts their rows together.
        instruments: Those that may have vectors.
        clock: Monotonic seconds, the cache's own.
    """
    age, present = SET_FEATURE_AGE_SECONDS.family(), SET_FEATURES_PRESENT.family()
    now = clock()
    for set_id, cache in dict(others.caches).items():
        for instrument in instruments:
            entry = cache.get(instrument)
            if entry is not None:
                age.add_metric((set_id, instrument), entry.age_seconds(now))
            present.add_metric((set_id, instrument), entry is not None)
    yield from (age, present)
    missing = SET_ROWS_MISSING.family()
    for labels, count in dict(others.missing).items():
        missing.add_metric(labels, count)
    yield missing


def of_reports(reports: DecisionReports) -> Iterator[Metric]:
    """One scrape."""
    chosen, lost = REPORTS_CHOSEN.family(), REPORTS_LOST.family()
    for sink in reports.sinks:
        for cause in get_args(Cause):
            chosen.add_metric((sink.name, cause), sink.chosen[cause])
        lost.add_metric((sink.name,), sink.lost)
    yield from (chosen, lost)


def _by_name(family: CounterMetricFamily, enum: object, counts: collections.Counter[int]) -> Metric:
    """The family with a sample for every value, 0 included: a rate does not see a sample that begins at 1."""
    for value in enum.values():  # type: ignore[attr-defined]  # every enum wrapper of protobuf has it
        if value:
            family.add_metric((enum_name(enum, value),), counts[value])
    return family
