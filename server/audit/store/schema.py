"""The tables of the audit database, and how a database gets them.

`journal_entries` holds every row of every journal as it was written, with its hash, so the chain can be verified long
after the journal was trimmed. `decisions` and `control_changes` hold the same rows as columns. `shipments` says how far
each journal was shipped, and where its evidence begins since older days were removed. Outcomes are in `outcomes.py`,
refusals in `refusals.py`, canaries in `canaries.py`; the migration creates all of them.

Only the Alembic migrations in `migrations/` create and change the tables. The definitions here are what queries use; a
test checks that both are the same. In PostgreSQL `decisions` is partitioned by the day of `decided_at` and
`journal_entries` by the day of `shipped_at`, which never decreases along a journal: removing the oldest days therefore
always cuts the front off a chain. Control changes are few and are never removed.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from server.errors import SchemaUnknownError

METADATA: Final = sa.MetaData()
_NAMES: Final = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
"""A JSON list of enum names without their prefix, for example `["SCORE_BELOW_THRESHOLD"]`."""
_INSTANT: Final = sa.DateTime(timezone=True)
"""UTC; SQLite gives it back without a time zone."""
_MIGRATION_LOCK: Final = 0x5052_4554
"""Key of PostgreSQL's advisory lock: several servers start at once."""

SHIPMENTS: Final = sa.Table(
    "shipments",
    METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False, comment="the last row shipped"),
    sa.Column("hash", sa.LargeBinary, nullable=False, comment="its hash"),
    sa.Column("shipped_at", _INSTANT, nullable=False, comment="when; never decreases"),
    sa.Column("anchor_position", sa.BigInteger, nullable=False, comment="the row before the first one kept"),
    sa.Column("anchor_hash", sa.LargeBinary, nullable=False, comment="its hash"),
    sa.Column("slot", sa.String, comment="where the journal is written, `host:path`"),
    sa.Column("started_at", _INSTANT, nullable=False, comment="when the journal was first seen here"),
    sa.Column("predecessor_id", sa.String, comment="the journal that was written there before"),
    sa.Column("stated_head", sa.LargeBinary, comment="pretrade.audit.v1.JournalHead, the last that the server stated"),
    sa.Column("written_off", sa.String, comment="who gave its missing end up as lost, and why"),
    sa.Column(
        "missed_position",
        sa.BigInteger,
        nullable=False,
        comment="rows up to this one were gone from the journal before it was first seen here; 0 for none",
    ),
    sa.Column("missed_written_off", sa.String, comment="who gave up the rows up to there, and why"),
)

VERIFICATIONS: Final = sa.Table(
    "verifications",
    METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False, comment="every row up to this one was verified"),
    sa.Column("hash", sa.LargeBinary, nullable=False, comment="its hash"),
    sa.Column("verified_at", _INSTANT, nullable=False),
)

JOURNAL_ENTRIES: Final = sa.Table(
    "journal_entries",
    METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("entry", sa.LargeBinary, nullable=False, comment="pretrade.audit.v1.JournalEntry"),
    sa.Column("hash", sa.LargeBinary, nullable=False, comment="sha256(hash of the row before + entry)"),
    sa.Column("shipped_at", _INSTANT, nullable=False, comment="partition key"),
)

DECISIONS: Final = sa.Table(
    "decisions",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("decided_at", _INSTANT, nullable=False, comment="partition key"),
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
    sa.Column("heard_action", sa.String, nullable=False, comment="what the caller heard: an action, NOTHING, UNKNOWN"),
    sa.Column("heard_reasons", _NAMES, nullable=False, comment="the reasons that the caller heard"),
    sa.Column("journal_id", sa.String, nullable=False),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
    sa.Column("journal_row", sa.BigInteger, nullable=False, comment="which of the entry's decisions, counted from 0"),
    sa.Column("shipped_at", _INSTANT, nullable=False, comment="that of its journal entry"),
)

REPEATS: Final = sa.Table(
    "repeats",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True, comment="a repeat of its call heard it, or something safer"),
    sa.Column("reply_status", sa.String, nullable=False, comment="holds over what is said of the first reply"),
    sa.Column("heard_action", sa.String, comment="null: as decided"),
    sa.Column("heard_reasons", _NAMES, comment="null: as decided"),
    sa.Column("journal_id", sa.String, nullable=False, comment="of the process that answered the repeat"),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
    sa.Column("shipped_at", _INSTANT, nullable=False),
)
"""Rare: only of decisions that were withdrawn, whose first caller may not have heard them, or that another process had
made."""

PART_SCORES: Final = sa.Table(
    "part_scores",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("part", sa.BigInteger, primary_key=True, autoincrement=False, comment="its place, counted from 0"),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("weight", sa.Double, nullable=False, comment="its share of a mean; in a stack, of its margin"),
    sa.Column("score", sa.Double, nullable=False, comment="calibrated, as that version alone would give it"),
    sa.Column("decided_at", _INSTANT, nullable=False),
)
"""What each part of an ensemble said of an order that it scored. Rows are removed with the days of their decisions."""

CONTROL_CHANGES: Final = sa.Table(
    "control_changes",
    METADATA,
    sa.Column("change_id", sa.String, primary_key=True),
    sa.Column("changed_at", _INSTANT, nullable=False),
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("previous", sa.String, nullable=False),
    sa.Column("value", sa.String, nullable=False),
    sa.Column("author", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("instance_id", sa.String, nullable=False),
    sa.Column("journal_id", sa.String, nullable=False),
    sa.Column("journal_position", sa.BigInteger, nullable=False),
)

ENTRY_OF_DECISION: Final = sa.and_(
    JOURNAL_ENTRIES.c.journal_id == DECISIONS.c.journal_id,
    JOURNAL_ENTRIES.c.position == DECISIONS.c.journal_position,
    JOURNAL_ENTRIES.c.shipped_at == DECISIONS.c.shipped_at,
)
"""Joins a decision with its evidence, and tells PostgreSQL in which partition that is."""


def migrate(engine: sa.Engine) -> tuple[str | None, str]:
    """Brings the tables to the newest revision; all of it or nothing, and nothing when they are there already.

    Returns:
        The revision before, None for an empty database, and the one after.

    Raises:
        SchemaUnknownError: The database is of a newer version of pretrade.
        sqlalchemy.exc.SQLAlchemyError: The database cannot be reached or refuses.
    """
    # Alembic takes longer to load than all that a query needs, and only this needs it.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "server.audit.store:migrations")
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))  # others may hold the lock for long
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config.attributes["connection"] = connection
        before = MigrationContext.configure(connection).get_current_revision()
        newest = ScriptDirectory.from_config(config).get_current_head()
        assert newest is not None
        if before != newest:
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise SchemaUnknownError(f"the audit database has revision {before}, newer than {newest}") from error
    return before, newest
