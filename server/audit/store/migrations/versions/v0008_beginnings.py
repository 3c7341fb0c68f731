"""From which row on a journal was shipped here: what was shipped before is, or was, in another database."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds it; of journals that were shipped before this revision it is not known."""
    with op.batch_alter_table("shipments") as batch:
        batch.add_column(sa.Column("missed_position", sa.BigInteger))
        batch.add_column(sa.Column("missed_written_off", sa.String))
