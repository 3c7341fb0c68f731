"""The audit in SQL: what was shipped from the journals, as evidence and as columns to query.

`journal_entries` holds every row of every journal as it was written, with its hash, so the chain can be verified long
after the journal was trimmed. `decisions` and `control_changes` are the same rows taken apart. `shipments` says how
far each journal was shipped, and moves in the same transaction as the rows: a crash anywhere repeats nothing and loses
nothing. SQLite and PostgreSQL.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from google.protobuf.message import DecodeError
from sqlalchemy.dialects import postgresql, sqlite

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.errors import JournalCorrupted
from server.audit.journal_file import GENESIS, Head, Row, follow

_METADATA: Final = sa.MetaData()
_NAMES: Final = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
"""A JSON list of enum names without their prefix, for example `["SCORE_BELOW_THRESHOLD"]`."""
_INSTANT: Final = sa.DateTime(timezone=True)
"""UTC; SQLite gives it back without a time zone."""

SHIPMENTS: Final = sa.Table(
    "shipments",
    _METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False, comment="the last row shipped"),
    sa.Column("hash", sa.LargeBinary, nullable=False, comment="its hash"),
)

JOURNAL_ENTRIES: Final = sa.Table(
    "journal_entries",
    _METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False, comment="pretrade.audit.v1.JournalEntry"),
    sa.Column("hash", sa.LargeBinary, nullable=False, comment="sha256(hash of the row before + entry)"),
)

DECISIONS: Final = sa.Table(
    "decisions",
    _METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("decided_at", _INSTANT, nullable=False, index=True),
    sa.Column("order_ref", sa.String, nullable=False),
    sa.Column("instrument", sa.String, nullable=False),
    sa.Column("side", sa.String, nullable=False),
    sa.Column("quantity", sa.Double, comment="null: not a number"),
    sa.Column("limit_price", sa.Double, comment="null: a market order"),
    sa.Column("strategy", sa.String, nullable=False),
    sa.Column("idempotency_key", sa.String, comment="null: none"),
    sa.Column("action", sa.String, nullable=False),
    sa.Column("score", sa.Double, comment="null: nobody scored"),
    sa.Column("threshold", sa.Double, comment="null: nobody scored"),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("reasons", _NAMES, nullable=False),
    sa.Column("degradations", _NAMES, nullable=False),
    sa.Column("model_name", sa.String, nullable=False),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("feature_age_us", sa.BigInteger, comment="null: no features, or the caller's"),
    sa.Column("used_us", sa.BigInteger, nullable=False),
    sa.Column("allowed_us", sa.BigInteger, nullable=False),
    sa.Column("instance_id", sa.String, nullable=False),
    sa.Column("config_hash", sa.String, nullable=False),
    sa.Column("durability", sa.String, nullable=False),
    sa.Column("reply_status", sa.String, nullable=False, comment="`replied` or `reply_unconfirmed:<cause>`"),
    sa.Column("journal_id", sa.String, nullable=False),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
    sa.Index("ix_decisions_instrument_decided_at", "instrument", "decided_at"),
)

CONTROL_CHANGES: Final = sa.Table(
    "control_changes",
    _METADATA,
    sa.Column("change_id", sa.String, primary_key=True),
    sa.Column("changed_at", _INSTANT, nullable=False, index=True),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("previous", sa.String, nullable=False),
    sa.Column("value", sa.String, nullable=False),
    sa.Column("author", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("instance_id", sa.String, nullable=False),
    sa.Column("journal_id", sa.String, nullable=False),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
)

REPLIED: Final = "replied"

_SET_REPLY_STATUS: Final = (
    sa.update(DECISIONS)
    .where(DECISIONS.c.decision_id == sa.bindparam("of_decision_id"))
    .values(reply_status=sa.bindparam("new_status"))
)
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_READ_ROWS: Final = 1000

Columns = Mapping[str, Any]
"""Column values of one row; their types are the table's."""


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision as SQL holds it."""

    row: Row
    journal_id: str
    reply_status: str


class Store:
    """The audit database; used by one thread.

    Every method raises `sqlalchemy.exc.SQLAlchemyError` when the database cannot be reached or refuses.

    Args:
        url: SQLAlchemy URL, for example `sqlite:///audit.db` or `postgresql+psycopg://user@host/database`.

    Raises:
        ValueError: The URL is malformed, or of a database that is neither SQLite nor PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        insert = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        self._inserts: dict[sa.Table, Any] = {
            table: insert(table).on_conflict_do_nothing() for table in _METADATA.sorted_tables
        }

    def create_tables(self) -> None:
        """Creates the tables that are missing."""
        _METADATA.create_all(self._engine)

    def shipped(self, journal_id: str, start: Head) -> Head:
        """How far this journal was shipped; a journal not seen before counts as shipped up to `start`."""
        with self._engine.begin() as connection:
            connection.execute(
                self._inserts[SHIPMENTS],
                {"journal_id": journal_id, "position": start.position, "hash": start.hash},
            )
            query = sa.select(SHIPMENTS.c.position, SHIPMENTS.c.hash).where(SHIPMENTS.c.journal_id == journal_id)
            row = connection.execute(query).one()
            return Head(row.position, row.hash)

    def write(self, journal_id: str, shipped: Head, rows: Sequence[Row]) -> bool:
        """Stores the rows that follow `shipped`, in one transaction.

        Returns:
            False, with nothing stored, when `shipped` is not how far the journal was shipped: somebody else was faster.
        """
        with self._engine.begin() as connection:
            # First, so that this row's lock keeps two shippers of one journal apart.
            advance = (
                sa.update(SHIPMENTS)
                .where(SHIPMENTS.c.journal_id == journal_id, SHIPMENTS.c.position == shipped.position)
                .values(position=rows[-1].position, hash=rows[-1].hash)
            )
            if connection.execute(advance).rowcount != 1:
                return False
            decisions: list[Columns] = []
            statuses: list[Columns] = []
            changes: list[Columns] = []
            for row in rows:
                at: Columns = {"journal_id": journal_id, "journal_position": row.position}
                try:
                    entry = packet_pb2.JournalEntry.FromString(row.entry)
                    if entry.HasField("decision"):
                        decisions.append({**_decision_columns(entry.decision), **at})
                    elif entry.HasField("reply_unconfirmed"):
                        statuses.append(_status_columns(entry.reply_unconfirmed))
                    elif entry.HasField("control_change"):
                        changes.append({**_change_columns(entry.control_change), **at})
                except (DecodeError, ValueError, OverflowError):
                    continue  # not of this format: kept as evidence
            evidence = [
                {"journal_id": journal_id, "position": row.position, "entry": row.entry, "hash": row.hash}
                for row in rows
            ]
            connection.execute(self._inserts[JOURNAL_ENTRIES], evidence)
            if decisions:
                connection.execute(self._inserts[DECISIONS], decisions)
            if changes:
                connection.execute(self._inserts[CONTROL_CHANGES], changes)
            if statuses:
                connection.execute(_SET_REPLY_STATUS, statuses)
        return True

    def find(self, decision_id: str) -> StoredDecision | None:
        """The decision with this id, or None."""
        entries = JOURNAL_ENTRIES.c
        query = (
            sa.select(DECISIONS.c.reply_status, entries.journal_id, entries.position, entries.entry, entries.hash)
            .join_from(
                DECISIONS,
                JOURNAL_ENTRIES,
                sa.and_(entries.journal_id == DECISIONS.c.journal_id, entries.position == DECISIONS.c.journal_position),
            )
            .where(DECISIONS.c.decision_id == decision_id)
        )
        with self._engine.connect() as connection:
            found = connection.execute(query).one_or_none()
        if found is None:
            return None
        return StoredDecision(Row(found.position, found.entry, found.hash), found.journal_id, found.reply_status)

    def journals(self) -> dict[str, Head]:
        """How far each journal was shipped, by journal id."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(SHIPMENTS).order_by(SHIPMENTS.c.journal_id)).all()
        return {row.journal_id: Head(row.position, row.hash) for row in rows}

    def verify(self, journal_id: str) -> tuple[int, int]:
        """Walks every shipped row of a journal and checks it against the chain.

        Returns:
            The first and the last position; (0, 0) without rows.

        Raises:
            JournalCorrupted: A row is missing or was changed; with its position.
        """
        first = 0
        head: Head | None = None
        with self._engine.connect() as connection:
            shipped = connection.execute(sa.select(SHIPMENTS).where(SHIPMENTS.c.journal_id == journal_id)).one()
            entries = JOURNAL_ENTRIES.c
            query = (
                sa.select(entries.position, entries.entry, entries.hash)
                # Not what is shipped while we read.
                .where(entries.journal_id == journal_id, entries.position <= shipped.position)
                .order_by(entries.position)
            )
            with connection.execution_options(yield_per=_READ_ROWS).execute(query) as found:
                for position, entry, digest in found:
                    row = Row(position, entry, digest)
                    if head is None:
                        first = position
                        # What came before was trimmed before this database was used: its hash is taken on trust.
                        head = Head(position, digest) if position > 1 else follow(Head(0, GENESIS), row)
                    else:
                        head = follow(head, row)
        if head is not None and head != Head(shipped.position, shipped.hash):
            raise JournalCorrupted(head.position + 1, f"missing; {shipped.position} rows were shipped")
        return first, head.position if head else 0

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ValueError("the database URL is malformed") from error  # without the URL: it may hold a password
    match parsed.get_backend_name():
        case "sqlite":
            engine = sa.create_engine(parsed, connect_args={"timeout": 10.0})
            sa.event.listen(engine, "connect", _let_sqlite_readers_in)
        case "postgresql":
            # A server that has vanished is noticed: by the time of a statement, or of unacknowledged data.
            engine = sa.create_engine(
                parsed,
                pool_pre_ping=True,
                connect_args={
                    "connect_timeout": 5,
                    "tcp_user_timeout": 10_000,
                    "application_name": "pretrade-audit",
                    "options": "-c statement_timeout=30000",
                },
            )
        case other:
            raise ValueError(f"the audit store speaks SQLite and PostgreSQL, not {other}")
    return engine


def _let_sqlite_readers_in(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA journal_mode = WAL")


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
        "side": pb.Side.Name(order.side).removeprefix("SIDE_"),
        "quantity": _number(order.quantity),
        "limit_price": _number(order.limit_price) if order.HasField("limit_price") else None,
        "strategy": _text(order.strategy),
        "idempotency_key": _text(order.idempotency_key) or None,
        "action": pb.Action.Name(decision.action).removeprefix("ACTION_"),
        "score": _number(decision.score) if decision.HasField("score") else None,
        "threshold": _number(decision.threshold) if decision.HasField("threshold") else None,
        "source": pb.Source.Name(decision.source).removeprefix("SOURCE_"),
        "reasons": [pb.ReasonCode.Name(reason).removeprefix("REASON_CODE_") for reason in decision.reasons],
        "degradations": [pb.Degradation.Name(one).removeprefix("DEGRADATION_") for one in decision.degradations],
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


def _status_columns(unconfirmed: packet_pb2.ReplyUnconfirmed) -> Columns:
    return {
        "of_decision_id": _text(unconfirmed.decision_id),
        "new_status": unconfirmed_status(unconfirmed.cause),
    }


def unconfirmed_status(cause: str) -> str:
    """The reply status of a decision whose reply is unconfirmed for this cause."""
    return f"reply_unconfirmed:{_text(cause)}"


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
