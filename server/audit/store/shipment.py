"""Journal rows taken apart into the columns of SQL: the one place that knows what a journal entry holds.

Decisions come as columns and stay columns (`_Decisions`): nothing is made of a decision by itself. Outcomes, pairs of
scores and the rows themselves are gathered by column, too. What is rare is gathered row by row.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.columns import EPOCH, NO_INTEGER, Columns, Group, days, microseconds
from server.journal.entries import NO_AGE, entry_of, part_counts
from server.journal.journal_file import Row
from server.journal.reply_status import REPLIED, is_of_repeats, reply_of

RowValues = dict[str, Any]
"""One row of a table, by column, as SQLAlchemy takes it."""

_FIRST_INSTANT: Final = microseconds(dt.datetime.min.replace(tzinfo=dt.UTC))
_LAST_INSTANT: Final = microseconds(dt.datetime.max.replace(tzinfo=dt.UTC))
"""What both databases can store."""

_TEXTS: Final = frozenset(("decision_id", "reporter", "challenger_version", "champion_version", "model_version"))
"""Columns of text that somebody else may have chosen."""
_OUTCOME_NAMES: Final = (
    *("decision_id", "reporter", "recorded_at", "filled_quantity", "fill_price", "markout_bps", "journal_position"),
)
_PART_NAMES: Final = ("decision_id", "part", "model_version", "weight", "score", "decided_at")
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
        decisions = _Decisions()
        outcomes: list[tuple[Any, ...]] = []
        pairs: list[tuple[Any, ...]] = []
        parts: list[tuple[Any, ...]] = []
        for row in rows:
            try:
                entry = entry_of(row.entry)
                kind = entry.WhichOneof("entry")
                if kind == "decisions":
                    decisions.add(entry.decisions, row.position)
                    parts += _parts(entry.decisions)
                elif kind == "decision":
                    batch = _batch_of_one(entry.decision)
                    decisions.add(batch, row.position)
                    parts += _parts(batch)
                elif kind == "outcome":
                    outcomes.append(_outcome(entry.outcome, row.position))
                elif kind == "score_pairs":
                    pairs += _pairs(entry.score_pairs)
                elif kind is not None:
                    self._add_rare(kind, entry, {"journal_id": journal_id, "journal_position": row.position})
            except (ValueError, OverflowError, KeyError):  # a KeyError: a value without a name
                continue
        in_journal = {"journal_id": journal_id}
        positions, entries, hashes = zip(*rows, strict=True)
        self.entries: Final = Columns(
            len(rows), {"position": positions, "entry": entries, "hash": hashes}, dict(in_journal)
        )
        """What was written, as it was written."""
        self.decisions: Final = decisions.columns(in_journal | {"reply_status": REPLIED})
        self.outcomes: Final = _columns(_OUTCOME_NAMES, outcomes, in_journal)
        self.pairs: Final = _columns(_PAIR_NAMES, pairs, {})
        self.parts: Final = _columns(_PART_NAMES, parts, {})

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
        if is_of_repeats(status):
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
    return Columns(len(rows), columns, dict(same))


class _Decisions:
    """The decisions of a shipment, by column."""

    def __init__(self) -> None:
        self._orders = Group(("instrument", "side", "strategy"))
        self._answers = Group(
            (
                *("action", "source", "reasons", "degradations", "model_name", "model_version", "threshold"),
                *("heard_action", "heard_reasons"),  # as decided, until an entry says otherwise
            )
        )
        self._servers = Group(("instance_id", "config_hash", "durability"))
        self._texts: dict[str, list[str]] = {"decision_id": [], "order_ref": [], "idempotency_key": []}
        self._numbers: dict[str, list[float]] = {
            "quantity": [],
            "limit_price": [],
            "score": [],
            "used_us": [],
            "allowed_us": [],
            "journal_position": [],
            "journal_row": [],
        }
        self._decided_at_ns: list[int] = []
        self._feature_age_ns: list[int] = []

    def add(self, batch: packet_pb2.DecisionBatch, position: int) -> None:
        """Adds the decisions of an entry.

        Raises:
            KeyError: One of them has a value without a name; none was added.
        """
        rows = len(batch.decision_id)
        shared = batch.shared
        orders = [_order_part(order) for order in (pb.Order(), *batch.orders)]
        answers = [_answer_part(answer.decision) for answer in (packet_pb2.DecisionPacket(), *batch.answers)]
        self._choose(self._orders, orders, batch.order)
        self._choose(self._answers, answers, batch.answer)
        server = (_text(shared.instance_id), _text(shared.config_hash), _text(shared.durability))
        self._servers.choice += [self._servers.number(server)] * rows
        self._texts["decision_id"] += batch.decision_id
        self._texts["order_ref"] += batch.order_ref
        self._texts["idempotency_key"] += batch.idempotency_key or [""] * rows
        numbers = self._numbers
        numbers["quantity"] += batch.quantity
        numbers["limit_price"] += batch.limit_price
        numbers["score"] += batch.score
        numbers["used_us"] += batch.used_us
        numbers["allowed_us"] += batch.allowed_us
        numbers["journal_position"] += [position] * rows
        numbers["journal_row"] += range(rows)
        self._decided_at_ns += batch.decided_at_ns
        self._feature_age_ns += batch.feature_age_ns

    def _choose(self, group: Group, parts: Sequence[tuple[Any, ...]], choice: Iterable[int]) -> None:
        """Adds rows that chose from some parts."""
        chosen = set(choice)
        numbers = [group.number(part) if number in chosen else 0 for number, part in enumerate(parts)]
        group.choice += map(numbers.__getitem__, choice)

    def columns(self, same: RowValues) -> Columns:
        """All of them."""
        import numpy as np  # noqa: PLC0415 - readers do not need it

        texts: dict[str, Sequence[Any]] = {name: _without_nul(values) for name, values in self._texts.items()}
        texts["idempotency_key"] = [key or None for key in texts["idempotency_key"]]
        ages = np.array(self._feature_age_ns, np.int64)
        numbers: dict[str, Any] = {
            "decided_at": np.array(self._decided_at_ns, np.int64) // 1_000,
            "feature_age_us": np.where(ages == NO_AGE, NO_INTEGER, np.sign(ages) * (np.abs(ages) // 1_000)),
        }
        groups = [self._orders, self._answers, self._servers]
        return Columns(len(self._decided_at_ns), {**self._numbers, **numbers, **texts}, dict(same), groups)


def _batch_of_one(packet: packet_pb2.DecisionPacket) -> packet_pb2.DecisionBatch:
    """A decision that is an entry by itself, with the columns that SQL gets.

    Raises:
        ValueError: It has an instant that no column can hold.
    """
    order, decision = packet.order, packet.decision
    age = decision.feature_age.ToNanoseconds() if decision.HasField("feature_age") else NO_AGE
    return packet_pb2.DecisionBatch(
        shared=packet,
        orders=[order],
        answers=[packet_pb2.DecisionPacket(decision=decision, parts=packet.parts)],
        decision_id=[decision.decision_id],
        order_ref=[order.order_ref],
        idempotency_key=[order.idempotency_key],
        order=[1],
        quantity=[order.quantity],
        limit_price=[order.limit_price if order.HasField("limit_price") else math.nan],
        answer=[1],
        score=[decision.score if decision.HasField("score") else math.nan],
        feature_age_ns=[age],
        decided_at_ns=[decision.decided_at.seconds * 1_000_000_000 + decision.decided_at.nanos],
        allowed_us=[decision.budget.allowed_us],
        used_us=[decision.budget.used_us],
        part_score=[part.score for part in packet.parts],
    )


def _parts(batch: packet_pb2.DecisionBatch) -> list[tuple[Any, ...]]:
    """The values of `_PART_NAMES`, for each part of each ensemble that scored."""
    rows, at = [], 0
    for row, count in enumerate(part_counts(batch) if batch.part_score else ()):
        about = batch.answers[batch.answer[row] - 1].parts if count else ()
        decided_at = batch.decided_at_ns[row] // 1_000
        for place, (part, score) in enumerate(zip(about, batch.part_score[at : at + count], strict=True)):
            one = (place, part.model_version, _number(part.weight), _number(score), decided_at)
            rows.append((batch.decision_id[row], *one))
        at += count
    return rows


def _order_part(order: pb.Order) -> tuple[Any, ...]:
    return _text(order.instrument), _SIDES[order.side], _text(order.strategy)


def _answer_part(decision: pb.Decision) -> tuple[Any, ...]:
    action, reasons = _ACTIONS[decision.action], _names(decision.reasons, _REASONS)
    return (
        action,
        _SOURCES[decision.source],
        reasons,
        _names(decision.degradations, _DEGRADATIONS),
        _text(decision.model_name),
        _text(decision.model_version),
        # One object stands for all NaN: others are unequal, and would be a part each.
        decision.threshold if decision.HasField("threshold") and decision.threshold == decision.threshold else math.nan,
        action,
        reasons,
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
