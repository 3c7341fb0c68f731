"""Tables as others write them, and what is said of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from torchserve.dataset import SamplesError
from torchserve.tables import read_table

TABLE = pa.table({"flow": [0.5, None], "side": ["buy", "sell"]})


def test_a_table_is_read_by_what_the_file_holds(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "rows.parquet")
    pq.write_table(TABLE, tmp_path / "rows.pq")
    pc.write_csv(TABLE, tmp_path / "rows.csv")
    pc.write_csv(TABLE, tmp_path / "rows.txt")
    for path in tmp_path.iterdir():
        assert read_table(path) == TABLE, path


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_column_that_is_there_twice_is_refused_by_its_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    twice = TABLE.append_column("flow", TABLE.column("flow"))
    pq.write_table(twice, path) if suffix == "parquet" else pc.write_csv(twice, path)
    with pytest.raises(SamplesError, match=f"{path} has more than one column 'flow': leave one"):
        read_table(path)


def test_what_is_no_table_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_bytes(b"no table")
    (tmp_path / "no.csv").write_bytes(b"a,b\n1\n")
    for name, said in (
        ("gone.csv", "there is no such file"),
        ("no.parquet", "is no Parquet that can be read"),
        ("no.csv", "is no CSV that can be read"),
    ):
        with pytest.raises(SamplesError, match=said) as told:
            read_table(tmp_path / name)
        assert "\n" not in str(told.value)
