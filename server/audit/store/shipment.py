"""Journal rows taken apart into the columns of SQL: what a journal entry holds is known here and in `decision_*.py`.

Decisions come as columns and stay columns (`decision_columns.py`), or become rows at once (`decision_rows.py`).
Outcomes, pairs of scores and the rows themselves are gathered by column, too. What is rare is gathered row by row.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from pretrade.audit.v1 import audit_pb2, packet_pb2
from server.audit.store.columns import EPOCH, Columns, days, microseconds
from server.audit.store.decision_columns import (
    REASONS,
    DecisionColumns,
    all_storable,
    batch_of_one,
    names_of,
    short_names,
    storable,
)
from server.audit.store.decision_rows import DecisionRows
from server.journal.entries import entry_of, part_counts
from server.journal.journal_file import Row
from server.journal.reply_status import REPLIED, is_of_repeats, reply_of

RowValues = dict[str, Any]
"""One row of a table, by column, as SQLAlchemy takes it."""

_FIRST_INSTANT: Final = microseconds(dt.datetime.min.replace(tzinfo=dt.UTC))
_LAST_INSTANT: Final = microseconds(dt.datetime.max.replace(tzinfo=dt.UTC))
"""What both databases can store."""

_HEARD: Final = short_names(audit_pb2.HeardAction)
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
        for_copy: Whether decisions may become `copied` rows; else all of them are `decisions`, as columns.
    """

    def __init__(self, journal_id: str, rows: Sequence[Row], *, for_copy: bool = False) -> None:
        self.statuses: list[RowValues] = []
        self.repeats: list[RowValues] = []
        self.changes: list[RowValues] = []
        self.settings: list[RowValues] = []
        self.canary_events: list[RowValues] = []
        self.refusals: list[RowValues] = []
        self.copied: Final = DecisionRows()
        """Decisions that are in none of the columns."""
        decisions = DecisionColumns()
        outcomes: list[tuple[Any, ...]] = []
        pairs: list[tuple[Any, ...]] = []
        parts: list[tuple[Any, ...]] = []
        for row in rows:
            if for_copy and self.copied.take(row.entry, row.position):
                continue
            try:
                entry = entry_of(row.entry)
                kind = entry.WhichOneof("entry")
                if kind == "decisions":
                    decisions.add(entry.decisions, row.position)
                    parts += _parts(entry.decisions)
                elif kind == "decision":
                    batch = batch_of_one(entry.decision)
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
                decision_id = storable(entry.reply_heard.decision_id)
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
        decision_id, status = storable(note.decision_id), storable(reply.status)
        action, reasons = _HEARD[reply.heard_action], list(names_of(reply.heard_reasons, REASONS))
        if is_of_repeats(status):
            heard = {"reply_status": status, "heard_action": action, "heard_reasons": reasons}
            self.repeats.append({"decision_id": decision_id} | heard | at)
        else:
            new = {"new_status": status, "new_action": action, "new_reasons": reasons}
            self.statuses.append({"of_decision_id": decision_id} | new)

    def days(self) -> set[dt.date]:
        """The days of its decisions."""
        return days(self.decisions.values["decided_at"]) | self.copied.days()

    def keyed(self) -> set[str]:
        """The ids of its decisions whose calls have an idempotency key."""
        values = self.decisions.values
        keys = zip(values["decision_id"], values["idempotency_key"], strict=True)
        return self.copied.keyed | {decision_id for decision_id, key in keys if key is not None}

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
        columns[name] = all_storable(columns[name])
    return Columns(len(rows), columns, dict(same))


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
    return {"config_hash": storable(settings.config_hash), "entry": settings.SerializeToString()}


def _canary_values(event: packet_pb2.CanaryEvent) -> RowValues:
    return {
        "event_id": storable(event.event_id),
        "canary_id": storable(event.canary_id),
        "at": _datetime(event.at_ns),
        "event": storable(event.event),
        "model_version": storable(event.model_version),
        "champion_version": storable(event.champion_version),
        "previous_weight": event.previous_weight,
        "weight": event.weight,
        "verdict": storable(event.verdict),
        "reason": storable(event.reason),
        "orders": event.orders,
        "author": storable(event.author),
        "instance_id": storable(event.instance_id),
        "entry": event.SerializeToString(),
    }


def _change_values(change: packet_pb2.ControlChange) -> RowValues:
    return {
        "change_id": storable(change.change_id),
        "changed_at": _datetime(change.changed_at_ns),
        "subject": storable(change.subject),
        "previous": storable(change.previous),
        "value": storable(change.value),
        "author": storable(change.author),
        "reason": storable(change.reason),
        "instance_id": storable(change.instance_id),
    }


def _refusal_values(refused: packet_pb2.AccessRefused) -> RowValues:
    return {
        "refused_at": _datetime(refused.refused_at_ns),
        "plane": storable(refused.plane),
        "method": storable(refused.method),
        "peer": storable(refused.peer),
        "caller": storable(refused.caller),
        "reason": storable(refused.reason),
        "unrecorded_before": refused.unrecorded_before,
        "instance_id": storable(refused.instance_id),
    }
