"""Where journals are written and how far, as their servers state it, and how far they were verified."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds what is known of a journal beside its rows."""
    with op.batch_alter_table("shipments") as batch:
        batch.add_column(sa.Column("slot", sa.String))
        batch.add_column(sa.Column("started_at", sa.DateTime(timezone=True)))
        batch.add_column(sa.Column("predecessor_id", sa.String))
        batch.add_column(sa.Column("stated_head", sa.LargeBinary))
        batch.add_column(sa.Column("written_off", sa.String))
    op.create_table(
        "verifications",
        sa.Column("journal_id", sa.String, primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.LargeBinary, nullable=False),
        sa.Column("verified_at", sa.DateTime(timezone=True), nullable=False),
    )
