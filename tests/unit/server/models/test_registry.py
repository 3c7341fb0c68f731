"""The model registry: versions by hash, aliases, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from support.guest_model import write_guest_model
from support.guest_sets import MIXED, REGISTERED, know

from feature_cache.features import MF1
from local.demo.variants import inverted, late, recalibrated
from local.stack.parts.torchserve import archive
from server.errors import ModelUnknownError
from server.models.registry import ModelUnusableError, Registry


@pytest.fixture
def registry(tmp_path: Path, model_store: Path) -> Registry:
    registry = Registry(tmp_path / "store")
    registry.path("").parent.mkdir(parents=True)
    for name in ("champion", "challenger"):  # other tests may have added versions
        for suffix in (".mar", ".json"):
            shutil.copy(model_store / f"{name}{suffix}", registry.root)
        version = trained(registry, name)
        shutil.copy(Registry(model_store).path(version), registry.path(version))
    return registry


def trained(registry: Registry, name: str) -> str:
    version: str = json.loads((registry.root / f"{name}.json").read_text())["version"]
    return version


def test_every_version_is_listed_with_what_it_says_of_itself(registry: Registry) -> None:
    records = {record.version: record for record in registry.records()}
    assert set(records) == {trained(registry, "champion"), trained(registry, "challenger")}
    for name in ("champion", "challenger"):
        record = records[trained(registry, name)]
        assert (record.name, record.problem, record.feature_set) == (name, "", MF1.version)
        assert record.canned_rows.shape == (16, len(MF1))
        assert np.isnan(record.canned_rows[-1]).all()
        assert ((record.canned_scores >= 0) & (record.canned_scores <= 1)).all()


def test_an_alias_points_to_a_version_until_it_points_to_another(registry: Registry) -> None:
    one, two = trained(registry, "champion"), trained(registry, "challenger")
    assert registry.set_alias("champion", one) is None
    assert registry.set_alias("champion", two) == one
    assert registry.aliases() == {"champion": two}
    assert registry.resolve("champion") == two
    assert registry.resolve(one) == one


@pytest.mark.parametrize("name", ["", "previous", "nobody", "00" * 8, "../../etc/passwd", "AB" * 8])
def test_what_is_not_there_is_not_found(registry: Registry, name: str) -> None:
    with pytest.raises(ModelUnknownError):
        registry.resolve(name)


def test_who_asks_for_a_candidate_before_there_is_one_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelUnknownError, match="no candidate yet: `pretrade train` and `pretrade models add` make"):
        Registry(tmp_path).resolve("candidate")
    with pytest.raises(ModelUnknownError, match=r"model desk has no candidate of its own yet: .* --model desk` makes"):
        Registry(tmp_path, "desk").resolve("candidate")


def test_an_alias_is_refused_to_what_is_unknown_damaged_or_of_another_feature_set(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = trained(registry, "champion")
    with pytest.raises(ValueError, match="one of"):
        registry.set_alias("favourite", version)
    with pytest.raises(ModelUnknownError):
        registry.set_alias("champion", "00" * 8)
    with registry.path("22" * 8).open("wb") as file:
        file.write(b"no zip")
    assert {record.version for record in registry.records() if record.problem} == {"22" * 8}
    with pytest.raises(ModelUnusableError, match="unreadable"):
        registry.set_alias("champion", "22" * 8)
    guests = write_guest_model(MIXED, tmp_path / "guest.mar").version
    shutil.copy(tmp_path / "guest.mar", registry.path(guests))
    know(monkeypatch)
    with pytest.raises(ModelUnusableError, match=f"it wants features {MIXED.version}, known here are {MF1.version}"):
        registry.set_alias("champion", guests)
    assert registry.aliases() == {}


def test_a_model_of_a_set_that_is_known_here_can_be_used(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    know(monkeypatch, REGISTERED)
    version = write_guest_model(MIXED, tmp_path / "guest.mar").version
    shutil.copy(tmp_path / "guest.mar", registry.path(version))
    record = registry.usable(version)
    assert (record.features, record.feature_set) == (MIXED, MIXED.version)
    assert record.canned_rows.shape == (len(record.canned_scores), len(MIXED))


def test_an_archive_under_another_versions_name_is_not_that_version(registry: Registry) -> None:
    shutil.copy(registry.path(trained(registry, "champion")), registry.path("11" * 8))
    assert "its name says" in registry.describe("11" * 8).problem


def test_a_reader_never_sees_half_an_alias(registry: Registry) -> None:
    versions = [trained(registry, "champion"), trained(registry, "challenger")]
    registry.set_alias("champion", versions[0])
    done = threading.Event()

    def change() -> None:
        for number in range(40):
            registry.set_alias("champion", versions[number % 2])
        done.set()

    writer = threading.Thread(target=change)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(registry.aliases().get("champion"))
    writer.join()
    assert seen <= set(versions)


def test_a_replica_starts_with_the_alias_and_else_with_what_was_trained(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = trained(registry, "champion"), trained(registry, "challenger")
    assert archive(registry.root, "champion") == registry.path(one)
    registry.set_alias("champion", two)
    assert archive(registry.root, "champion") == registry.path(two)
    registry.path(one).unlink()
    registry.path(two).unlink()
    assert archive(registry.root, "champion") == registry.root / "champion.mar"


def test_variants_are_sound_versions_that_differ_in_one_thing(registry: Registry) -> None:
    first = registry.usable(trained(registry, "champion"))
    surer, mirrored, slow = (
        registry.usable(version)
        for version in (
            recalibrated(registry, first.version),
            inverted(registry, first.version),
            late(registry, first.version, 0.02),
        )
    )
    assert len({first.version, surer.version, mirrored.version, slow.version}) == 4
    np.testing.assert_allclose(mirrored.canned_scores, 1 - first.canned_scores, atol=1e-6)
    np.testing.assert_array_equal(slow.canned_scores, first.canned_scores)
    assert 0 < np.abs(surer.canned_scores - first.canned_scores).max() < 0.02
    assert recalibrated(registry, first.version) == surer.version, "the same change gives the same version"


def test_each_model_has_aliases_of_its_own_over_the_same_versions(registry: Registry, tmp_path: Path) -> None:
    version, scalper = trained(registry, "champion"), Registry(registry.root, "scalper")
    assert scalper.set_alias("champion", version) is None
    assert scalper.resolve("champion") == version
    with pytest.raises(ModelUnknownError):
        registry.resolve("champion")
    registry.set_alias("candidate", version)
    assert dict(registry.aliases()) == {"candidate": version}
    assert dict(registry.aliases_of_all()) == {"candidate": version, "scalper/champion": version}
    assert Registry(tmp_path / "nothing").aliases_of_all() == {}
