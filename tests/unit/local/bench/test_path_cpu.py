"""The benchmark of the decision path decides orders in every way in, and says what that took."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.bench.path_cpu import WAYS, measure
from server.journal.journal import Durability


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_in_is_measured(way: str, tmp_path: Path) -> None:
    found = await measure(way, 0.1, tmp_path, Durability.OS)
    assert set(found) == {"event loop", "journal", "per_second"}
    assert all(value > 0 for value in found.values())
