"""That every way to ask from Node can be measured; what comes out is no matter here."""

from __future__ import annotations

import pytest
from rich.console import Console

from local.bench.client_js import measure, table


@pytest.mark.usefixtures("js_client")
async def test_every_way_is_measured_and_compared_with_its_stubs() -> None:
    found = await measure(None, seconds=0.01, rounds=1)
    assert len(found) == 9
    assert all(cost.orders_per_second > 0 for costs in found.values() for cost in costs)
    console = Console(width=200, record=True)
    console.print(table(found))
    assert console.export_text().count("stubs ") == sum(way.by == "stubs" for way in found)
