"""Labels from market events, held against the labels that models are trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from fallback.staleness import FeatureSettings
from feature_cache import features
from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.simulator import simulate
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.market.v1 import market_pb2
from server.audit.reading import labels
from server.audit.reading.labels import Label, LabelledDecision, Labeller, quality
from server.models.markout import Markout, markout_of
from torchserve import dataset, label
from torchserve.evaluation import reliability

BOOK_AGE = features.INDEX["book_age_ms"]
EVENTS = list(simulate(3, duration_seconds=30.0))
INSTRUMENTS = sorted({event.instrument for event in EVENTS})


def decision(instrument: str, at_ns: int, mid: float, side: pb.Side.ValueType) -> packet_pb2.DecisionPacket:
    """A decision whose newest event was 3 ms old."""
    packet = packet_pb2.DecisionPacket(order=pb.Order(instrument=instrument, side=side), mid_price=mid)
    packet.decision.decision_id = f"{instrument} {at_ns} {side}"
    packet.features.event_time_ns, packet.features.age_seconds = at_ns - 3_000_000, 0.003
    return packet


def grid() -> Iterator[packet_pb2.DecisionPacket]:
    """Decisions at the instants that models are trained on, for both sides, as a server would have made them."""
    engines = {name: FeatureEngine(name) for name in INSTRUMENTS}
    due: dict[str, int] = {}
    for event in EVENTS:
        engine = engines[event.instrument]
        step = dataset.STEP_NS
        due.setdefault(event.instrument, -(-event.event_time_ns // step) * step)
        while due[event.instrument] <= event.event_time_ns:
            at_ns = due[event.instrument]
            snapshot = engine.snapshot()
            age_ms = float(snapshot.values[BOOK_AGE]) + (at_ns - snapshot.event_time_ns) / 1e6
            if age_ms <= dataset.MAX_BOOK_AGE_MS and math.isfinite(snapshot.mid):
                for side in (pb.SIDE_BUY, pb.SIDE_SELL):
                    yield decision(event.instrument, at_ns, snapshot.mid, side)
            due[event.instrument] += step
        engine.on_event(event)


def labelled(labeller: Labeller, events: list[market_pb2.MarketEvent]) -> list[Label]:
    return [label for event in events for label in labeller.on_event(event)]


@pytest.mark.parametrize(
    "learnt",
    [
        label.Label(),
        label.Label(horizon_seconds=0.5),
        label.Label(horizon_seconds=1.0, delay_seconds=0.2, worst_markout_bps=-0.5),
        label.Label(horizon_seconds=2.0, price="touch"),
    ],
    ids=str,
)
def test_a_label_is_the_one_that_models_are_trained_on(learnt: label.Label) -> None:
    labeller = Labeller(grid(), markout_of({"label": learnt.described}))
    found = labelled(labeller, EVENTS)
    samples = dataset.collect(EVENTS, "simulated", label=learnt)
    assert len(found) == len(samples.rows) > 400
    assert sorted(round(one.markout_bps, 6) for one in found) == sorted(samples.markout_bps.round(6).tolist())
    assert sum(one.eligible for one in found) == samples.eligible.sum()
    assert labeller.waiting == labeller.decisions - len(found) > 0


@pytest.mark.parametrize("ahead_seconds", [60, 10**9])
def test_an_event_from_the_future_ends_no_horizon_before_its_time(ahead_seconds: int) -> None:
    instrument = INSTRUMENTS[0]
    events = [event for event in EVENTS if event.instrument == instrument]
    middle = events[len(events) // 2]
    decisions = [one for one in grid() if one.order.instrument == instrument]
    expected = {one.decision_id: one.markout_bps for one in labelled(Labeller(decisions), events)}
    future = market_pb2.MarketEvent()
    future.CopyFrom(middle)
    future.event_time_ns += ahead_seconds * 1_000_000_000
    future.trade.CopyFrom(market_pb2.Trade(trade_id=1 << 40, price_ticks=1, lots=1))
    place = events.index(middle)
    found = labelled(Labeller(decisions), [*events[:place], future, *events[place:]])
    ended = {one.decision_id: one.markout_bps for one in found}
    # It counts a second ahead, and so may what ends in that second; whatever ends after it has its label.
    assert len(expected.keys() - ended.keys()) == 0
    differing = sum(not math.isclose(ended[one], expected[one], abs_tol=1e-9) for one in expected)
    assert differing <= 2 * 2 * 1_000_000_000 // dataset.STEP_NS


def test_horizon_and_limits_are_those_of_training() -> None:
    assert markout_of({"label": label.Label().described}) == Markout()
    assert labels.MAX_BOOK_AGE_MS == dataset.MAX_LABEL_BOOK_AGE_MS
    assert 1e3 * FeatureSettings().max_age_seconds == dataset.MAX_BOOK_AGE_MS


def test_training_and_labels_make_the_same_of_the_same_scores() -> None:
    """A recorded score is the float64 of the model's float32: on the edge of a bin that must make no difference."""
    edges = np.arange(1, 10, dtype=np.float32) / np.float32(10)
    scores = np.concatenate([np.repeat(edges, 20), np.nextafter(edges, np.float32(0)), np.array([0, 1], np.float32)])
    eligible = np.random.default_rng(2).random(len(scores)) < 0.5
    pairs = zip(scores.tolist(), eligible.tolist(), strict=True)
    recorded = [LabelledDecision("TRADE", "PRIMARY", score, label) for score, label in pairs]
    learnt = reliability(scores, eligible)
    found = quality(recorded)
    assert [one.decisions for one in found.bins] == [one.samples for one in learnt]
    error = sum(one.samples * abs(one.mean_score - one.eligible) for one in learnt) / len(scores)
    assert found.calibration_error == pytest.approx(error, abs=1e-6)


def test_a_decision_without_a_mid_and_one_before_the_recording_have_no_label() -> None:
    first = EVENTS[0]
    early = decision(first.instrument, first.event_time_ns - 10_000_000_000, 100.0, pb.SIDE_BUY)
    blind = decision(first.instrument, first.event_time_ns, 0.0, pb.SIDE_BUY)
    labeller = Labeller([early, blind])
    assert (labeller.decisions, labeller.unusable) == (1, 1)
    assert labelled(labeller, EVENTS) == []
    assert labeller.waiting == 1


def test_quality_is_precision_coverage_and_calibration() -> None:
    decisions = [
        *[LabelledDecision("TRADE", "PRIMARY", 0.95, True)] * 9,
        LabelledDecision("TRADE", "PRIMARY", 0.95, False),
        *[LabelledDecision("NO_TRADE", "PRIMARY", 0.25, False)] * 6,
        *[LabelledDecision("NO_TRADE", "PRIMARY", 0.25, True)] * 2,
        *[LabelledDecision("ABSTAIN", "NONE", None, True)] * 2,
    ]
    found = quality(decisions)
    assert (found.decisions, found.base_rate, found.coverage, found.precision) == (20, 13 / 20, 0.5, 0.9)
    assert [(one.decisions, one.eligible) for one in found.bins] == [(8, 0.25), (10, 0.9)]
    assert found.calibration_error == pytest.approx(10 / 18 * 0.05)
    assert found.brier == pytest.approx((9 * 0.05**2 + 0.95**2 + 6 * 0.25**2 + 2 * 0.75**2) / 18)


def test_quality_of_nothing_is_undefined() -> None:
    found = quality([])
    assert found.decisions == 0
    assert all(math.isnan(share) for share in (found.base_rate, found.precision, found.brier, found.coverage))
