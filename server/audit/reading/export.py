"""Cold storage: the decisions of whole days as Parquet, one file a day and instrument, and what proves them.

    <destination>/day=2026-11-21/instrument=BTCUSDT.BINANCE/decisions.parquet
    <destination>/_entries/day=2026-11-21/entries.parquet

DuckDB, pandas, Spark and everything else that reads Hive partitions opens the first ones as one table. They hold the
columns of `decisions`, and the packet of every row with its place in the chain. The second one has the day's evidence:
the journal entries of these decisions as they were written, with their hashes. An entry holds decisions of several
instruments, and stands there once. Readers of Hive partitions leave out what begins with `_`.

A file appears whole or not at all, and writing it again gives the same file while its day is over, so that a run that
was interrupted is simply repeated. Days the database no longer holds are left alone.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from pyarrow import fs

from feature_cache.feature_set import ROW
from feature_cache.features import MF1
from pretrade.audit.v1 import packet_pb2
from server.audit.reading.vectors import scored_features
from server.audit.store.schema import DECISIONS, JOURNAL_ENTRIES
from server.audit.store.store import Store
from server.journal.entries import entry_of, packet_of

_NAMES: Final = pa.list_(pa.dictionary(pa.int16(), pa.string()))
_FEW: Final = pa.dictionary(pa.int32(), pa.string())
"""Text of which there are few different ones."""
_PARTS: Final = pa.list_(pa.struct([("model_version", _FEW), ("weight", pa.float64()), ("score", pa.float32())]))
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
        ("journal_row", pa.int64()),
        ("feature_set_id", _FEW),
        ("features", pa.list_(pa.float32())),
        ("scored_feature_set", _FEW),
        ("scored_features", pa.map_(pa.string(), pa.float32())),
        ("parts", _PARTS),
        ("mid_price", pa.float64()),
        ("packet", pa.binary()),
    ],
    metadata={f"feature_names.{MF1.id}": ",".join(MF1.names)},
)
"""Columns of a file; `instrument` and `day` are in its path. `packet` is a `pretrade.audit.v1.DecisionPacket`; from it
come `feature_set_id`, `features` as rules and guards saw them, and a model of the same set (their names are in the
schema's metadata), and `mid_price`. Where a model of another set scored, `scored_feature_set` is that set, with its
fingerprint, and `scored_features` what the model saw, by name: see `vectors.py`. Where an ensemble scored, `parts` is
what each of its parts said."""
ENTRIES: Final = pa.schema(
    [("journal_id", _FEW), ("position", pa.int64()), ("entry", pa.binary()), ("hash", pa.binary(32))]
)
"""Columns of the evidence. `entry` is a `pretrade.audit.v1.JournalEntry`."""
_OF_PACKET: Final = {
    *("packet", "mid_price"),
    *("feature_set_id", "features", "scored_feature_set", "scored_features", "parts"),
}
_ROWS: Final = 10_000
"""Rows of a row group."""
_READ_ROWS: Final = 1_000
"""Rows in memory at a time, with all entries that they are in."""
_FILE: Final = "decisions.parquet"
_ENTRIES_FILE: Final = "entries.parquet"
_KEY: Final = (DECISIONS.c.journal_id, DECISIONS.c.journal_position, DECISIONS.c.shipped_at)
"""Which entry a decision is in."""


@dataclass(frozen=True, slots=True)
class Exported:
    """One file."""

    path: str
    """Where it is, below the destination."""
    rows: int
    """Decisions, or entries."""
    bytes: int

    @property
    def is_evidence(self) -> bool:
        """True for journal entries."""
        return self.path.endswith(_ENTRIES_FILE)


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
                tables = _decisions(connection, chosen)
                yield _write(tables, SCHEMA, filesystem, root, f"{path}/{_FILE}")
            entries = _write(
                _entries(connection, of_day), ENTRIES, filesystem, root, f"_entries/day={day}/{_ENTRIES_FILE}"
            )
            if entries.rows:
                yield entries


def _write(tables: Iterable[pa.Table], schema: pa.Schema, filesystem: fs.FileSystem, root: str, path: str) -> Exported:
    """Writes one file beside its place and then moves it there."""
    directory, _, name = f"{root}/{path}".rpartition("/")
    filesystem.create_dir(directory, recursive=True)
    partial = f"{directory}/.{name}.partial"
    rows = 0
    with pq.ParquetWriter(partial, schema, filesystem=filesystem, compression="zstd", compression_level=9) as writer:
        for table in tables:
            writer.write_table(table)
            rows += len(table)
    filesystem.move(partial, f"{root}/{path}")
    return Exported(path, rows, filesystem.get_file_info(f"{root}/{path}").size)


def _decisions(connection: sa.Connection, chosen: sa.ColumnElement[bool]) -> Iterator[pa.Table]:
    """Some decisions in the order of their time, a table for each row group."""
    columns = [DECISIONS.c[name] for name in SCHEMA.names if name not in _OF_PACKET]
    query = (
        sa.select(*columns, DECISIONS.c.shipped_at)
        .where(chosen)
        .order_by(DECISIONS.c.decided_at, DECISIONS.c.decision_id)
    )
    group: list[pa.Table] = []
    for rows in connection.execution_options(yield_per=_READ_ROWS).execute(query).partitions():
        group.append(_table(connection, rows))
        if len(group) * _READ_ROWS >= _ROWS:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def _table(connection: sa.Connection, rows: Sequence[Any]) -> pa.Table:
    packets = _packets(connection, rows)
    columns: dict[str, Sequence[Any]] = {
        "packet": [packet.SerializeToString() for packet in packets],
        "feature_set_id": [packet.feature_set_id or None for packet in packets],
        "features": [np.frombuffer(packet.model_input, ROW) if packet.model_input else None for packet in packets],
        "scored_feature_set": [packet.scored_feature_set or None for packet in packets],
        "scored_features": [list(scored_features(packet).items()) or None for packet in packets],
        "parts": [
            [{"model_version": one.model_version, "weight": one.weight, "score": one.score} for one in packet.parts]
            or None
            for packet in packets
        ],
        "mid_price": [packet.mid_price or None for packet in packets],
    }
    columns |= zip(rows[0]._fields, zip(*rows, strict=True), strict=True)
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def _packets(connection: sa.Connection, rows: Sequence[Any]) -> list[packet_pb2.DecisionPacket]:
    """The packets of decisions; one whose evidence is gone has an empty one."""
    entries = JOURNAL_ENTRIES.c
    shipped = [row.shipped_at for row in rows]
    query = sa.select(entries.journal_id, entries.position, entries.entry).where(
        entries.shipped_at.between(min(shipped), max(shipped)),
        sa.tuple_(entries.journal_id, entries.position).in_({(row.journal_id, row.journal_position) for row in rows}),
    )
    found = {(one.journal_id, one.position): entry_of(one.entry) for one in connection.execute(query)}
    nothing = packet_pb2.JournalEntry()
    return [packet_of(found.get((row.journal_id, row.journal_position), nothing), row.journal_row) for row in rows]


def _entries(connection: sa.Connection, chosen: sa.ColumnElement[bool]) -> Iterator[pa.Table]:
    """The entries that hold some decisions, in the order of their journals."""
    entries = JOURNAL_ENTRIES.c
    keys = sa.select(*_KEY).where(chosen).distinct().subquery()
    of_key = (
        entries.journal_id == keys.c.journal_id,
        entries.position == keys.c.journal_position,
        entries.shipped_at == keys.c.shipped_at,
    )
    query = (
        sa.select(*(entries[name] for name in ENTRIES.names))
        .join_from(keys, JOURNAL_ENTRIES, sa.and_(*of_key))
        .order_by(entries.journal_id, entries.position)
    )
    for rows in connection.execution_options(yield_per=_READ_ROWS).execute(query).partitions():
        columns = zip(*rows, strict=True)
        yield pa.table(
            [pa.array(each, field.type) for each, field in zip(columns, ENTRIES, strict=True)], schema=ENTRIES
        )
