"""Any orders in any circumstances get in columns what each of them gets alone, and so do audit and metrics."""

from __future__ import annotations

import collections

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.both_ways import Asked, Circumstances, asked, circumstances, decided, least_in_block

from fallback.guards import GuardSettings

LEAST = 4
"""Orders that make a block here."""


def same_both_ways(orders: list[Asked], about: Circumstances, met: collections.Counter[str], *, together: bool) -> None:
    """Decides orders both ways, and counts where they left the columns."""
    with least_in_block(LEAST):
        columns = decided("columns", orders, about, together=together)
        alone = decided("alone", orders, about, together=together)
    assert alone.in_columns == 0
    met["in columns"] += columns.in_columns
    met.update(columns.alone)
    for why in columns.alone:
        event(why)
    begun = [one for one in orders if one.seconds > 0]
    assert columns.in_columns + sum(columns.alone.values()) + columns.counted["cancelled"] >= len(begun)
    assert columns.decisions == alone.decisions
    assert columns.counted == alone.counted
    assert columns.packets == alone.packets
    answered = [one for one, said in zip(orders, columns.decisions, strict=True) if not isinstance(said, str)]
    for found in (columns, alone):
        for one, allowed_us in zip(answered, found.allowed_us, strict=True):
            assert abs(allowed_us - one.seconds * 1e6) < 2, "each has its own time"


@pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])
@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.long)])
def test_orders_get_in_columns_what_each_gets_alone(together: bool, examples: int) -> None:
    met = collections.Counter[str]()

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(asked(plain=together), min_size=1 if together else LEAST, max_size=14), circumstances())
    def whatever_comes(orders: list[Asked], about: Circumstances) -> None:
        same_both_ways(orders, about, met, together=together)

    whatever_comes()
    assert met["in columns"] > examples, "the test tests something"


def test_an_order_that_no_mid_is_known_for_is_written_down_in_columns_as_alone() -> None:
    met = collections.Counter[str]()
    no_mid = Circumstances(("no mid",) * 3, scores=(0.1,) * 6, guards=GuardSettings())
    same_both_ways([Asked()] * LEAST, no_mid, met, together=True)
    assert met["in columns"] == LEAST
