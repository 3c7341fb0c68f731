"""What becomes known after a decision, in SQL: outcomes, labels, and the settings that packets name.

`outcomes` holds what execution systems reported; these reports pass through the journal as decisions do. `labels` holds
what the market shows, computed from recorded events; it can be computed again. `settings_in_force` holds each
configuration once, by its hash. None of them is partitioned: a replay needs settings for as long as there are packets.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.store.newest import CLOCK_ERROR
from server.audit.store.schema import DECISIONS, METADATA
from server.decision.ids import id_bound

_INSTANT: Final = sa.DateTime(timezone=True)

SETTINGS: Final = sa.Table(
    "settings_in_force",
    METADATA,
    sa.Column("config_hash", sa.String, primary_key=True),
    sa.Column("entry", sa.LargeBinary, nullable=False, comment="pretrade.audit.v1.SettingsInForce"),
)

OUTCOMES: Final = sa.Table(
    "outcomes",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("reporter", sa.String, primary_key=True),
    sa.Column("recorded_at", _INSTANT, nullable=False),
    sa.Column("filled_quantity", sa.Double, nullable=False),
    sa.Column("fill_price", sa.Double, comment="null: nothing was filled"),
    sa.Column("markout_bps", sa.Double, comment="null: not reported"),
    sa.Column("journal_id", sa.String, nullable=False),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
)

LABELS: Final = sa.Table(
    "labels",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("horizon_seconds", sa.Double, primary_key=True),
    sa.Column("markout_bps", sa.Double, nullable=False, comment="side-signed, of the mid"),
    sa.Column("eligible", sa.Boolean, nullable=False),
)

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def find_settings(connection: sa.Connection, config_hash: str) -> packet_pb2.SettingsInForce | None:
    """The configuration with this hash."""
    entry = connection.scalar(sa.select(SETTINGS.c.entry).where(SETTINGS.c.config_hash == config_hash))
    return None if entry is None else packet_pb2.SettingsInForce.FromString(entry)


def find_outcomes(connection: sa.Connection, decision_id: str) -> list[packet_pb2.Outcome]:
    """What was reported of a decision, the oldest first."""
    query = sa.select(OUTCOMES).where(OUTCOMES.c.decision_id == decision_id).order_by(OUTCOMES.c.recorded_at)
    return [
        packet_pb2.Outcome(
            decision_id=row.decision_id,
            reporter=row.reporter,
            filled_quantity=row.filled_quantity,
            fill_price=row.fill_price,
            markout_bps=row.markout_bps,
            recorded_at_ns=_nanoseconds(row.recorded_at),
        )
        for row in connection.execute(query)
    ]


def same_outcome(one: packet_pb2.Outcome, other: packet_pb2.Outcome) -> bool:
    """True when both say the same, whenever they were recorded."""
    left, right = packet_pb2.Outcome(), packet_pb2.Outcome()
    left.CopyFrom(one)
    right.CopyFrom(other)
    left.ClearField("recorded_at_ns")
    right.ClearField("recorded_at_ns")
    return left == right


def newest_decision(connection: sa.Connection, *, labelled: bool) -> str | None:
    """The id of the newest decision, or of the newest that has a label; None without one."""
    column = LABELS.c.decision_id if labelled else DECISIONS.c.decision_id
    newest: str | None = connection.scalar(sa.select(sa.func.max(column)))
    return newest


def scored_labels(
    connection: sa.Connection,
    model_version: str,
    horizon_seconds: float,
    since: dt.datetime,
    until: dt.datetime,
    limit: int,
) -> list[sa.Row[Any]]:
    """Instrument, id, score and label of the newest decisions that a model version scored.

    Args:
        connection: To the database.
        model_version: The version.
        horizon_seconds: Of the labels.
        since: None that were made earlier.
        until: None that were made then or later.
        limit: Most decisions.
    """
    columns, label = DECISIONS.c, LABELS.c
    query = (
        sa.select(columns.instrument, columns.decision_id, columns.score, label.eligible)
        .join_from(LABELS, DECISIONS, columns.decision_id == label.decision_id)
        .where(
            label.decision_id >= id_bound(since),
            label.decision_id < id_bound(until),
            columns.decided_at.between(since - CLOCK_ERROR, until + CLOCK_ERROR),  # leaves other days alone
            label.horizon_seconds == horizon_seconds,
            columns.model_version == model_version,
            columns.score.is_not(None),
        )
        .order_by(label.decision_id.desc())
        .limit(limit)
    )
    return list(connection.execute(query))


def _nanoseconds(instant: dt.datetime) -> int:
    if instant.tzinfo is None:  # SQLite gives UTC back without saying so
        instant = instant.replace(tzinfo=dt.UTC)
    return (instant - _EPOCH) // dt.timedelta(microseconds=1) * 1000
