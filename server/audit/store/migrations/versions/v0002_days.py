"""Days: when a row was shipped, where the evidence begins, and in PostgreSQL a partition for each day.

Rows that are there already count as shipped now. New columns have defaults, so that a server of the version before can
go on shipping while the others are replaced.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KEYS = {
    # table: partition key, primary key
    "journal_entries": ("shipped_at", "journal_id, position, shipped_at"),
    "decisions": ("decided_at", "decision_id, decided_at"),
}


def upgrade() -> None:
    """Adds the columns and partitions the tables."""
    for table in ("shipments", "journal_entries", "decisions"):
        with op.batch_alter_table(table) as batch:
            batch.add_column(
                sa.Column("shipped_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now())
            )
    with op.batch_alter_table("shipments") as batch:
        batch.add_column(sa.Column("anchor_position", sa.BigInteger))
        batch.add_column(sa.Column("anchor_hash", sa.LargeBinary))
    if op.get_context().dialect.name == "postgresql":
        for table, (key, primary_key) in _KEYS.items():
            _partition(table, key, primary_key)
        # Within a day rows arrive in order: a few bytes a block instead of an entry a row.
        op.execute("CREATE INDEX ix_decisions_decided_at ON decisions USING brin (decided_at)")
        op.execute("CREATE INDEX ix_decisions_instrument_decided_at ON decisions (instrument, decided_at)")
    else:
        # Each of SQLite's statements has a time of its own, and a decision is shipped when its entry is.
        op.execute("UPDATE decisions SET shipped_at = (SELECT max(shipped_at) FROM journal_entries)")
        op.create_index("ix_journal_entries_shipped_at", "journal_entries", ["shipped_at"])


def _partition(table: str, key: str, primary_key: str) -> None:
    """Replaces the table by a partitioned one; its rows go where everything goes that has no day of its own yet."""
    op.execute(f"ALTER TABLE {table} RENAME TO {table}_other")
    op.execute(f"ALTER TABLE {table}_other DROP CONSTRAINT {table}_pkey")
    if table == "decisions":
        op.execute("DROP INDEX ix_decisions_decided_at, ix_decisions_instrument_decided_at")
    op.execute(
        f"CREATE TABLE {table} (LIKE {table}_other INCLUDING DEFAULTS, PRIMARY KEY ({primary_key}))"
        f" PARTITION BY RANGE ({key})"
    )
    op.execute(f"ALTER TABLE {table} ATTACH PARTITION {table}_other DEFAULT")
