"""That every way to ask can be measured; what comes out is no matter here."""

from __future__ import annotations

from rich.console import Console

from local.bench.client import WAYS, measure, table


async def test_every_way_is_measured_and_compared_with_its_stubs() -> None:
    found = await measure(None, seconds=0.01, rounds=1)
    assert list(found) == list(WAYS)
    assert all(cost.orders_per_second > 0 for costs in found.values() for cost in costs)
    console = Console(width=200, record=True)
    console.print(table(found))
    assert console.export_text().count("stubs ") == sum(way.by == "stubs" for way in WAYS)
