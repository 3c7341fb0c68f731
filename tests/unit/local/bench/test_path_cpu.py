"""The benchmark of the decision path decides orders in every way in, and says what that took."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_cache import feature_sets
from local.bench import path_cpu
from local.bench.path_cpu import WAYS, measure
from server.journal.journal import Durability


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_in_is_measured(way: str, tmp_path: Path) -> None:
    found = await measure(way, 0.1, tmp_path, Durability.OS)
    assert set(found) == {"event loop", "journal", "per_second", "rows a batch", "by primary"}
    assert all(value > 0 for name, value in found.items() if name != "by primary")


async def test_two_models_with_different_sets_are_measured_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    found = await measure("batch64", 0.1, tmp_path, Durability.OS, models=2)
    assert found["event loop"] > 0


async def test_a_caller_that_ends_by_itself_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_cpu, "_ALLOWED_SECONDS", 0.0)
    with pytest.raises(AssertionError, match="a caller ended by itself"):
        await measure("batch64", 0.1, tmp_path, Durability.OS)
