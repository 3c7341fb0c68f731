"""All tables of the audit database, with a partition for each day in PostgreSQL."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_NAMES = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Creates the tables."""
    postgres = op.get_context().dialect.name == "postgresql"
    _create_journal_tables(postgres)
    _create_decision_tables(postgres)
    _create_canary_tables()
    _create_control_tables()


def _create_journal_tables(postgres: bool) -> None:
    """Creates what holds the evidence: every row of every journal, and how far each was shipped and verified."""
    op.create_table(
        "shipments",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("shipped_at", _INSTANT, nullable=False),
        sa.Column("anchor_position", sa.BigInteger, nullable=False),
        sa.Column("anchor_hash", sa.LargeBinary, nullable=False),
        sa.Column("slot", sa.String),
        sa.Column("started_at", _INSTANT, nullable=False),
        sa.Column("predecessor_id", sa.String),
        sa.Column("stated_head", sa.LargeBinary),
        sa.Column("written_off", sa.String),
        sa.Column("missed_position", sa.BigInteger, nullable=False),
        sa.Column("missed_written_off", sa.String),
    )
    op.create_table(
        "verifications",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("verified_at", _INSTANT, nullable=False),
    )
    op.create_table(
        "journal_entries",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("entry", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        # A partition key must be part of the primary key.
        sa.Column("shipped_at", _INSTANT, primary_key=postgres, nullable=False),
        postgresql_partition_by="RANGE (shipped_at)",
    )
    if postgres:
        # An entry holds many decisions. PostgreSQL would compress it, which takes longer than all else of storing it.
        op.execute("ALTER TABLE journal_entries ALTER COLUMN entry SET STORAGE EXTERNAL")
        op.execute("CREATE TABLE journal_entries_other PARTITION OF journal_entries DEFAULT")
    else:
        op.create_index("ix_journal_entries_shipped_at", "journal_entries", ["shipped_at"])


def _create_decision_tables(postgres: bool) -> None:
    """Creates what is known of decisions, and what became known of them afterwards."""
    op.create_table(
        "decisions",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("decided_at", _INSTANT, primary_key=postgres, nullable=False),
        sa.Column("order_ref", sa.String, nullable=False),
        sa.Column("instrument", sa.String, nullable=False),
        sa.Column("side", sa.String, nullable=False),
        sa.Column("quantity", sa.Double),
        sa.Column("limit_price", sa.Double),
        sa.Column("strategy", sa.String, nullable=False),
        sa.Column("idempotency_key", sa.String),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("score", sa.Double),
        sa.Column("threshold", sa.Double),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("reasons", _NAMES, nullable=False),
        sa.Column("degradations", _NAMES, nullable=False),
        sa.Column("model_name", sa.String, nullable=False),
        sa.Column("model_version", sa.String, nullable=False),
        sa.Column("feature_age_us", sa.BigInteger),
        sa.Column("used_us", sa.BigInteger, nullable=False),
        sa.Column("allowed_us", sa.BigInteger, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
        sa.Column("config_hash", sa.String, nullable=False),
        sa.Column("durability", sa.String, nullable=False),
        sa.Column("reply_status", sa.String, nullable=False),
        sa.Column("heard_action", sa.String, nullable=False),
        sa.Column("heard_reasons", _NAMES, nullable=False),
        sa.Column("journal_id", sa.String, nullable=False),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
        sa.Column("journal_row", sa.BigInteger, nullable=False),
        sa.Column("shipped_at", _INSTANT, nullable=False),
        postgresql_partition_by="RANGE (decided_at)",
    )
    if postgres:
        op.execute("CREATE TABLE decisions_other PARTITION OF decisions DEFAULT")
    if postgres:
        # BRIN holds a summary of every 32 pages instead of an entry a row: the times in it, since rows arrive in order,
        # and Bloom filters of the columns that a list can be filtered by. PostgreSQL reads only the pages in which a
        # rare value may be, and writing a row costs next to nothing. The shipper has new pages summarized every minute:
        # autovacuum does too little at once, and logs a line for each time that it was asked for more.
        filters = ("strategy", "action", "heard_action", "source", "model_name", "model_version")
        summaries = ", ".join(f"{name} text_bloom_ops (n_distinct_per_range = 32)" for name in filters)
        op.execute(
            f"CREATE INDEX ix_decisions_filters ON decisions USING brin (decided_at, {summaries})"
            " WITH (pages_per_range = 32)"
        )
    else:
        op.create_index("ix_decisions_decided_at", "decisions", ["decided_at"])
    op.create_index("ix_decisions_instrument_decided_at", "decisions", ["instrument", "decided_at"])
    op.create_table(
        "part_scores",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("part", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("model_version", sa.String, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("score", sa.Double, nullable=False),
        sa.Column("decided_at", _INSTANT, nullable=False, index=True),
    )
    op.create_table(
        "repeats",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("reply_status", sa.String, nullable=False),
        sa.Column("heard_action", sa.String),
        sa.Column("heard_reasons", _NAMES),
        sa.Column("journal_id", sa.String, nullable=False),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
        sa.Column("shipped_at", _INSTANT, nullable=False),
    )
    op.create_table(
        "outcomes",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("reporter", sa.String, primary_key=True),
        sa.Column("recorded_at", _INSTANT, nullable=False),
        sa.Column("filled_quantity", sa.Double, nullable=False),
        sa.Column("fill_price", sa.Double),
        sa.Column("markout_bps", sa.Double),
        sa.Column("journal_id", sa.String, nullable=False),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "labels",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("horizon_seconds", sa.Double, primary_key=True),
        sa.Column("markout_bps", sa.Double, nullable=False),
        sa.Column("eligible", sa.Boolean, nullable=False),
    )


def _create_canary_tables() -> None:
    """Creates what champion and challenger said of the same rows, and what happened to each canary."""
    op.create_table(
        "score_pairs",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("challenger_version", sa.String, primary_key=True),
        sa.Column("champion_version", sa.String, nullable=False),
        sa.Column("champion_score", sa.Double, nullable=False),
        sa.Column("challenger_score", sa.Double, nullable=False),
        sa.Column("champion_trades", sa.Boolean, nullable=False),
        sa.Column("challenger_trades", sa.Boolean, nullable=False),
        sa.Column("challenger_decided", sa.Boolean, nullable=False),
        sa.Column("challenger_us", sa.BigInteger, nullable=False),
        sa.Column("recorded_at", _INSTANT, nullable=False, index=True),
    )
    op.create_table(
        "canary_events",
        sa.Column("event_id", sa.String, primary_key=True),
        sa.Column("canary_id", sa.String, nullable=False, index=True),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("event", sa.String, nullable=False),
        sa.Column("model_version", sa.String, nullable=False),
        sa.Column("champion_version", sa.String, nullable=False),
        sa.Column("previous_weight", sa.Double, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("verdict", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("orders", sa.BigInteger, nullable=False),
        sa.Column("author", sa.String, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
        sa.Column("entry", sa.LargeBinary, nullable=False),
    )


def _create_control_tables() -> None:
    """Creates what operators changed, which settings were in force, and which attempts were refused.

    These tables are small and nothing is removed from them: without its settings no decision can be recomputed.
    """
    op.create_table(
        "control_changes",
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
    op.create_table(
        "settings_in_force",
        sa.Column("config_hash", sa.String, primary_key=True),
        sa.Column("entry", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "access_refusals",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("journal_position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("refused_at", _INSTANT, nullable=False, index=True),
        sa.Column("plane", sa.String, nullable=False),
        sa.Column("method", sa.String, nullable=False),
        sa.Column("peer", sa.String, nullable=False),
        sa.Column("caller", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("unrecorded_before", sa.BigInteger, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
    )
