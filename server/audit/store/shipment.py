"""Journal rows taken apart into the columns of SQL: the one place that knows what a journal entry holds.

A decision's columns are gathered by column, since there are many of them: see `Columns`. So are outcomes, pairs of
scores and the rows themselves. What is rare is gathered row by row.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.columns import EPOCH, NO_INTEGER, Columns, days, microseconds
from server.journal.journal_file import Row
from server.journal.reply_status import REPLIED, WITHDRAWN, reply_of

RowValues = dict[str, Any]
"""One row of a table, by column, as SQLAlchemy takes it."""

_FIRST_INSTANT: Final = microseconds(dt.datetime.min.replace(tzinfo=dt.UTC))
_LAST_INSTANT: Final = microseconds(dt.datetime.max.replace(tzinfo=dt.UTC))
"""What both databases can store."""
_LARGEST_INTEGER: Final = 2**63 - 1

_DECISION_NAMES: Final = (
    *("order_ref", "instrument", "side", "quantity", "limit_price", "strategy", "idempotency_key"),
    *("decision_id", "action", "score", "threshold", "source", "reasons", "degradations", "model_name"),
    *("model_version", "decided_at", "feature_age_us", "used_us", "allowed_us"),
    *("instance_id", "config_hash", "durability", "journal_position"),
)
_TEXTS: Final = frozenset(
    (
        *("order_ref", "instrument", "strategy", "idempotency_key", "decision_id", "model_name", "model_version"),
        *("instance_id", "config_hash", "durability", "reporter", "challenger_version", "champion_version"),
    )
)
"""Columns of text that somebody else may have chosen."""
_of_order: Final = operator.attrgetter(
    "order_ref", "instrument", "side", "quantity", "limit_price", "strategy", "idempotency_key"
)
_of_decision: Final = operator.attrgetter(
    "decision_id", "action", "score", "threshold", "source", "model_name", "model_version"
)
_of_packet: Final = operator.attrgetter("instance_id", "config_hash", "durability")
_OUTCOME_NAMES: Final = (
    *("decision_id", "reporter", "recorded_at", "filled_quantity", "fill_price", "markout_bps", "journal_position"),
)
_PAIR_NAMES: Final = (
    *("decision_id", "challenger_version", "champion_version", "champion_score", "challenger_score"),
    *("champion_trades", "challenger_trades", "challenger_decided", "challenger_us", "recorded_at"),
)


class Shipment:
    """Rows of a journal, as the rows of each table.

    A row of another format becomes evidence and nothing else: it must not stop those behind it.

    Args:
        journal_id: Their journal.
        rows: At least one.
    """

    def __init__(self, journal_id: str, rows: Sequence[Row]) -> None:
        self.statuses: list[RowValues] = []
        self.repeats: list[RowValues] = []
        self.changes: list[RowValues] = []
        self.settings: list[RowValues] = []
        self.canary_events: list[RowValues] = []
        self.refusals: list[RowValues] = []
        decisions: list[tuple[Any, ...]] = []
        outcomes: list[tuple[Any, ...]] = []
        pairs: list[tuple[Any, ...]] = []
        parse = packet_pb2.JournalEntry.FromString
        for row in rows:
            try:
                entry = parse(row.entry)
                kind = entry.WhichOneof("entry")
                if kind == "decision":
                    decisions.append(_decision(entry.decision, row.position))
                elif kind == "outcome":
                    outcomes.append(_outcome(entry.outcome, row.position))
                elif kind == "score_pairs":
                    pairs += _pairs(entry.score_pairs)
                elif kind is not None:
                    self._add_rare(kind, entry, {"journal_id": journal_id, "journal_position": row.position})
            except (DecodeError, ValueError, OverflowError, KeyError):  # a KeyError: a value without a name
                continue
        in_journal = {"journal_id": journal_id}
        positions, entries, hashes = zip(*rows, strict=True)
        self.entries: Final = Columns(
            len(rows), {"position": positions, "entry": entries, "hash": hashes}, dict(in_journal)
        )
        """What was written, as it was written."""
        self.decisions: Final = _heard_as_decided(
            _columns(_DECISION_NAMES, decisions, in_journal | {"reply_status": REPLIED})
        )
        self.outcomes: Final = _columns(_OUTCOME_NAMES, outcomes, in_journal)
        self.pairs: Final = _columns(_PAIR_NAMES, pairs, {})

    def _add_rare(self, kind: str, entry: packet_pb2.JournalEntry, at: RowValues) -> None:
        match kind:
            case "reply_unconfirmed":
                self._add_unconfirmed(entry.reply_unconfirmed, at)
            case "reply_heard":
                decision_id = _text(entry.reply_heard.decision_id)
                as_decided = {"reply_status": REPLIED, "heard_action": None, "heard_reasons": None}
                self.repeats.append({"decision_id": decision_id} | as_decided | at)
            case "control_change":
                self.changes.append(_change_values(entry.control_change) | at)
            case "settings":
                self.settings.append(_settings_values(entry.settings))
            case "canary_event":
                self.canary_events.append(_canary_values(entry.canary_event))
            case "access_refused":
                self.refusals.append(_refusal_values(entry.access_refused) | at)

    def _add_unconfirmed(self, note: packet_pb2.ReplyUnconfirmed, at: RowValues) -> None:
        reply = reply_of(note)
        decision_id, status = _text(note.decision_id), _text(reply.status)
        action, reasons = _HEARD[reply.heard_action], list(_names(reply.heard_reasons, _REASONS))
        if status == WITHDRAWN:
            heard = {"reply_status": status, "heard_action": action, "heard_reasons": reasons}
            self.repeats.append({"decision_id": decision_id} | heard | at)
        else:
            new = {"new_status": status, "new_action": action, "new_reasons": reasons}
            self.statuses.append({"of_decision_id": decision_id} | new)

    def days(self) -> set[dt.date]:
        """The days of its decisions."""
        return days(self.decisions.values["decided_at"]) if self.decisions.rows else set()

    def keyed(self) -> set[str]:
        """The ids of its decisions whose calls have an idempotency key."""
        if not self.decisions.rows:
            return set()
        values = self.decisions.values
        keys = zip(values["decision_id"], values["idempotency_key"], strict=True)
        return {decision_id for decision_id, key in keys if key is not None}

    def stamp(self, shipped_at: dt.datetime) -> None:
        """Sets when the rows are shipped."""
        for columns in (self.entries, self.decisions):
            columns.same["shipped_at"] = microseconds(shipped_at)
        for row in self.repeats:
            row["shipped_at"] = shipped_at


def _columns(names: Sequence[str], rows: list[tuple[Any, ...]], same: RowValues) -> Columns:
    values: Iterable[Sequence[Any]] = zip(*rows, strict=True) if rows else ((),) * len(names)
    columns = dict(zip(names, values, strict=True))
    for name in _TEXTS & columns.keys():
        columns[name] = _without_nul(columns[name])
    if "idempotency_key" in columns:
        columns["idempotency_key"] = [key or None for key in columns["idempotency_key"]]
    return Columns(len(rows), columns, dict(same))


def _heard_as_decided(decisions: Columns) -> Columns:
    """Adds what callers heard: the decisions, until an entry says otherwise."""
    values = decisions.values
    values["heard_action"], values["heard_reasons"] = values["action"], values["reasons"]
    return decisions


def _decision(packet: packet_pb2.DecisionPacket, position: int) -> tuple[Any, ...]:
    """The values of `_DECISION_NAMES`."""
    order, decision = packet.order, packet.decision
    order_ref, instrument, side, quantity, limit_price, strategy, key = _of_order(order)
    decision_id, action, score, threshold, source, model_name, model_version = _of_decision(decision)
    # A value that is not zero is there, and needs no second question.
    limit_price = limit_price if limit_price or order.HasField("limit_price") else math.nan
    score = score if score or decision.HasField("score") else math.nan
    threshold = threshold if threshold or decision.HasField("threshold") else math.nan
    at, budget, age = decision.decided_at, decision.budget, NO_INTEGER
    if decision.HasField("feature_age"):
        age = _integer(decision.feature_age.ToMicroseconds())
    return (
        order_ref,
        instrument,
        _SIDES[side],
        quantity,
        limit_price,
        strategy,
        key,
        decision_id,
        _ACTIONS[action],
        score,
        threshold,
        _SOURCES[source],
        _names(decision.reasons, _REASONS),
        _names(decision.degradations, _DEGRADATIONS),
        model_name,
        model_version,
        _instant(at.seconds * 1_000_000 + at.nanos // 1_000),
        age,
        budget.used_us,
        budget.allowed_us,
        *_of_packet(packet),
        position,
    )


def _names(values: Sequence[int], short_names: Mapping[int, str]) -> tuple[str, ...]:
    return tuple([short_names[value] for value in values]) if values else ()


def _outcome(outcome: packet_pb2.Outcome, position: int) -> tuple[Any, ...]:
    """The values of `_OUTCOME_NAMES`."""
    return (
        outcome.decision_id,
        outcome.reporter,
        _instant(outcome.recorded_at_ns // 1000),
        _number(outcome.filled_quantity),
        outcome.fill_price if outcome.HasField("fill_price") else math.nan,
        outcome.markout_bps if outcome.HasField("markout_bps") else math.nan,
        position,
    )


def _pairs(entry: packet_pb2.ScorePairs) -> list[tuple[Any, ...]]:
    """The values of `_PAIR_NAMES`, for each pair."""
    return [
        (
            pair.decision_id,
            pair.challenger_version,
            pair.champion_version,
            _number(pair.champion_score),
            _number(pair.challenger_score),
            pair.champion_trades,
            pair.challenger_trades,
            pair.challenger_decided,
            pair.challenger_us,
            _instant(pair.recorded_at_ns // 1000),
        )
        for pair in entry.pairs
    ]


def _short_names(enum: Any) -> dict[int, str]:
    return {number: enum_name(enum, number) for number in enum.values()}


_SIDES: Final = _short_names(pb.Side)
_ACTIONS: Final = _short_names(pb.Action)
_HEARD: Final = _short_names(audit_pb2.HeardAction)
_SOURCES: Final = _short_names(pb.Source)
_REASONS: Final = _short_names(pb.ReasonCode)
_DEGRADATIONS: Final = _short_names(pb.Degradation)


def _text(value: str) -> str:
    """As PostgreSQL can store it: without NUL characters. The evidence keeps them."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _without_nul(values: Sequence[str]) -> Sequence[str]:
    """The same for a whole column, which hardly ever has any."""
    return [_text(value) for value in values] if "\0" in "".join(values) else values


