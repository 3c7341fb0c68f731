"""Tables and lines that leave nothing out, however narrow the terminal is."""

from __future__ import annotations

import re

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from pretrade.client.cli.fitting import Items, Rows

WIDTHS = (20, 40, 60, 80, 120, 200)


def lines(view: RenderableType, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(view)
    return captured.get().splitlines()


def replicas() -> Rows:
    table = Rows("replica", "breaker", "p99 ms>")
    table.add("primary", Text("FORCED_OPEN for 598 s yet (else HALF_OPEN)", "red"), "1043.32")
    table.add("secondary", "CLOSED", "8.10")
    return table


def test_a_table_that_fits_is_a_table_with_its_figures_flush_right() -> None:
    head, first, second = lines(replicas(), 80)
    assert head.split() == ["replica", "breaker", "p99", "ms"]
    assert len(head) == len(first) == len(second)
    assert (first.endswith(" 1043.32"), second.endswith("   8.10")) == (True, True)


def test_a_table_that_does_not_fit_becomes_a_block_a_row_with_the_names_of_its_cells() -> None:
    narrow = lines(replicas(), 59)
    assert narrow[0].startswith("primary  breaker FORCED_OPEN for 598 s yet (else HALF_OPEN)")
    assert "secondary  breaker CLOSED  p99 ms 8.10" in narrow


@pytest.mark.parametrize("width", WIDTHS)
def test_no_word_is_shortened_at_any_width(width: int) -> None:
    shown = lines(replicas(), width)
    assert all(len(line) <= width for line in shown)
    assert "…" not in "".join(shown)
    words = [
        "primary",
        "FORCED_OPEN",
        "for",
        "598",
        "s",
        "yet",
        "(else",
        "HALF_OPEN)",
        "1043.32",
        "secondary",
        "CLOSED",
        "8.10",
    ]
    assert [word for word in words if word not in " ".join(shown).split()] == []


def test_a_line_breaks_between_its_items_and_not_within_one() -> None:
    shown = lines(Items("decisions", [f"PRIMARY {number}" for number in range(100, 120)]), 30)
    assert all(len(line) <= 30 for line in shown)
    assert re.findall(r"PRIMARY \d+", "\n".join(shown)) == [f"PRIMARY {number}" for number in range(100, 120)]


def test_an_item_longer_than_a_line_is_broken_and_whole() -> None:
    item = "x" * 70
    assert "".join(line.strip() for line in lines(Items("found", [item]), 30)).endswith(item)


def test_a_cell_of_several_lines_keeps_them() -> None:
    table = Rows("when", "change")
    table.add("now", "one\ntwo")
    assert [line.split() for line in lines(table, 80)] == [["when", "change"], ["now", "one"], ["two"]]


def test_what_others_wrote_is_no_markup() -> None:
    table = Rows("by", "why")
    table.add("ann", "[/] on [red]November[/]")
    assert "[/] on [red]November[/]" in "\n".join(lines(table, 80))


def test_a_long_item_begins_beside_its_name_and_goes_on_indented() -> None:
    shown = lines(Items("also:", ["neither primary nor secondary answers; the embedded model does"]), 40)
    assert shown == ["also:  neither primary nor secondary", "    answers; the embedded model does"]
