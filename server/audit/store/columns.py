"""Rows of the audit's tables as columns, and how they become parameters of SQL statements.

What is shipped is kept by column on its way from the journal to the database: `shipment.py` makes the columns from
journal entries, and `binary_copy.py` (PostgreSQL) or `parameters` (SQLite, and single rows) writes them.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa

NO_INTEGER: Final = -(2**63)
"""Stands for NULL in a column of integers or instants."""
EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND: Final = dt.timedelta(microseconds=1)
_MICROSECONDS_OF_A_DAY: Final = 86_400_000_000


@dataclass(slots=True)
class Group:
    """Columns whose values come together: few different combinations for many rows."""

    names: tuple[str, ...]
    """The columns."""
    parts: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """The combinations, each with its number: 0 is the first one."""
    choice: list[int] = field(default_factory=list)
    """The combination of each row, by its number."""

    def number(self, part: tuple[Any, ...]) -> int:
        """The number of a combination, which is added if it is not there yet."""
        return self.parts.setdefault(part, len(self.parts))


@dataclass(slots=True)
class Columns:
    """Rows of one table.

    Text is `str` without NUL characters, or None for NULL. A double that is NaN stands for NULL: SQLite has no NaN, and
    PostgreSQL sorts it above every number. An integer that is `NO_INTEGER` stands for NULL. An instant is an integer:
    microseconds since the Unix epoch. A list of names is a tuple of `str`.
    """

    rows: int
    """How many rows."""
    values: dict[str, Sequence[Any]] = field(default_factory=dict)
    """The values of a column, one a row."""
    same: dict[str, Any] = field(default_factory=dict)
    """The values of columns in which all rows are the same."""
    groups: list[Group] = field(default_factory=list)
    """More columns."""

    def names(self) -> list[str]:
        """The columns: those of `same`, those of `groups`, and all others."""
        return [*self.same, *(name for group in self.groups for name in group.names), *self.values]


def microseconds(instant: dt.datetime) -> int:
    """An instant as a column holds it. One without a time zone is UTC, as SQLite gives it back."""
    aware = instant if instant.tzinfo is not None else instant.replace(tzinfo=dt.UTC)
    return (aware - EPOCH) // _MICROSECOND


def days(instants: Sequence[int]) -> set[dt.date]:
    """The days, UTC, of some instants."""
    import numpy as np  # noqa: PLC0415 - readers do not need it

    numbers = np.unique(np.asarray(instants, np.int64) // _MICROSECONDS_OF_A_DAY)
    return {EPOCH.date() + dt.timedelta(days=number) for number in numbers.tolist()}


def json_list(names: tuple[str, ...]) -> str:
    """A list of names as JSON. The same few lists come again and again."""
    return _json_list(names)


_json_list: Final = functools.lru_cache(maxsize=4096)(json.dumps)


def parameters(table: sa.Table, columns: Columns, dialect: sa.Dialect | None = None) -> list[tuple[Any, ...]]:
    """The rows as parameters of a statement, in the order of `columns.names()`.

    Args:
        table: Whose rows they are.
        columns: The rows.
        dialect: A database whose driver gets them as they are; None if SQLAlchemy converts them for the driver.
    """

    def converted(name: str, values: Iterable[Any]) -> list[Any]:
        kind = table.c[name].type
        bind = None if dialect is None else kind.dialect_impl(dialect).bind_processor(dialect)
        python = _from_column(kind)
        if bind is None:
            return list(values) if python is None else list(map(python, values))
        if python is None:
            return list(map(bind, values))
        return [bind(python(value)) for value in values]

    repeated = [converted(name, (value,)) * columns.rows for name, value in columns.same.items()]
    for group in columns.groups:
        for name, values in zip(group.names, zip(*group.parts, strict=True), strict=True):
            repeated.append(list(map(converted(name, values).__getitem__, group.choice)))
    return list(zip(*repeated, *(converted(name, values) for name, values in columns.values.items()), strict=True))


def _from_column(kind: sa.types.TypeEngine[Any]) -> Callable[[Any], Any] | None:
    """What makes of a value in a column the one that SQLAlchemy expects; None if both are the same."""
    if isinstance(kind, sa.DateTime):
        return _instant
    if isinstance(kind, sa.Double):
        return _double
    if isinstance(kind, sa.BigInteger):
        return _integer
    return None


def _instant(value: int) -> dt.datetime | None:
    return None if value == NO_INTEGER else EPOCH + dt.timedelta(microseconds=int(value))


def _double(value: float) -> float | None:
    return None if value != value else float(value)  # noqa: PLR0124 - NaN alone differs from itself


def _integer(value: int) -> int | None:
    return None if value == NO_INTEGER else int(value)
