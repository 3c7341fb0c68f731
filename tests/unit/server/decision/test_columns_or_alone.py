"""Any orders in any circumstances get in columns what each of them gets alone, and so do audit and metrics."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable
from typing import Any, Literal

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from support.both_ways import Asked, Circumstances, asked, circumstances, decided, least_in_block

from fallback.guards import GuardSettings
from server.inference.outcome import Outcome

LEAST = 4
"""Orders that make a block here."""
BOTH = ("primary", "secondary")


def same_both_ways(
    orders: list[Asked], about: Circumstances, met: collections.Counter[str], *, together: bool
) -> Iterable[str]:
    """Decides orders both ways, and counts where they left the columns; why."""
    with least_in_block(LEAST):
        columns = decided("columns", orders, about, together=together)
        alone = decided("alone", orders, about, together=together)
    assert alone.in_columns == 0
    met["in columns"] += columns.in_columns
    met.update(columns.alone)
    begun = [one for one in orders if one.seconds > 0]
    assert columns.in_columns + sum(columns.alone.values()) + columns.counted["cancelled"] >= len(begun)
    assert columns.decisions == alone.decisions
    assert columns.counted == alone.counted
    assert columns.packets == alone.packets
    answered = [one for one, said in zip(orders, columns.decisions, strict=True) if not isinstance(said, str)]
    for found in (columns, alone):
        for one, allowed_us in zip(answered, found.allowed_us, strict=True):
            assert abs(allowed_us - one.seconds * 1e6) < 2, "each has its own time"
    return columns.alone


@pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])
@pytest.mark.parametrize("examples", [10, pytest.param(200, marks=pytest.mark.long)])
def test_orders_get_in_columns_what_each_gets_alone(together: bool, examples: int) -> None:
    met = collections.Counter[str]()

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(asked(plain=together), min_size=1 if together else LEAST, max_size=14), circumstances())
    @example([Asked()] * 14, Circumstances())  # ten others may by chance have few orders in columns
    def whatever_comes(orders: list[Asked], about: Circumstances) -> None:
        for why in same_both_ways(orders, about, met, together=together):
            event(why)

    whatever_comes()
    assert met["in columns"] > examples, "the test tests something"


@pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])
@pytest.mark.parametrize(
    "about",
    [
        pytest.param(Circumstances(out=("secondary",)), id="secondary out"),
        pytest.param(Circumstances(out=("primary",), shadow=True), id="primary out"),
        pytest.param(Circumstances(out=BOTH, chain=("model", "embedded", "rules")), id="both out"),
        pytest.param(Circumstances(first="embedded", is_embedded=False), id="no model here"),
        pytest.param(Circumstances(first="embedded", is_embedded=False, out=("primary",)), id="nor at the primary"),
    ],
)
def test_orders_stay_in_columns_where_a_stage_is_passed_over_for_all_of_them(
    about: Circumstances, together: bool
) -> None:
    met = collections.Counter[str]()
    same_both_ways([Asked()] * LEAST, about, met, together=together)
    assert met == {"in columns": LEAST}


@pytest.mark.parametrize("first", ["model", "embedded"])
@pytest.mark.parametrize(("weight", "of"), [(0.5, ""), (1.0, ""), (1.0, "twap"), (0.0, "")])
@pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])
def test_orders_stay_in_columns_while_a_canary_is_on_trial(
    first: Literal["model", "embedded"], weight: float, of: Literal["", "twap"], together: bool
) -> None:
    flows = itertools.product(range(3), ("twap", "vwap"), range(LEAST))
    orders = [Asked(instrument=instrument, strategy=strategy) for instrument, strategy, _ in flows]
    about = Circumstances(first=first, shadow=True, canary="sound", canary_weight=weight, canary_of=of)
    met = collections.Counter[str]()
    same_both_ways(orders, about, met, together=together)
    assert met == {"in columns": len(orders)}
    with least_in_block(LEAST):
        counted = decided("columns", orders, about, together=together).counted
    share = 0.5 if of else weight
    assert counted["canary"] == (share * len(orders), 0), "orders of half of the flows are its own"
    told = 1 if of else 2 - (first == "embedded")
    assert counted["observed"].total() == len(orders) * (share if told == 1 else 1)


@pytest.mark.parametrize("canary", ["fails", "other version", "odd"])
@pytest.mark.parametrize("together", [True, False], ids=["one call", "many callers"])
def test_an_order_that_a_canary_gives_no_score_goes_on_to_the_champion(
    canary: Literal["fails", "other version", "odd"], together: bool
) -> None:
    met = collections.Counter[str]()
    about = Circumstances(canary=canary, canary_weight=1.0, scores=(0.45, 0.9, 0.9, 0.9, 0.9, 0.9))
    same_both_ways([Asked()] * LEAST, about, met, together=together)
    assert met == {"in columns": 0, ("mixed" if canary == "other version" else "no_score"): LEAST}


def test_where_no_model_can_be_asked_each_order_goes_on_alone() -> None:
    met = collections.Counter[str]()
    about = Circumstances(out=BOTH, is_embedded=False, chain=("model", "embedded", "rules"))
    same_both_ways([Asked()] * LEAST, about, met, together=True)
    assert met == {"in columns": 0, "stage": LEAST}


@pytest.mark.parametrize("failing", [{"failure": Outcome.TRANSPORT}, {"secondary_fails": True}])
def test_an_order_that_gets_no_score_where_a_stage_was_passed_over_goes_on_from_there(failing: dict[str, Any]) -> None:
    met = collections.Counter[str]()
    out = ("secondary",) if "failure" in failing else ("primary",)
    about = Circumstances(out=out, chain=("model", "embedded", "rules"), **failing)
    same_both_ways([Asked()] * LEAST, about, met, together=True)
    assert met == {"in columns": 0, "no_score": LEAST}


def test_an_order_that_no_mid_is_known_for_is_written_down_in_columns_as_alone() -> None:
    met = collections.Counter[str]()
    no_mid = Circumstances(("no mid",) * 3, scores=(0.1,) * 6, guards=GuardSettings())
    same_both_ways([Asked()] * LEAST, no_mid, met, together=True)
    assert met["in columns"] == LEAST
