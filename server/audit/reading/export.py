"""Cold storage: the decisions of whole days as Parquet, one file a day and instrument.

    <destination>/day=2026-11-21/instrument=BTCUSDT.BINANCE/decisions.parquet

which DuckDB, pandas, Spark and everything else that reads Hive partitions opens as one table. A file holds the columns
of `decisions`, and for every row its evidence: the packet as it was written, with its place in the chain and its hash.
A file appears whole or not at all, and writing it again gives the same file while its day is over, so that a run that
was interrupted is simply repeated. Days the database no longer holds are left alone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pyarrow import fs

from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from server.audit.store.schema import DECISIONS, ENTRY_OF_DECISION, JOURNAL_ENTRIES
from server.audit.store.store import Store

_NAMES: Final = pa.list_(pa.dictionary(pa.int16(), pa.string()))
_FEW: Final = pa.dictionary(pa.int32(), pa.string())
"""Text of which there are few different ones."""
SCHEMA: Final = pa.schema(
    [
        ("decision_id", pa.string()),
        ("decided_at", pa.timestamp("us", "UTC")),
        ("order_ref", pa.string()),
        ("side", _FEW),
        ("quantity", pa.float64()),
        ("limit_price", pa.float64()),
        ("strategy", _FEW),
        ("idempotency_key", pa.string()),
        ("action", _FEW),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("source", _FEW),
        ("reasons", _NAMES),
        ("degradations", _NAMES),
        ("model_name", _FEW),
        ("model_version", _FEW),
        ("feature_age_us", pa.int64()),
        ("used_us", pa.int64()),
        ("allowed_us", pa.int64()),
        ("instance_id", _FEW),
        ("config_hash", _FEW),
        ("durability", _FEW),
        ("reply_status", _FEW),
        ("heard_action", _FEW),
        ("heard_reasons", _NAMES),
        ("journal_id", _FEW),
        ("journal_position", pa.int64()),
        ("feature_set_id", _FEW),
        ("features", pa.list_(pa.float32())),
        ("mid_price", pa.float64()),
        ("entry", pa.binary()),
        ("hash", pa.binary(32)),
    ],
    metadata={f"feature_names.{features.FEATURE_SET_ID}": ",".join(features.NAMES)},
)
"""Columns of a file; `instrument` and `day` are in its path. `entry` is a `pretrade.audit.v1.JournalEntry`; from it
come `feature_set_id`, `features` as the model saw them (their names are in the schema's metadata) and `mid_price`."""
_OF_PACKET: Final = {"feature_set_id", "features", "mid_price"}
_ROWS: Final = 10_000
"""Rows in memory at a time, and of a row group."""
_FILE: Final = "decisions.parquet"


@dataclass(frozen=True, slots=True)
class Exported:
    """One file."""

    path: str
    """Where it is, below the destination."""
    rows: int
    bytes: int


def export(database_url: str, destination: str, since: dt.date, until: dt.date) -> Iterator[Exported]:
    """Writes the decisions of the days from `since` up to and including `until`, UTC.

    Args:
        database_url: SQLAlchemy URL of the audit database.
        destination: A directory, made when missing, or the URI of a bucket that pyarrow knows: `s3://bucket/prefix`,
            `gs://…`; credentials come from where those clients look for them.
        since: First day.
        until: Last day. Today's file holds what was shipped so far; export it again tomorrow.

    Raises:
        OSError: The destination cannot be written.
        sqlalchemy.exc.SQLAlchemyError: The database cannot be read.
        ValueError: A URL is not one.
    """
    filesystem, root = (
        fs.FileSystem.from_uri(destination) if "://" in destination else (fs.LocalFileSystem(), destination)
    )
    with closing(Store(database_url)) as store, store.reading() as connection:
        for i in range((until - since).days + 1):
            day = since + dt.timedelta(days=i)
            begin = dt.datetime.combine(day, dt.time(), dt.UTC)
            of_day = sa.and_(DECISIONS.c.decided_at >= begin, DECISIONS.c.decided_at < begin + dt.timedelta(days=1))
            instruments = sa.select(DECISIONS.c.instrument).where(of_day).distinct().order_by(DECISIONS.c.instrument)
            for instrument in connection.scalars(instruments).all():
                path = f"day={day}/instrument={quote(instrument, safe='')}"
                chosen = sa.and_(of_day, DECISIONS.c.instrument == instrument)
                rows, size = _write(connection, chosen, filesystem, f"{root}/{path}")
                yield Exported(f"{path}/{_FILE}", rows, size)


def _write(
    connection: sa.Connection, chosen: sa.ColumnElement[bool], filesystem: fs.FileSystem, directory: str
) -> tuple[int, int]:
    """Writes one file beside its place and then moves it there; returns its rows and bytes."""
    columns = [
        JOURNAL_ENTRIES.c[name] if name in {"entry", "hash"} else DECISIONS.c[name]
        for name in SCHEMA.names
        if name not in _OF_PACKET
    ]
    query = (
        sa.select(*columns)
        .join_from(DECISIONS, JOURNAL_ENTRIES, ENTRY_OF_DECISION)
        .where(chosen)
        .order_by(DECISIONS.c.decided_at, DECISIONS.c.decision_id)
    )
    filesystem.create_dir(directory, recursive=True)
    partial, path = f"{directory}/.{_FILE}.partial", f"{directory}/{_FILE}"
    rows = 0
    with pq.ParquetWriter(partial, SCHEMA, filesystem=filesystem, compression="zstd", compression_level=9) as writer:
        found = connection.execution_options(yield_per=_ROWS).execute(query)
        for batch in found.partitions():
            writer.write_table(_table(batch))
            rows += len(batch)
    filesystem.move(partial, path)
    return rows, filesystem.get_file_info(path).size


def _table(rows: Sequence[sa.Row[Any]]) -> pa.Table:
    packets = [packet_pb2.JournalEntry.FromString(row.entry).decision for row in rows]
    columns: dict[str, Sequence[Any]] = {
        "feature_set_id": [packet.feature_set_id or None for packet in packets],
        "features": [np.frombuffer(packet.model_input, "<f4") if packet.model_input else None for packet in packets],
        "mid_price": [packet.mid_price or None for packet in packets],
    }
    columns |= zip(rows[0]._fields, zip(*rows, strict=True), strict=True)
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
