"""Converts journal rows to the columns of SQL."""

from __future__ import annotations

import datetime as dt
import functools
import math
from collections.abc import Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from pretrade.audit.v1 import packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.journal_file import Row
from server.journal.reply_status import REPLIED, WITHDRAWN, unconfirmed_status

Columns = dict[str, Any]
"""Column values of one row; their types are the table's."""

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Shipment:
    """Rows of a journal, as the rows of each table.

    A row of another format becomes evidence and nothing else: it must not stop those behind it.

    Args:
        journal_id: Their journal.
        rows: At least one.
    """

    def __init__(self, journal_id: str, rows: Sequence[Row]) -> None:
        self.entries: list[Columns] = []
        self.decisions: list[Columns] = []
        self.statuses: list[Columns] = []
        self.repeats: list[Columns] = []
        self.changes: list[Columns] = []
        self.settings: list[Columns] = []
        self.outcomes: list[Columns] = []
        self.pairs: list[Columns] = []
        self.canary_events: list[Columns] = []
        self.refusals: list[Columns] = []
        for row in rows:
            self.entries.append(
                {"journal_id": journal_id, "position": row.position, "entry": row.entry, "hash": row.hash}
            )
            at: Columns = {"journal_id": journal_id, "journal_position": row.position}
            try:
                entry = packet_pb2.JournalEntry.FromString(row.entry)
                match entry.WhichOneof("entry"):
                    case "decision":
                        self.decisions.append(_decision_columns(entry.decision) | at)
                    case "reply_unconfirmed":
                        status = unconfirmed_status(_text(entry.reply_unconfirmed.cause))
                        self._add_status(_text(entry.reply_unconfirmed.decision_id), status, at)
                    case "reply_heard":
                        decision_id = _text(entry.reply_heard.decision_id)
                        self.repeats.append({"decision_id": decision_id, "reply_status": REPLIED} | at)
                    case "control_change":
                        self.changes.append(_change_columns(entry.control_change) | at)
                    case "settings":
                        self.settings.append(_settings_columns(entry.settings))
                    case "outcome":
                        self.outcomes.append(_outcome_columns(entry.outcome) | at)
                    case "score_pairs":
                        self.pairs += [_pair_columns(pair) for pair in entry.score_pairs.pairs]
                    case "canary_event":
                        self.canary_events.append(_canary_columns(entry.canary_event))
                    case "access_refused":
                        self.refusals.append(_refusal_columns(entry.access_refused) | at)
            except (DecodeError, ValueError, OverflowError):
                continue

    def _add_status(self, decision_id: str, status: str, at: Columns) -> None:
        if status == WITHDRAWN:
            self.repeats.append({"decision_id": decision_id, "reply_status": status} | at)
        else:
            self.statuses.append({"of_decision_id": decision_id, "new_status": status})

    def days(self) -> set[dt.date]:
        """The days of its decisions."""
        return {decision["decided_at"].date() for decision in self.decisions}

    def stamp(self, shipped_at: dt.datetime) -> None:
        """Sets when the rows are shipped."""
        for row in (*self.entries, *self.decisions, *self.repeats):
            row["shipped_at"] = shipped_at


# There are few of each, and a name takes longer than the whole rest of a row.


@functools.lru_cache(maxsize=4096)
def _reasons(reasons: tuple[pb.ReasonCode.ValueType, ...]) -> tuple[str, ...]:
    return tuple(enum_name(pb.ReasonCode, reason) for reason in reasons)


@functools.lru_cache(maxsize=4096)
def _degradations(degradations: tuple[pb.Degradation.ValueType, ...]) -> tuple[str, ...]:
    return tuple(enum_name(pb.Degradation, one) for one in degradations)


