"""Labels of decisions from recorded market events, and what they say of the deciders.

The label is the model's own (`server/models/markout.py`): by default the side-signed markout of the mid over the next
5 s, *eligible* when it is not worse than −1 bp. An instant t of a decision is on the exchange's clock: the event time
of the newest event it knew plus that event's age. The mid at t is the packet's; any later mid or touch is that of every
event received before the first one of its instant or later, if the book is fresh then. So neither the execution system
nor the decision's own time matters.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from feature_cache import features
from feature_cache.engine.book import EventError
from feature_cache.engine.engine import FeatureEngine
from feature_cache.store.codec import FeatureSnapshot
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.market.v1 import market_pb2
from server.models.markout import Markout

MAX_BOOK_AGE_MS: Final = 2_000.0
"""With an older book at the end of the horizon there is no label."""
_BOOK_AGE: Final = features.MF1.index["book_age_ms"]
_SPREAD: Final = features.MF1.index["spread_bps"]
_BINS: Final = 10


@dataclass(frozen=True, slots=True)
class Label:
    """What the market did after a decision."""

    decision_id: str
    markout_bps: float
    """Side-signed."""
    eligible: bool


@dataclass(slots=True)
class _Wanted:
    """A decision that waits for a look at the market."""

    decision_id: str
    at_ns: int
    """When that is: the end of the horizon, or before that, when the order reaches the market."""
    price: float
    """What the order was done at; NaN until it has reached the market."""
    sign: int
    end_ns: int
    """End of the horizon."""


class Labeller:
    """Labels decisions while events go by.

    Args:
        packets: The decisions. Those without a mid have no label: nothing was known of the book.
        markout: What the label is.
    """

    def __init__(self, packets: Iterable[packet_pb2.DecisionPacket], markout: Markout | None = None) -> None:
        markout = markout or Markout()
        delay_ns, horizon_ns = round(markout.delay_seconds * 1e9), round(markout.horizon_seconds * 1e9)
        knows_price = not delay_ns and markout.price == "mid"
        waiting: dict[str, list[_Wanted]] = defaultdict(list)
        self.decisions = 0
        """Decisions that can have a label."""
        self.unusable = 0
        """Decisions that cannot."""
        for packet in packets:
            known = packet.features
            if not packet.mid_price > 0 or not known.event_time_ns:
                self.unusable += 1
                continue
            self.decisions += 1
            reaches_ns = known.event_time_ns + round(known.age_seconds * 1e9) + delay_ns
            end_ns = reaches_ns + horizon_ns
            waiting[packet.order.instrument].append(
                _Wanted(
                    decision_id=packet.decision.decision_id,
                    at_ns=end_ns if knows_price else reaches_ns,
                    price=packet.mid_price if knows_price else math.nan,
                    sign=1 if packet.order.side == pb.SIDE_BUY else -1,
                    end_ns=end_ns,
                )
            )
        self._markets = {name: _Market(name, wanted, markout) for name, wanted in waiting.items()}

    def on_event(self, event: market_pb2.MarketEvent) -> Iterator[Label]:
        """Takes an event in; gives the labels of the horizons that end before it."""
        market = self._markets.get(event.instrument)
        if market is not None:
            yield from market.on_event(event)

    @property
    def waiting(self) -> int:
        """Decisions whose horizon has not ended, or began before the events did."""
        return sum(market.waiting for market in self._markets.values())


class _Market:
    """One instrument: its book as the events make it, and the decisions on it by their next look at the market."""

    def __init__(self, instrument: str, wanted: list[_Wanted], markout: Markout) -> None:
        self._looks = [(one.at_ns, number, one) for number, one in enumerate(wanted)]
        heapq.heapify(self._looks)
        self._markout = markout
        self._engine = FeatureEngine(instrument)
        self._began = False
        self.waiting = len(wanted)

    def on_event(self, event: market_pb2.MarketEvent) -> Iterator[Label]:
        if not self._began:
            # What is to be looked at before the first event has no market to be held against.
            self._began = True
            while self._looks and self._looks[0][0] <= event.event_time_ns:
                heapq.heappop(self._looks)
        is_due = bool(self._looks) and self._looks[0][0] <= event.event_time_ns
        # Before the event is taken in: at that instant it had not been received yet.
        before = self._engine.snapshot() if is_due else None
        try:
            self._engine.on_event(event)
        except EventError:
            return  # the feature worker refused it as well
        if before is not None:
            # An event from the future counts at a bound, and a stale one moves no time.
            yield from self._labelled(before, min(event.event_time_ns, self._engine.snapshot().event_time_ns))

    def _labelled(self, known: FeatureSnapshot, now_ns: int) -> Iterator[Label]:
        """Labels of those whose horizon has ended by now, from what was known before."""
        while self._looks and self._looks[0][0] <= now_ns:
            at_ns, number, one = heapq.heappop(self._looks)
            age_ms = float(known.values[_BOOK_AGE]) + (at_ns - known.event_time_ns) / 1e6
            if not (age_ms <= MAX_BOOK_AGE_MS and math.isfinite(known.mid)):
                continue
            if math.isnan(one.price):
                one.price = self._price(known, one.sign)
                if not math.isnan(one.price):
                    heapq.heappush(self._looks, (one.end_ns, number, one))
                continue
            self.waiting -= 1
            markout_bps = one.sign * 1e4 * (known.mid / one.price - 1)
            yield Label(one.decision_id, markout_bps, markout_bps >= self._markout.worst_bps)

    def _price(self, known: FeatureSnapshot, sign: int) -> float:
        """What an order of this side is done at; NaN where it is not known."""
        if self._markout.price == "mid":
            return known.mid
        return known.mid * (1 + sign * float(known.values[_SPREAD]) / 2e4)


async def events_of_topic(bootstrap_servers: str, topic: str) -> AsyncIterator[market_pb2.MarketEvent]:
    """Every event that a Kafka topic holds now, those of an instrument in order.

    Raises:
        aiokafka.errors.KafkaError: The brokers cannot be reached or refuse.
    """
    from aiokafka import AIOKafkaConsumer, TopicPartition  # noqa: PLC0415 - the worker's client, for this command alone
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    from feature_cache import kafka  # noqa: PLC0415

    consumer = AIOKafkaConsumer(**kafka.client(bootstrap_servers), enable_auto_commit=False)
    try:
        await consumer.start()
        await consumer.topics()
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        left = {one: end for one, end in (await consumer.end_offsets(partitions)).items() if end}
        while left:
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                for record in records:
                    try:
                        yield market_pb2.MarketEvent.FromString(record.value)
                    except (DecodeError, TypeError):
                        continue  # a poison record, which the feature worker passed over as well
            left = {one: end for one, end in left.items() if await consumer.position(one) < end}
    finally:
        await consumer.stop()


@dataclass(frozen=True, slots=True)
class LabelledDecision:
    """A decision with its label, as far as quality goes."""

    heard_action: str
    """What the caller heard, for example `TRADE`."""
    source: str
    score: float | None
    eligible: bool
    decision_id: str = ""


@dataclass(frozen=True, slots=True)
class Bin:
    """Decisions with a score in one tenth of [0, 1]."""

    decisions: int
    mean_score: float
    eligible: float
    """Share that was eligible; a calibrated model has it at `mean_score`."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How good decisions were by their labels. Shares are NaN where there is nothing to divide by."""

    decisions: int
    base_rate: float
    """Share of all that was eligible."""
    coverage: float
    """Share of all that callers heard as TRADE."""
    precision: float
    """Share of what callers heard as TRADE that was eligible."""
    brier: float
    """Mean squared difference of score and label; 0.25 for a score of 0.5 throughout."""
    calibration_error: float
    """Mean distance of `mean_score` and `eligible` over the bins, weighted by their decisions."""
    bins: tuple[Bin, ...]


