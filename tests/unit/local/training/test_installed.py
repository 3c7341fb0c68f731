"""What a stack starts with has a card and aliases, and what an operator promoted stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from local.training.installed import is_installed, move_aliases
from server.models.registry import CARD_FILE, CARDS, EVALUATION_FILE, NOT_MEASURED, Registry
from torchserve import build


@pytest.fixture
def registry(tmp_path: Path, model_store: Path) -> Registry:
    return Registry(Path(shutil.copytree(model_store, tmp_path / "store", ignore=shutil.ignore_patterns("aliases"))))


def versions(registry: Registry) -> dict[str, str]:
    return {name: str(one["version"]) for name, one in build.descriptions(registry.root).items()}


def add_card(registry: Registry, version: str, standing: str) -> Path:
    card = registry.root / CARDS / version / CARD_FILE
    card.parent.mkdir(parents=True)
    card.write_text("# Model card")
    said = {"standing": {"xgboost": standing, "torch": standing}}
    (card.parent / EVALUATION_FILE).write_text(json.dumps(said))
    return card


def test_a_store_without_a_card_of_each_model_is_not_ready(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_holds", lambda store, inputs: True)
    assert not is_installed(None, registry.root)
    for version in versions(registry).values():
        add_card(registry, version, "does not beat the rules")
    assert is_installed(None, registry.root)
    monkeypatch.setattr(build, "_holds", lambda store, inputs: False)
    assert not is_installed(None, registry.root), "the models are of other data or code"


def test_a_version_stands_as_its_card_says(registry: Registry) -> None:
    version = versions(registry)["champion"]
    assert (registry.standing(version).text, registry.standing(version).card) == (NOT_MEASURED, None)
    card = add_card(registry, version, "does not beat the rules")
    assert (registry.standing(version).text, registry.standing(version).card) == ("does not beat the rules", card)
    (card.parent / EVALUATION_FILE).write_text("half a fi")
    assert (registry.standing(version).text, registry.standing(version).card) == (NOT_MEASURED, card)


def test_aliases_follow_what_is_installed_and_leave_what_was_promoted(registry: Registry) -> None:
    first = versions(registry)
    move_aliases(registry, {}, first)
    assert registry.aliases() == first
    swapped = {"champion": first["challenger"], "challenger": first["champion"]}
    move_aliases(registry, first, swapped)
    assert registry.aliases() == swapped, "nobody had promoted another"
    registry.set_alias("champion", first["champion"])
    move_aliases(registry, swapped, swapped)
    assert registry.aliases()["champion"] == first["champion"], "an operator had promoted it"
    registry.path("22" * 8).write_bytes(b"no zip")
    (registry.root / "aliases" / "champion").write_text("22" * 8)
    move_aliases(registry, swapped, swapped)
    assert registry.aliases()["champion"] == swapped["champion"], "what cannot be used is not started with"
