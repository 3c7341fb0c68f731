"""The tables as they were before there were migrations."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None

_NAMES = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Makes them."""
    op.create_table(
        "shipments",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "journal_entries",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("entry", sa.LargeBinary, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "decisions",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("decided_at", _INSTANT, nullable=False, index=True),
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
        sa.Column("journal_id", sa.String, nullable=False),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_decisions_instrument_decided_at", "decisions", ["instrument", "decided_at"])
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
