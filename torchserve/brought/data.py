"""Rows with labels that a brought model is calibrated on: Parquet or CSV, as others write it, or our own dataset files.

A column for every feature of the set, as the model sees them (turned for the side of the order), and a label of 0 and
1: `eligible` or `label`, or one that is named. With `time` (a timestamp, or nanoseconds since 1970) and `instrument`
the rows are a series of each instrument: observations that share a market are counted as such, and drift and domain can
be measured. `sell`, or else `side`, says of which side a row is. Without `time` each row counts as independent of all
others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from feature_cache.feature_set import FeatureSet
from torchserve.brought.errors import BroughtError
from torchserve.dataset import Samples, SamplesError
from torchserve.label import Label
from torchserve.point_in_time import SIDES, check_unit
from torchserve.sources import sha256_of
from torchserve.tables import read_table

LABELS: Final = ("eligible", "label")
"""Columns that are looked for where none is named."""
FEWEST: Final = 500
"""Rows, of which a threshold could be chosen at all."""
_METADATA_KEY: Final = b"pretrade"


@dataclass(frozen=True, slots=True)
class Data:
    """Labelled rows in time order."""

    samples: Samples
    has_time: bool
    """Whether the times are those of a market."""
    step_seconds: float
    """Between two rows of one instrument and side, the median; 0 without times."""


def read_data(path: Path, feature_set: FeatureSet, label_column: str = "", label: Label | None = None) -> Data:
    """Reads a file of labelled rows.

    Args:
        path: Parquet or CSV.
        feature_set: Whose columns it has.
        label_column: Name of the label; empty for the first of `LABELS` that is there.
        label: What the label means; None for what the file says, or the default.

    Raises:
        BroughtError: A column is missing or holds something else, or there are too few rows.
        SamplesError: The file cannot be read.
    """
    table = read_table(path)
    named = set(table.column_names)
    missing = [name for name in feature_set.names if name not in named]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BroughtError(f"{path} has no column {', '.join(missing[:3])}{more}, of {feature_set.version}: add them")
    wanted = (label_column,) if label_column else LABELS
    chosen = next((name for name in wanted if name in named), None)
    if chosen is None:
        raise BroughtError(f"{path} has no column {' or '.join(wanted)}: name the 0/1 label with --label-column")
    rows = np.column_stack([_floats(path, table, name) for name in feature_set.names]).astype(np.float32, order="C")
    _check_rows(path, rows, feature_set)
    values = _floats(path, table, chosen)
    if not np.isin(values, (0, 1)).all():
        raise BroughtError(f"{path}: column {chosen} must hold 0 and 1 alone, and no hole")
    if len(rows) < FEWEST:
        raise BroughtError(f"{path} has {len(rows)} rows: calibration, threshold and test need at least {FEWEST}")
    described = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
    meant = label or _label_of(path, described)
    has_time = "time" in named
    time_ns = _times(path, table) if has_time else np.arange(len(rows), dtype=np.int64) * 2 * meant.span_ns
    numbers, instruments = _instruments(table, len(rows))
    samples = Samples(
        rows=rows,
        eligible=values > 0,
        markout_bps=np.full(len(rows), np.nan),
        time_ns=time_ns,
        sell=_sells(path, table, len(rows)),
        instrument=numbers,
        instruments=instruments,
        source=described.get("source", f"brought: {path.name}"),
        source_sha256=sha256_of([path]),
        label=meant,
        feature_set=feature_set,
    )
    samples = samples.take(np.argsort(time_ns, kind="stable"))
    return Data(samples, has_time, _step_seconds(samples) if has_time else 0.0)


def _floats(path: Path, table: Any, name: str) -> NDArray[np.float64]:
    """A column of numbers; what is not there is NaN."""
    import pyarrow as pa  # noqa: PLC0415 - a model without a dataset does not need it

    try:
        column = table.column(name)
        values = (column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column).cast(pa.float64())
        found: NDArray[np.float64] = values.to_numpy()
    except pa.ArrowException as error:
        raise BroughtError(f"{path}: column {name} holds something else than numbers: {error}") from error
    return found


def _times(path: Path, table: Any) -> NDArray[np.int64]:
    import pyarrow as pa  # noqa: PLC0415 - as above

    column = table.column("time")
    if column.null_count or not (pa.types.is_timestamp(column.type) or pa.types.is_integer(column.type)):
        raise BroughtError(f"{path}: column time must be timestamps or nanoseconds since 1970, without a hole")
    is_timestamp = pa.types.is_timestamp(column.type)
    try:
        if is_timestamp:
            column = column.cast(pa.timestamp("ns", tz=column.type.tz))
        found: NDArray[np.int64] = column.cast(pa.int64()).to_numpy()
        if not is_timestamp:
            check_unit(found)
    except pa.ArrowException as error:
        raise BroughtError(f"{path}: column time must be of the years 1678 to 2261: {error}") from error
    except SamplesError as error:
        raise BroughtError(f"{path}: {error}") from error
    return found


def _instruments(table: Any, count: int) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    if "instrument" not in table.column_names:
        return np.zeros(count, np.int16), ("all",)
    names, numbers = np.unique(np.array(table.column("instrument").to_pylist(), dtype=str), return_inverse=True)
    return numbers.astype(np.int16), tuple(names.tolist())


def _sells(path: Path, table: Any, count: int) -> NDArray[np.bool_]:
    """Which rows are of a sell, as our own datasets say it (`sell`) or as orders do (`side`)."""
    if "sell" in table.column_names:
        values = _floats(path, table, "sell")
        if not np.isin(values, (0, 1)).all():
            raise BroughtError(f"{path}: column sell must hold true or false, and no hole")
        found: NDArray[np.bool_] = values > 0
        return found
    if "side" not in table.column_names:
        return np.zeros(count, np.bool_)
    sides = table.column("side").to_pylist()
    if wrong := set(sides) - SIDES.keys():
        raise BroughtError(f"{path}: column side must hold buy or sell, not {min(map(str, wrong))!r:.40}")
    return np.array([SIDES[side] for side in sides], np.bool_)


def _check_rows(path: Path, rows: NDArray[np.float32], feature_set: FeatureSet) -> None:
    if np.isinf(rows).any():
        name = feature_set.names[int(np.flatnonzero(np.isinf(rows).any(axis=0))[0])]
        raise BroughtError(f"{path}: column {name} holds an infinity: write what is undefined as NaN")
    with np.errstate(invalid="ignore"):
        beyond = ((rows < feature_set.lowest) | (rows > feature_set.highest)).any(axis=0)
    if beyond.any():
        one = feature_set.features[int(np.flatnonzero(beyond)[0])]
        column = rows[:, feature_set.index[one.name]]
        raise BroughtError(
            f"{path}: column {one.name} goes from {np.nanmin(column):.6g} to {np.nanmax(column):.6g}, {feature_set.id}"
            f" has it from {one.lowest:g} to {one.highest:g}{one.unit and f' {one.unit}'}: is it in another unit?"
        )


def _label_of(path: Path, described: dict[str, Any]) -> Label:
    try:
        return Label.model_validate(described["label"]) if "label" in described else Label()
    except ValidationError as error:
        raise BroughtError(f"{path} says of its label what makes no sense: {error}") from error


def _step_seconds(samples: Samples) -> float:
    steps = [np.diff(samples.time_ns[samples.one_side(number)]) for number in range(len(samples.instruments))]
    gaps = np.concatenate(steps)
    gaps = gaps[gaps > 0]
    return float(np.median(gaps)) / 1e9 if len(gaps) else 0.0
