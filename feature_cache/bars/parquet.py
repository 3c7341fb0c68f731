"""A day of bars as one Parquet file, `bars-2026-11-23.parquet`, with the columns of the table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feature_cache.bars.store import COLUMNS


def write_day(directory: Path, day: dt.date, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a day's file; one that is there is replaced at once, so that nobody reads half of one.

    Raises:
        OSError: The directory cannot be written to.
    """
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to load
    from pyarrow import parquet  # noqa: PLC0415

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"bars-{day:%Y-%m-%d}.parquet"
    part = path.with_suffix(".part")
    table = pa.table({name: [row[name] for row in rows] for name in COLUMNS}, schema=_schema(pa))
    parquet.write_table(table, part, compression="zstd")
    part.replace(path)
    return path


def _schema(pa: Any) -> Any:
    kinds = dict.fromkeys(COLUMNS, pa.float64()) | {
        "instrument": pa.string(),
        "interval": pa.string(),
        "start": pa.timestamp("us", tz="UTC"),
        "trades": pa.int64(),
        "complete": pa.bool_(),
        "lacks": pa.int16(),
        "price_decimals": pa.int16(),
        "size_decimals": pa.int16(),
    }
    return pa.schema(list(kinds.items()))
