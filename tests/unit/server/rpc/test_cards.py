"""A model's card over the admin port: its figures, and nothing of where they are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.cards import measure

from server.errors import ModelUnknownError
from server.models.registry import CARDS, NOT_MEASURED, Registry
from server.rpc.cards import card_of


@pytest.fixture
def registry(tmp_path: Path, model_store: Path) -> Registry:
    return Registry(Path(shutil.copytree(model_store, tmp_path / "store")))


@pytest.fixture
def version(registry: Registry) -> str:
    found: str = json.loads((registry.root / "champion.json").read_text())["version"]
    return found


def test_the_model_comes_first_and_then_what_it_was_held_against(registry: Registry, version: str) -> None:
    measure(registry, version)
    card = card_of(registry, version)
    assert (card.model_version, card.kind, card.problem) == (version, "xgboost", "")
    assert card.standing == "beats all baselines beyond chance"
    assert (card.label, card.samples, card.independent_samples) == (
        "markout over 0.5 s not worse than -1 bp",
        7_792,
        1_560.0,
    )
    assert (card.base_rate.value, card.base_rate.low, card.base_rate.high) == (0.91, 0.90, 0.92)
    assert [one.name for one in card.deciders] == ["xgboost", "always trade", "rules"], "another model has its own card"
    precision, auc = card.deciders[0].figures
    assert (precision.name, precision.value) == ("precision", 0.96)
    assert not auc.HasField("value"), "it is not defined, and is not 0"
    (one,) = card.reliability
    assert (one.samples, one.mean_score, one.eligible) == (10, 0.75, 0.7)
    assert str(registry.root) not in str(card)


def test_a_card_of_before_the_reliability_was_kept_has_its_figures_all_the_same(
    registry: Registry, version: str
) -> None:
    measure(registry, version, reliability={})
    card = card_of(registry, version)
    assert not card.reliability
    assert len(card.deciders) == 3


def test_what_was_not_measured_or_cannot_be_read_is_said(registry: Registry, version: str) -> None:
    shutil.rmtree(registry.root / CARDS, ignore_errors=True)
    card = card_of(registry, version)
    assert (card.standing, "nothing was measured" in card.problem) == (NOT_MEASURED, True)
    measure(registry, version, base_rate="a tenth")
    card = card_of(registry, version)
    assert "cannot be read" in card.problem
    assert not card.deciders
    assert card.standing == "beats all baselines beyond chance"


@pytest.mark.parametrize("wanted", ["00" * 8, "champion", "", "../../../etc/passwd", "../versions/champion"])
def test_only_a_version_has_a_card(registry: Registry, wanted: str) -> None:
    with pytest.raises(ModelUnknownError):
        card_of(registry, wanted)
