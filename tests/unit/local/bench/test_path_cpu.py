"""The benchmark of the decision path decides orders in every way in, and says what that took."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from support.twins import compiled_here

from feature_cache import feature_sets
from local.bench import path_cpu
from local.bench.fake_envoy import LANE
from local.bench.path_cpu import WAYS, measure
from server.journal.journal import Durability


@pytest.mark.parametrize("way", WAYS)
async def test_every_way_in_is_measured(way: str, tmp_path: Path) -> None:
    if way.startswith("lane"):
        compiled_here(LANE)
    found = await measure(way, 0.1, tmp_path, Durability.OS)
    names = {"event loop", "journal", "per_second", "rows a batch", "by primary", "in columns", "orders a block"}
    assert set(found) == names
    assert all(value > 0 for name, value in found.items() if name not in {"by primary", "in columns", "orders a block"})
    if way in {"batch64", "lane64"}:
        assert found["in columns"] > 0
        assert 10 <= found["orders a block"] <= 64


async def test_two_models_with_different_sets_are_measured_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    found = await measure("batch64", 0.1, tmp_path, Durability.OS, models=2)
    assert found["event loop"] > 0


async def test_orders_of_the_second_model_that_bring_a_feature_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_sets, "_loaded", {})
    found = await measure("batch64", 0.1, tmp_path, Durability.OS, models=2, bringing=True)
    assert found["event loop"] > 0
    assert found["in columns"] < 0.7, "a third of them bring features, and go alone"


async def test_a_caller_that_ends_by_itself_ends_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_cpu, "_ALLOWED_SECONDS", 0.0)
    with pytest.raises(AssertionError, match="a caller ended by itself"):
        await measure("batch64", 0.1, tmp_path, Durability.OS)


@pytest.mark.parametrize("way", ["lane", "lane0", "lane65", "lanes", "16"])
async def test_a_way_that_there_is_not_is_refused(way: str, tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="--way: must be one of unary, "):
        await measure(way, 0.1, tmp_path, Durability.OS)
