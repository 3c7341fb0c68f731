"""A server knows the limits of the models that decide, or says that it does not."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from support.cases import Clock
from support.waiting import until

from fallback.model_limits import NO_LIMITS, UNKNOWN
from local.demo import variants
from local.demo.variants import late, recalibrated
from server.models import limits as module
from server.models.limits import KnownLimits
from server.models.registry import Registry


@pytest.fixture
def registry(tmp_path: Path, model_store: Path) -> Registry:
    registry = Registry(tmp_path / "store")
    registry.path("").parent.mkdir(parents=True)
    shutil.copy(Registry(model_store).path(champion(model_store)), registry.path(champion(model_store)))
    registry.set_alias("champion", champion(model_store))
    return registry


def champion(model_store: Path) -> str:
    version: str = json.loads((model_store / "champion.json").read_text())["version"]
    return version


async def test_limits_of_versions_with_an_alias_are_known_at_once(registry: Registry, model_store: Path) -> None:
    known = KnownLimits(registry.root, Clock())
    assert known.of(champion(model_store)) is UNKNOWN
    await known.read_aliases()
    found = known.of(champion(model_store))
    described = json.loads((model_store / "champion.json").read_text())
    assert (found.is_known, found.has_band) == (True, True)
    assert found.domain is not None
    assert list(found.domain.names) == described["domain"]["features"]
    assert found.high == pytest.approx(described["band"]["high"] or float("inf"), abs=1e-6)


async def test_those_of_another_version_are_read_when_it_has_decided(
    registry: Registry, model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
    clock = Clock()
    known = KnownLimits(registry.root, clock)
    version, nobody = late(registry, champion(model_store), 0.0), "ab" * 8
    scaled = recalibrated(registry, champion(model_store))
    running = asyncio.create_task(known.run())
    for one in (version, nobody, scaled):
        assert known.of(one) is UNKNOWN
    await until(lambda: known.of(version).is_known and known.of(scaled).is_known)
    assert known.of(version).has_band
    assert known.of(scaled).domain is not None
    assert not known.of(scaled).has_band, "of other scores the band says nothing"
    assert known.of(nobody) is UNKNOWN
    running.cancel()


@pytest.mark.parametrize("damage", ["a byte of its weights", "a number beyond all numbers"])
async def test_a_damaged_archive_neither_keeps_a_server_from_starting_nor_ends_it(
    registry: Registry, model_store: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
    version = champion(model_store)
    if damage == "a byte of its weights":
        path = registry.path(version)
        with zipfile.ZipFile(path) as archive:
            packed = archive.getinfo("weights.bin")
        content = bytearray(path.read_bytes())
        # The first byte of the deflated stream, after a header of 30 bytes and the name: 6 is no kind of block.
        content[packed.header_offset + 30 + len("weights.bin")] = 6
        path.write_bytes(content)
    else:
        version = variants._variant(registry, version, lambda one: one["domain"]["patterns"].append(10**30))
        (registry.root / "aliases" / "champion").write_text(version)
    known = KnownLimits(registry.root, Clock())
    await known.read_aliases()
    running = asyncio.create_task(known.run())
    assert known.of(version) is UNKNOWN
    await asyncio.sleep(0.05)
    assert not running.done()
    assert known.of(version) is UNKNOWN
    running.cancel()


async def test_versions_that_nobody_has_keep_no_other_from_being_read(
    registry: Registry, model_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.001)
    known = KnownLimits(registry.root, Clock())
    for number in range(100):
        assert known.of(f"{number:016x}") is UNKNOWN
    running = asyncio.create_task(known.run())
    await until(lambda: known.of(champion(model_store)).is_known)
    running.cancel()


async def test_without_a_model_store_no_model_has_limits() -> None:
    known = KnownLimits(None, Clock())
    await known.read_aliases()
    assert known.of("ab" * 8) is NO_LIMITS
