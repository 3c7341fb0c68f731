"""Tables of orders and of labelled rows, as others write them: Parquet, or else CSV."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torchserve.dataset import SamplesError

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC: Final = b"PAR1"


def read_table(path: Path) -> pa.Table:
    """The table in a file.

    Raises:
        SamplesError: There is none, it cannot be read, or a column is there twice.
    """
    import pyarrow as pa  # noqa: PLC0415 - slow to import, and a model without a dataset does not need it
    import pyarrow.csv as pc  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    if not path.exists():
        raise SamplesError(f"{path}: there is no such file")
    is_parquet = path.is_dir() or path.suffix == ".parquet" or _begins_as_parquet(path)
    try:
        if is_parquet and path.is_file():  # a table with a column twice would not be read at all
            _check_names(path, pq.read_schema(path).names)
        table = pq.read_table(path) if is_parquet else pc.read_csv(path)
    except (OSError, pa.ArrowException) as error:
        kind = "Parquet" if is_parquet else "CSV"
        raise SamplesError(f"{path} is no {kind} that can be read: {' '.join(str(error).split())}") from error
    _check_names(path, table.column_names)
    return table


def _begins_as_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SamplesError(f"{path} has more than one column {twice[0]!r}: leave one, or give the others another name")
