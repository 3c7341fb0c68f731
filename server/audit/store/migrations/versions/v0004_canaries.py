"""What champion and challenger said of the same rows, and the turns of canaries."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Makes the tables. Pairs are removed with the days of their decisions, canaries' turns are kept for ever."""
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
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False, index=True),
    )
    op.create_table(
        "canary_events",
        sa.Column("event_id", sa.String, primary_key=True),
        sa.Column("canary_id", sa.String, nullable=False, index=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
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
