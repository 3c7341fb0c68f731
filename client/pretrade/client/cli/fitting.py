"""Tables and lines that fit a terminal of any width without leaving anything out.

Rich shortens the cells of a table that is too wide, and breaks lines between a name and its number. On call, what is
cut is what was looked for. Here a table that does not fit becomes one block a row, and a line breaks only between its
items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_GAPS: Final = (2, 1)
"""Spaces between two columns, the first that fits."""
_INDENT: Final = 4


class Rows:
    """A table whose rows become blocks where it is too wide: the first cell, and then each other one with its name.

    Args:
        columns: Their names; one that ends in `>` holds numbers and is set flush right.
    """

    def __init__(self, *columns: str) -> None:
        self._columns = tuple(column.removesuffix(">") for column in columns)
        self._right = tuple(column.endswith(">") for column in columns)
        self._rows: list[tuple[Text, ...]] = []

    def add(self, *cells: str | Text) -> None:
        """Adds a row. A cell of type `str` is shown as it is: it holds no markup."""
        assert len(cells) == len(self._columns), cells
        self._rows.append(tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, or its blocks."""
        heads = tuple(Text(column, style="bold") for column in self._columns)
        lines = [heads, *self._rows]
        widths = [max(_width(line[index]) for line in lines) for index in range(len(heads))]
        for gap in _GAPS:
            if sum(widths) + gap * (len(widths) - 1) <= options.max_width:
                yield from self._as_table(lines, widths, " " * gap)
                return
        for name, *cells in self._rows:
            items = [
                Text.assemble((f"{column} ", "dim"), cell)
                for column, cell in zip(self._columns[1:], cells, strict=True)
                if cell.plain
            ]
            yield Items(Text.assemble((name.plain, "bold")), items)

    def _as_table(self, lines: Sequence[Sequence[Text]], widths: Sequence[int], gap: str) -> Iterator[Text]:
        for line in lines:
            # A cell may have several lines of its own, as the changes that one command made.
            parts = [cell.split("\n") or [Text()] for cell in line]
            for index in range(max(map(len, parts))):
                cells = [part[index].copy() if index < len(part) else Text() for part in parts]
                for cell, width, right in zip(cells, widths, self._right, strict=True):
                    cell.align("right" if right else "left", width)
                joined = Text(gap).join(cells)
                joined.rstrip()
                joined.no_wrap = True
                yield joined


class Items:
    """A name and what belongs to it, in as many lines as it takes. A line breaks between two items, never in one.

    Args:
        name: What stands first.
        items: What follows. One that is longer than a whole line breaks between its words; nothing of it is left out.
    """

    def __init__(self, name: str | Text, items: Sequence[str | Text]) -> None:
        self._name = name if isinstance(name, Text) else Text(name)
        self._items = [item if isinstance(item, Text) else Text(item) for item in items]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines."""
        line = self._name.copy()
        for item in self._items:
            whole = item.cell_len <= options.max_width - _INDENT
            for index, part in enumerate([item] if whole else item.split(" ")):
                gap = " " if index else "  "
                if line.cell_len + len(gap) + part.cell_len > options.max_width:
                    yield _folded(line)
                    line, gap = Text(" " * _INDENT), ""
                line = Text.assemble(line, gap, part)
        yield _folded(line)


def _folded(line: Text) -> Text:
    """The line; a word that is longer than the terminal is wide goes on in the next one."""
    line.overflow = "fold"
    return line


def _width(cell: Text) -> int:
    """The cells of a terminal that the longest of its lines takes."""
    return max((line.cell_len for line in cell.split("\n")), default=0)