def quality(decisions: Sequence[LabelledDecision]) -> Quality:
    """Precision, coverage and calibration of labelled decisions."""
    traded = [one.eligible for one in decisions if one.heard_action == "TRADE"]
    scored = [(one.score, one.eligible) for one in decisions if one.score is not None]
    scores = np.array([score for score, _ in scored], dtype=np.float64)
    labels = np.array([eligible for _, eligible in scored], dtype=np.float64)
    # As training does (`torchserve/evaluation.py`): a model's 0.7 is a float32, which float64 has in the bin below.
    places = np.minimum((scores.astype(np.float32) * _BINS).astype(int), _BINS - 1)
    bins = tuple(
        Bin(int(mask.sum()), float(scores[mask].mean()), float(labels[mask].mean()))
        for mask in (places == place for place in range(_BINS))
        if mask.any()
    )
    return Quality(
        decisions=len(decisions),
        base_rate=_share(sum(one.eligible for one in decisions), len(decisions)),
        coverage=_share(len(traded), len(decisions)),
        precision=_share(sum(traded), len(traded)),
        brier=float(np.mean((scores - labels) ** 2)) if scored else math.nan,
        calibration_error=_share(sum(one.decisions * abs(one.mean_score - one.eligible) for one in bins), len(scored)),
        bins=bins,
    )


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan
