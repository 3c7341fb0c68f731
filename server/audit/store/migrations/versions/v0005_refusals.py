"""Attempts that were refused for want of credentials, roles or patience."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Makes the table. It is small, since only some refusals a second are recorded, and is kept for ever."""
    op.create_table(
        "access_refusals",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("journal_position", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("refused_at", sa.DateTime(timezone=True), nullable=False, index=True),
        sa.Column("plane", sa.String, nullable=False),
        sa.Column("method", sa.String, nullable=False),
        sa.Column("peer", sa.String, nullable=False),
        sa.Column("caller", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("unrecorded_before", sa.BigInteger, nullable=False),
        sa.Column("instance_id", sa.String, nullable=False),
    )
