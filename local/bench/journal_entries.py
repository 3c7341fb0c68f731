"""Entries of a journal as large as real ones, for benchmarks of what is done with them."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Final

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.ids import id_bound

_DAY_NS: Final = 86_400 * 10**9
_FEATURES: Final = 25
_NUMBERS: Final = (
    *("quantity", "limit_price", "score", "feature_age_ns", "decided_at_ns", "allowed_us", "used_us"),
    *("age_seconds", "age_us", "arrived_monotonic_ns", "decided_monotonic_ns", "mid_price"),
)
"""Columns of an entry that hold a number for each decision."""


def entry_of_rows(rows: int, instruments: int = 1) -> packet_pb2.JournalEntry:
    """An entry of so many decisions, all with the same id.

    Args:
        rows: How many.
        instruments: How many different ones their orders name.
    """
    numbers = range(rows)
    answer = pb.Decision(
        action=pb.ACTION_TRADE, source=pb.SOURCE_PRIMARY, model_version="0123456789abcdef", threshold=0.6
    )
    stages = [pb.StageUse(stage=stage, allowed_us=20_000, used_us=900) for stage in pb.Stage.values()[1:6]]
    orders = [
        pb.Order(instrument=f"COIN{one}USDT.BINANCE", side=pb.SIDE_BUY, strategy="strategy-0")
        for one in range(min(rows, instruments))
    ]
    batch = packet_pb2.DecisionBatch(
        shared=packet_pb2.DecisionPacket(instance_id="server-1/1", config_hash="c0ffee00c0ffee00", durability="fsync"),
        orders=orders,
        answers=[packet_pb2.DecisionPacket(decision=answer)],
        books=[packet_pb2.FeatureProvenance(sequence=row + 1, event_time_ns=2**60, book_age_ms=1.5) for row in numbers],
        model_inputs=[row.to_bytes(1) * 4 * _FEATURES for row in numbers],
        feature_set_id="mf1",
        attempts=[packet_pb2.Attempt(replica="primary", outcome="success", model_version=answer.model_version)],
        decision_id=[str(uuid.UUID(int=0)) for _ in numbers],
        order_ref=[f"order-{row:012}" for row in numbers],
        order=[row % len(orders) + 1 for row in numbers],
        ledger=[pb.Budget(stages=stages).SerializeToString() for _ in numbers],
    )
    for name in ("answer", "attempt", "attempt_count"):
        getattr(batch, name).extend(1 for _ in numbers)
    for name in ("model_input", "book"):
        getattr(batch, name).extend(row + 1 for row in numbers)
    for name in (*_NUMBERS, "attempt_used_us", "attempt_batch_index"):
        getattr(batch, name).extend(1000 + row for row in numbers)
    return packet_pb2.JournalEntry(decisions=batch)


def of_time(entry: packet_pb2.JournalEntry, number: int, decisions: int, day: dt.datetime) -> bytes:
    """The entry with this number of a day of so many decisions, serialised; `entry` is changed."""
    rows = len(entry.decisions.decision_id)
    numbers = range(number * rows, (number + 1) * rows)
    entry.decisions.decision_id[:] = [id_of(one, decisions, day) for one in numbers]
    midnight_ns = int(day.timestamp()) * 10**9
    entry.decisions.decided_at_ns[:] = [midnight_ns + one * _DAY_NS // decisions for one in numbers]
    return entry.SerializeToString()


def pairs_of(first: int, rows: int, decisions: int, day: dt.datetime) -> bytes:
    """An entry with what champion and challenger said of some decisions of such a day."""
    pair = packet_pb2.ScorePair(
        champion_version="0123456789abcdef",
        challenger_version="fedcba9876543210",
        champion_score=0.75,
        challenger_score=0.625,
        champion_trades=True,
        challenger_trades=True,
        challenger_us=900,
        recorded_at_ns=2**60,
    )
    entry = packet_pb2.JournalEntry()
    for number in range(first, first + rows):
        pair.decision_id = id_of(number, decisions, day)
        entry.score_pairs.pairs.append(pair)
    return entry.SerializeToString()


def id_of(number: int, decisions: int, day: dt.datetime) -> str:
    """The id of one of so many decisions, which are spread evenly over a day."""
    at = day + number * dt.timedelta(days=1) / decisions
    return f"{id_bound(at)}-7000-8000-{number:012x}"
