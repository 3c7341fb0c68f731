"""What is known of decisions afterwards: outcomes, labels, and the settings that packets name."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Makes the tables. They are small and are kept for ever: without its settings no decision can be recomputed."""
    op.create_table(
        "settings_in_force",
        sa.Column("config_hash", sa.String, primary_key=True),
        sa.Column("entry", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "outcomes",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("reporter", sa.String, primary_key=True),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
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
