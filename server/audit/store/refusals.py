"""Refused attempts in SQL: who called which port, and why the call was refused."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from typing import Any, Final

import sqlalchemy as sa

from server.audit.store.schema import METADATA

ACCESS_REFUSALS: Final = sa.Table(
    "access_refusals",
    METADATA,
    sa.Column("journal_id", sa.String, primary_key=True),
    sa.Column("journal_position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("refused_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("plane", sa.String, nullable=False, comment="`decision` or `admin`"),
    sa.Column("method", sa.String, nullable=False),
    sa.Column("peer", sa.String, nullable=False, comment="address without its port"),
    sa.Column("caller", sa.String, nullable=False, comment="empty: nobody knows"),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("unrecorded_before", sa.BigInteger, nullable=False, comment="attempts before this one without a row"),
    sa.Column("instance_id", sa.String, nullable=False),
)


def refusals(connection: sa.Connection, since: dt.datetime | None, limit: int) -> Iterator[dict[str, Any]]:
    """What was shipped, the newest first: the columns of each row, `refused_at` in UTC."""
    query = sa.select(ACCESS_REFUSALS).order_by(ACCESS_REFUSALS.c.refused_at.desc()).limit(limit)
    if since is not None:
        query = query.where(ACCESS_REFUSALS.c.refused_at >= since)
    for row in connection.execute(query).mappings():
        at: dt.datetime = row["refused_at"]
        yield dict(row) | {"refused_at": at.astimezone(dt.UTC) if at.tzinfo else at.replace(tzinfo=dt.UTC)}
