"""What repeats of a decision's call heard, whatever is said of the first reply."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Makes the table. Its rows are few, and are removed with the days in which they were shipped."""
    op.create_table(
        "repeats",
        sa.Column("decision_id", sa.String, primary_key=True),
        sa.Column("reply_status", sa.String, nullable=False),
        sa.Column("journal_id", sa.String, nullable=False),
        sa.Column("journal_position", sa.BigInteger, nullable=False),
        sa.Column("shipped_at", sa.DateTime(timezone=True), nullable=False),
    )