def _number(value: float) -> float:
    """A number for a column that must hold one."""
    if math.isnan(value):
        raise ValueError("not a number")
    return value


def _integer(value: int) -> int:
    """An integer that both databases can store."""
    if abs(value) > _LARGEST_INTEGER:
        raise ValueError("a number that no column can hold")
    return value


def _instant(microseconds: int) -> int:
    """An instant that both databases can store."""
    if not _FIRST_INSTANT <= microseconds <= _LAST_INSTANT:
        raise ValueError("an instant that no column can hold")
    return microseconds


def _datetime(nanoseconds: int) -> dt.datetime:
    return EPOCH + dt.timedelta(microseconds=nanoseconds // 1000)


def _settings_values(settings: packet_pb2.SettingsInForce) -> RowValues:
    return {"config_hash": _text(settings.config_hash), "entry": settings.SerializeToString()}


def _canary_values(event: packet_pb2.CanaryEvent) -> RowValues:
    return {
        "event_id": _text(event.event_id),
        "canary_id": _text(event.canary_id),
        "at": _datetime(event.at_ns),
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


def _change_values(change: packet_pb2.ControlChange) -> RowValues:
    return {
        "change_id": _text(change.change_id),
        "changed_at": _datetime(change.changed_at_ns),
        "subject": _text(change.subject),
        "previous": _text(change.previous),
        "value": _text(change.value),
        "author": _text(change.author),
        "reason": _text(change.reason),
        "instance_id": _text(change.instance_id),
    }


def _refusal_values(refused: packet_pb2.AccessRefused) -> RowValues:
    return {
        "refused_at": _datetime(refused.refused_at_ns),
        "plane": _text(refused.plane),
        "method": _text(refused.method),
        "peer": _text(refused.peer),
        "caller": _text(refused.caller),
        "reason": _text(refused.reason),
        "unrecorded_before": refused.unrecorded_before,
        "instance_id": _text(refused.instance_id),
    }