def _text(value: str) -> str:
    """As PostgreSQL can store it: without NUL characters. The evidence keeps them."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _number(value: float) -> float | None:
    """As both databases agree to store it: SQLite knows no NaN, PostgreSQL sorts it above every number."""
    return None if math.isnan(value) else value


def _instant(nanoseconds: int) -> dt.datetime:
    return _EPOCH + dt.timedelta(microseconds=nanoseconds // 1000)


def _decision_columns(packet: packet_pb2.DecisionPacket) -> Columns:
    order, decision = packet.order, packet.decision
    return {
        "decision_id": _text(decision.decision_id),
        "decided_at": _instant(decision.decided_at.ToNanoseconds()),
        "order_ref": _text(order.order_ref),
        "instrument": _text(order.instrument),
        "side": enum_name(pb.Side, order.side),
        "quantity": _number(order.quantity),
        "limit_price": _number(order.limit_price) if order.HasField("limit_price") else None,
        "strategy": _text(order.strategy),
        "idempotency_key": _text(order.idempotency_key) or None,
        "action": enum_name(pb.Action, decision.action),
        "score": _number(decision.score) if decision.HasField("score") else None,
        "threshold": _number(decision.threshold) if decision.HasField("threshold") else None,
        "source": enum_name(pb.Source, decision.source),
        "reasons": _reasons(tuple(decision.reasons)),
        "degradations": _degradations(tuple(decision.degradations)),
        "model_name": _text(decision.model_name),
        "model_version": _text(decision.model_version),
        "feature_age_us": (decision.feature_age.ToMicroseconds() if decision.HasField("feature_age") else None),
        "used_us": decision.budget.used_us,
        "allowed_us": decision.budget.allowed_us,
        "instance_id": _text(packet.instance_id),
        "config_hash": _text(packet.config_hash),
        "durability": _text(packet.durability),
        "reply_status": REPLIED,
    }


def _settings_columns(settings: packet_pb2.SettingsInForce) -> Columns:
    return {"config_hash": _text(settings.config_hash), "entry": settings.SerializeToString()}


def _outcome_columns(outcome: packet_pb2.Outcome) -> Columns:
    return {
        "decision_id": _text(outcome.decision_id),
        "reporter": _text(outcome.reporter),
        "recorded_at": _instant(outcome.recorded_at_ns),
        "filled_quantity": outcome.filled_quantity,
        "fill_price": outcome.fill_price if outcome.HasField("fill_price") else None,
        "markout_bps": outcome.markout_bps if outcome.HasField("markout_bps") else None,
    }


def _pair_columns(pair: packet_pb2.ScorePair) -> Columns:
    return {
        "decision_id": _text(pair.decision_id),
        "challenger_version": _text(pair.challenger_version),
        "champion_version": _text(pair.champion_version),
        "champion_score": pair.champion_score,
        "challenger_score": pair.challenger_score,
        "champion_trades": pair.champion_trades,
        "challenger_trades": pair.challenger_trades,
        "challenger_decided": pair.challenger_decided,
        "challenger_us": pair.challenger_us,
        "recorded_at": _instant(pair.recorded_at_ns),
    }


def _canary_columns(event: packet_pb2.CanaryEvent) -> Columns:
    return {
        "event_id": _text(event.event_id),
        "canary_id": _text(event.canary_id),
        "at": _instant(event.at_ns),
        "event": _text(event.event),
        "model_version": _text(event.model_version),
        "champion_version": _text(event.champion_version),
        "previous_weight": event.previous_weight,
        "weight": event.weight,
        "verdict": _text(event.verdict),
        "reason": _text(event.reason),
        "orders": event.orders,
        "author": _text(event.author),
        "instance_id": _text(event.instance_id),
        "entry": event.SerializeToString(),
    }


def _change_columns(change: packet_pb2.ControlChange) -> Columns:
    return {
        "change_id": _text(change.change_id),
        "changed_at": _instant(change.changed_at_ns),
        "subject": _text(change.subject),
        "previous": _text(change.previous),
        "value": _text(change.value),
        "author": _text(change.author),
        "reason": _text(change.reason),
        "instance_id": _text(change.instance_id),
    }


def _refusal_columns(refused: packet_pb2.AccessRefused) -> Columns:
    return {
        "refused_at": _instant(refused.refused_at_ns),
        "plane": _text(refused.plane),
        "method": _text(refused.method),
        "peer": _text(refused.peer),
        "caller": _text(refused.caller),
        "reason": _text(refused.reason),
        "unrecorded_before": refused.unrecorded_before,
        "instance_id": _text(refused.instance_id),
    }
