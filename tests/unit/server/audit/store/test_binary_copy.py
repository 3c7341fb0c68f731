"""PostgreSQL's binary COPY format, read back as its documentation says.

That PostgreSQL agrees is held by `tests/contract/test_audit_store.py`.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any, Final

import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from server.audit.store.binary_copy import binary_copy
from server.audit.store.columns import NO_INTEGER, Columns

TABLE: Final = sa.Table(
    "things",
    sa.MetaData(),
    sa.Column("name", sa.String),
    sa.Column("size", sa.BigInteger),
    sa.Column("weight", sa.Double),
    sa.Column("made_at", sa.DateTime(timezone=True)),
    sa.Column("sold", sa.Boolean),
    sa.Column("tags", sa.JSON),
    sa.Column("content", sa.LargeBinary),
)
_TWO_THOUSAND: Final = 946_684_800_000_000
"""2000-01-01, from which PostgreSQL counts, in microseconds since the Unix epoch."""


def read(data: bytes, names: list[str]) -> list[dict[str, Any]]:
    """The rows, as the columns that they were made of have them."""
    assert data[:19] == b"PGCOPY\n\xff\r\n\0" + bytes(8)
    rows: list[dict[str, Any]] = []
    place = 19
    while True:
        (fields,) = struct.unpack_from(">h", data, place)
        place += 2
        if fields == -1:
            assert place == len(data)
            return rows
        assert fields == len(names)
        row = {}
        for name in names:
            (length,) = struct.unpack_from(">i", data, place)
            place += 4
            row[name] = None if length == -1 else value(name, data[place : place + length])
            place += max(0, length)
        rows.append(row)


_NUMBERS: Final = {"size": ">q", "made_at": ">q", "weight": ">d", "sold": ">?"}


def value(name: str, octets: bytes) -> Any:
    if name in _NUMBERS:
        (number,) = struct.unpack(_NUMBERS[name], octets)
        return number + _TWO_THOUSAND if name == "made_at" else number
    if name == "tags":
        assert octets[:1] == b"\x01"
        return tuple(json.loads(octets[1:]))
    return octets if name == "content" else octets.decode()


def named(statement: str) -> list[str]:
    """The columns of a COPY statement, in their order."""
    return statement.partition("(")[2].partition(")")[0].split(", ")


INTEGERS: Final = st.integers(-(2**62), 2**63 - 1)
TEXTS: Final = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
ROWS: Final = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.none() | TEXTS,
            "size": st.none() | INTEGERS,
            "weight": st.none() | st.floats(allow_nan=False),
            "made_at": st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999),
            "sold": st.booleans(),
            "tags": st.lists(st.sampled_from(["A", "B", "LONG_NAME"]), max_size=3).map(tuple),
            "content": st.binary(max_size=40),
        }
    ),
    min_size=1,
    max_size=30,
)
NAMES: Final = [column.name for column in TABLE.columns]
NULLS: Final = {"size": NO_INTEGER, "weight": math.nan}


@given(rows=ROWS, same=st.sets(st.sampled_from(NAMES)))
def test_what_was_written_reads_back_value_for_value(rows: list[dict[str, Any]], same: set[str]) -> None:
    for row in rows:  # of the columns that are the same in all rows
        row.update({name: rows[0][name] for name in same})

    def held(name: str, row: dict[str, Any]) -> Any:
        return NULLS.get(name) if row[name] is None else row[name]

    columns = Columns(
        len(rows),
        {name: [held(name, row) for row in rows] for name in NAMES if name not in same},
        {name: held(name, rows[0]) for name in same},
    )
    statement, data = binary_copy(TABLE, columns)
    names = named(statement)
    assert sorted(names) == sorted(NAMES)
    assert read(data, names) == [{name: row[name] for name in names} for row in rows]


def test_the_bytes_are_those_of_the_documented_format() -> None:
    columns = Columns(2, {"size": [7, NO_INTEGER], "name": ["é", None]}, {"made_at": _TWO_THOUSAND + 1})
    statement, data = binary_copy(TABLE, columns)
    assert statement == "COPY things (made_at, size, name) FROM STDIN (FORMAT binary)"
    made_at = b"\x00\x00\x00\x08" + b"\x00\x00\x00\x00\x00\x00\x00\x01"
    assert data == (
        b"PGCOPY\n\xff\r\n\x00"
        b"\x00\x00\x00\x00"  # flags
        b"\x00\x00\x00\x00"  # no extension
        + b"\x00\x03"
        + made_at
        + b"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x07"
        + b"\x00\x00\x00\x02\xc3\xa9"
        + b"\x00\x03"
        + made_at
        + b"\xff\xff\xff\xff"
        + b"\xff\xff\xff\xff"
        + b"\xff\xff"  # the end
    )
