"""The metrics of canaries and of the service objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from feature_cache.metrics import Counter, Gauge, declared
from server.canary.events import TURNS
from server.canary.evidence import Verdict

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from server.canary.burn import Objective
    from server.canary.pairs import PairRecorder
    from server.canary.rollout import Rollout
    from server.canary.routing import CanaryRouting

SHADOW_PAIRS: Final = Counter("pretrade_shadow_pairs", "Rows that two models scored, for the audit.", ("fate",))
CANARY_WEIGHT: Final = Gauge("pretrade_canary_weight", "Share of the order flows that a canary gets here.")
CANARY_ORDERS: Final = Counter("pretrade_canary_orders", "Orders of a canary's flows by fate.", ("fate",))
CANARY_TURNS: Final = Counter("pretrade_canary_turns", "Changes of canaries that this process made.", ("turn",))
CANARY_VERDICT: Final = Gauge(
    "pretrade_canary_verdict", "1 for what this process's evidence says of a running canary.", ("verdict",)
)
CANARY_EXCESS: Final = Gauge(
    "pretrade_canary_excess", "Mean of a check at this step, the canary's less the champion's.", ("check",)
)
CANARY_SAMPLES: Final = Gauge("pretrade_canary_samples", "Observations of a check at this step.", ("check",))
SLO_CALLS: Final = Counter(
    "pretrade_slo_calls", "Calls at which a model had a fair chance: whether one answered in time.", ("fate",)
)
SLO_BURN_RATE: Final = Gauge(
    "pretrade_slo_burn_rate", "How many times as fast as it may the error budget burns in this process.", ("window",)
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_pairs(recorder: PairRecorder | None) -> Iterator[Metric]:
    """One scrape."""
    pairs = SHADOW_PAIRS.family()
    for fate, count in (("recorded", recorder.recorded), ("lost", recorder.lost)) if recorder else ():
        pairs.add_metric((fate,), count)
    yield pairs


def of_canary(routing: CanaryRouting, rollout: Rollout, objective: Objective) -> Iterator[Metric]:
    """One scrape."""
    canary = routing.canary
    yield CANARY_WEIGHT.family(0.0 if canary is None else canary.weight)
    orders = CANARY_ORDERS.family()
    orders.add_metric(("answered",), routing.answered)
    orders.add_metric(("passed_over",), routing.orders - routing.answered)
    turns = CANARY_TURNS.family()
    for turn in TURNS:
        turns.add_metric((turn,), rollout.events.counts[turn])
    verdicts, excess = CANARY_VERDICT.family(), CANARY_EXCESS.family()
    samples = CANARY_SAMPLES.family()
    if canary is not None:
        found = rollout.evidence.verdict
        for verdict in Verdict:
            verdicts.add_metric((verdict.value.replace(" ", "_"),), verdict is found)
        for check in rollout.evidence.checks.values():
            samples.add_metric((check.name,), check.samples)
            if check.samples:
                excess.add_metric((check.name,), check.canary - check.champion)
    calls = SLO_CALLS.family()
    for outcome, count in (("met", objective.met), ("missed", objective.missed)):
        calls.add_metric((outcome,), count)
    burn = SLO_BURN_RATE.family()
    for seconds, rate in rollout.burn_rates.items():
        burn.add_metric((f"{seconds}s",), rate)
    yield from (orders, turns, verdicts, excess, samples, calls, burn)
