"""PostgreSQL's binary COPY format, written from columns.

The data are a signature, the rows and a trailer. A row is the number of its fields as an int16 and then its fields; a
field is its length as an int32 and its bytes, or the length -1 alone for NULL. All numbers are in network byte order.
See https://www.postgresql.org/docs/current/sql-copy.html, "Binary Format".

PostgreSQL reads this without parsing text, and it is cheap to write: numbers of all rows are put in place by numpy at
once, the fields of a group of columns are made once for each combination, and one `join` puts all together. A COPY
knows no ON CONFLICT: it stores every row or none.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise, repeat
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from server.audit.store.columns import NO_INTEGER, Columns, json_list

_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
"""With no flags and no extension of the header."""
_TRAILER: Final = struct.pack(">h", -1)
_NULL: Final = struct.pack(">i", -1)
_POSTGRES_EPOCH: Final = 946_684_800_000_000
"""2000-01-01 in microseconds since the Unix epoch."""
_JSONB_VERSION: Final = b"\x01"
_length: Final = struct.Struct(">i").pack
_Octets = npt.NDArray[np.uint8]
_Kinds = dict[str, sa.types.TypeEngine[Any]]
"""The types of columns by name."""


def binary_copy(table: sa.Table, columns: Columns, written: Iterable[bytes] = ()) -> tuple[str, bytes]:
    """The statement that stores rows, and its data.

    Args:
        table: Where to; PostgreSQL's types must be those of its definition.
        columns: The rows.
        written: More rows, as this module writes those of such columns.
    """
    names = tuple(group.names for group in columns.groups)
    statement, _, numbers, others, _ = _plan(table, tuple(columns.same), names, tuple(columns.values))
    parts: list[Iterable[bytes]] = [repeat(start_of_row(table, columns), columns.rows)]
    for group in columns.groups:
        combinations = [fields_of(table, group.names, part) for part in group.parts]
        parts.append(map(combinations.__getitem__, group.choice))
    if numbers:
        parts.append(_numbers(numbers, columns))
    for name, kind in others.items():
        parts += _fields(kind, columns.values[name])
    rows = chain.from_iterable(zip(*parts, strict=True))
    return statement, b"".join((_SIGNATURE, *rows, *written, _TRAILER))


def start_of_row(table: sa.Table, columns: Columns) -> bytes:
    """How each row begins: with the number of its fields, and those in which all rows are the same."""
    names = tuple(group.names for group in columns.groups)
    _, same, _, _, fields = _plan(table, tuple(columns.same), names, tuple(columns.values))
    return struct.pack(">h", fields) + b"".join(_field(kind, columns.same[name]) for name, kind in same.items())


@functools.cache
def _plan(
    table: sa.Table, same: tuple[str, ...], groups: tuple[tuple[str, ...], ...], names: tuple[str, ...]
) -> tuple[str, _Kinds, _Kinds, _Kinds, int]:
    """The statement, its columns of one value, its numbers, all others, and how many columns it has with the groups."""
    kinds = {name: table.c[name].type for name in names}
    numbers = {name: kind for name, kind in kinds.items() if _width(kind)}
    others = {name: kind for name, kind in kinds.items() if not _width(kind)}
    order = (*same, *chain.from_iterable(groups), *numbers, *others)
    statement = f"COPY {table.name} ({', '.join(order)}) FROM STDIN (FORMAT binary)"
    return statement, {name: table.c[name].type for name in same}, numbers, others, len(order)


@functools.lru_cache(maxsize=4096)
def fields_of(table: sa.Table, names: tuple[str, ...], part: tuple[Any, ...]) -> bytes:
    """The fields of a combination. The same few come again and again."""
    return b"".join(_field(table.c[name].type, value) for name, value in zip(names, part, strict=True))


def _field(kind: sa.types.TypeEngine[Any], value: Any) -> bytes:
    """The field of one value."""
    if _width(kind):
        (octets,), (null,) = _octets(kind, (value,))
        return _NULL if null else _length(len(octets)) + octets.tobytes()
    if isinstance(kind, sa.LargeBinary):
        return _length(len(value)) + bytes(value)
    return _jsonb(value) if isinstance(kind, sa.JSON) else _text(value)


def _width(kind: sa.types.TypeEngine[Any]) -> int:
    """Bytes of a value; 0 for what has no fixed width."""
    if isinstance(kind, sa.Boolean):
        return 1
    return 8 if isinstance(kind, (sa.Double, sa.BigInteger, sa.DateTime)) else 0


def _numbers(kinds: _Kinds, columns: Columns) -> list[bytes]:
    """The fields of these columns side by side, a string of bytes for each row."""
    rows = columns.rows
    width = sum(4 + _width(kind) for kind in kinds.values())
    block = np.empty((rows, width), np.uint8)
    kept = np.ones((rows, width), np.bool_)
    lengths = np.full(rows, width)
    offset = 0
    for name, kind in kinds.items():
        octets, null = _octets(kind, columns.values[name])
        end = offset + 4 + octets.shape[1]
        block[:, offset : offset + 4] = np.frombuffer(_length(octets.shape[1]), np.uint8)
        block[:, offset + 4 : end] = octets
        if null.any():
            block[null, offset : offset + 4] = np.frombuffer(_NULL, np.uint8)
            kept[null, offset + 4 : end] = False
            lengths -= null * octets.shape[1]
        offset = end
    if (lengths == width).all():
        return [field for (field,) in struct.iter_unpack(f"{width}s", block.tobytes())]
    data = block[kept].tobytes()
    return [data[first:end] for first, end in pairwise((0, *lengths.cumsum().tolist()))]


def _octets(kind: sa.types.TypeEngine[Any], values: Sequence[Any]) -> tuple[_Octets, npt.NDArray[np.bool_]]:
    """The bytes of numbers, a row for each, and which of them are NULL."""
    if isinstance(kind, sa.Boolean):
        return np.asarray(values, np.bool_).view(np.uint8).reshape(-1, 1), np.zeros(len(values), np.bool_)
    if isinstance(kind, sa.Double):
        doubles = np.asarray(values, np.float64)
        return doubles.astype(">f8").view(np.uint8).reshape(-1, 8), np.isnan(doubles)
    integers = np.asarray(values, np.int64)
    null = integers == NO_INTEGER
    if isinstance(kind, sa.DateTime):
        integers = integers - _POSTGRES_EPOCH
    return integers.astype(">i8").view(np.uint8).reshape(-1, 8), null


def _fields(kind: sa.types.TypeEngine[Any], values: Sequence[Any]) -> list[Iterable[bytes]]:
    """The fields of one column whose values have no fixed width, as parts that follow one another in a row."""
    if isinstance(kind, sa.LargeBinary):
        return _with_lengths(values)
    field = _jsonb if isinstance(kind, sa.JSON) else _text
    distinct = set(values)
    if len(distinct) == 1:
        return [repeat(field(values[0]), len(values))]
    if 2 * len(distinct) <= len(values):
        fields = {value: field(value) for value in distinct}
        return [map(fields.__getitem__, values)]
    if field is _text and None not in distinct:
        return _with_lengths("\0".join(values).encode().split(b"\0"))  # at once; no text holds a NUL
    return [map(field, values)]


def _with_lengths(values: Sequence[bytes]) -> list[Iterable[bytes]]:
    """Lengths and values apart, so that a long value is not copied once more."""
    return [map(_length, map(len, values)), values]


def _text(value: str | None) -> bytes:
    if value is None:
        return _NULL
    data = value.encode()
    return _length(len(data)) + data


def _jsonb(names: tuple[str, ...]) -> bytes:
    data = _JSONB_VERSION + json_list(names).encode()
    return _length(len(data)) + data
