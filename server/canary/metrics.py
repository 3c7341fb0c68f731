"""The metrics of canaries and of the service objective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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

SHADOW_PAIRS: Final = Counter("pretrade_shadow_pairs", "Rows that two models scored, for the audit.", ("model", "fate"))
CANARY_WEIGHT: Final = Gauge("pretrade_canary_weight", "Share of the order flows that a canary gets here.", ("model",))
CANARY_ORDERS: Final = Counter("pretrade_canary_orders", "Orders of a canary's flows by fate.", ("model", "fate"))
CANARY_TURNS: Final = Counter("pretrade_canary_turns", "Changes of canaries that this process made.", ("model", "turn"))
CANARY_VERDICT: Final = Gauge(
    "pretrade_canary_verdict", "1 for what this process's evidence says of a running canary.", ("model", "verdict")
)
CANARY_EXCESS: Final = Gauge(
    "pretrade_canary_excess", "Mean of a check at this step, the canary's less the champion's.", ("model", "check")
)
CANARY_SAMPLES: Final = Gauge("pretrade_canary_samples", "Observations of a check at this step.", ("model", "check"))
SLO_CALLS: Final = Counter(
    "pretrade_slo_calls", "Calls at which a model had a fair chance: whether one answered in time.", ("model", "fate")
)
SLO_BURN_RATE: Final = Gauge(
    "pretrade_slo_burn_rate",
    "How many times as fast as it may the error budget burns in this process.",
    ("model", "window"),
)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


def of_pairs(recorders: Mapping[str, PairRecorder | None]) -> Iterator[Metric]:
    """One scrape, by model."""
    pairs = SHADOW_PAIRS.family()
    for model, recorder in recorders.items():
        for fate, count in (("recorded", recorder.recorded), ("lost", recorder.lost)) if recorder else ():
            pairs.add_metric((model, fate), count)
    yield pairs


def of_canary(models: Iterable[tuple[str, CanaryRouting, Rollout, Objective]]) -> Iterator[Metric]:
    """One scrape, of every named model."""
    weight, orders, turns = CANARY_WEIGHT.family(), CANARY_ORDERS.family(), CANARY_TURNS.family()
    verdicts, excess, samples = CANARY_VERDICT.family(), CANARY_EXCESS.family(), CANARY_SAMPLES.family()
    calls, burn = SLO_CALLS.family(), SLO_BURN_RATE.family()
    for model, routing, rollout, objective in models:
        canary = routing.canary
        weight.add_metric((model,), 0.0 if canary is None else canary.weight)
        orders.add_metric((model, "answered"), routing.answered)
        orders.add_metric((model, "passed_over"), routing.passed_over)
        for turn in TURNS:
            turns.add_metric((model, turn), rollout.events.counts[turn])
        if canary is not None:
            found = rollout.evidence.verdict
            for verdict in Verdict:
                verdicts.add_metric((model, verdict.value.replace(" ", "_")), verdict is found)
            for check in rollout.evidence.checks.values():
                samples.add_metric((model, check.name), check.samples)
                if check.samples:
                    excess.add_metric((model, check.name), check.canary - check.champion)
        for outcome, count in (("met", objective.met), ("missed", objective.missed)):
            calls.add_metric((model, outcome), count)
        for seconds, rate in rollout.burn_rates.items():
            burn.add_metric((model, f"{seconds}s"), rate)
    yield from (weight, orders, turns, verdicts, excess, samples, calls, burn)
