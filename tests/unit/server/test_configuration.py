"""The configuration file, read anew: all of it or nothing, in every process that is told to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.waiting import until

from pretrade.admin.v1 import admin_pb2
from server.configuration import Configuration, differences
from server.control.file import ControlFile
from server.control.state import ControlSettings, ControlState
from server.errors import ChangeRefusedError, InvalidChangeError
from server.journal.journal import Journal, JournalSettings
from server.settings import CONFIG_FILE, Settings, load

GOOD = "[guards]\nmax_notional = 1000.0\n"
BROKEN = {
    "not TOML": "[guards\n",
    "half-written": "[guards]\nmax_no",
    "an unknown key": "[guards]\nmax_nominal = 5.0\n",
    "an unknown section": "[guard]\nmax_notional = 5.0\n",
    "a wrong type": "[guards]\nmax_notional = 'much'\n",
    "a negative limit": "[guards]\nmax_notional = -5.0\n",
    "not UTF-8": "[guards]\nmax_notional = 5.0 # \udcff\n",
    "what needs a restart": "[budget]\ncap_seconds = 0.02\n",
}
_IDS = itertools.count()


class Process:
    """One process of a server that reads the file."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.configuration = Configuration(load(), load, directory / "journal.db")
        self.applied: list[Settings] = []
        self.control = ControlState(
            ControlSettings(),
            ControlFile(directory / "control.json"),
            self.configuration.subjects(),
            journal,
            "server-1",
            lambda: f"{next(_IDS):06}",
            lambda: 0,
            lambda: 0.0,
        )
        self.configuration.on_reload(self.applied.append)

    async def reload(self, **asked: object) -> admin_pb2.ReloadConfigurationResponse:
        request = admin_pb2.ReloadConfigurationRequest(reason="limits", **asked)  # type: ignore[arg-type]
        return await self.configuration.reload(self.control, request, "ann")

    @property
    def max_notional(self) -> float | None:
        return self.configuration.settings.guards.max_notional


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pretrade.toml"
    path.write_text("")
    monkeypatch.setenv(CONFIG_FILE, str(path))
    return path


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        yield journal


def write(path: Path, content: str) -> None:
    path.write_bytes(content.encode(errors="surrogateescape"))


def remove(path: Path) -> None:
    path.unlink()


async def test_a_sound_file_holds_in_every_process_of_the_server(file: Path, tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    watch = asyncio.create_task(second.control.watch())
    write(file, GOOD)
    tried = await first.reload(dry_run=True)
    assert "guards.max_notional: 1000000.0 → 1000.0" in tried.change.diff
    assert (first.applied, first.control.version) == ([], 0)
    made = await first.reload(expected_config_hash=tried.previous_config_hash)
    assert (first.max_notional, made.config_hash) == (1_000.0, first.configuration.settings.config_hash())
    await until(lambda: second.applied)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert second.configuration.settings == first.configuration.settings
    with pytest.raises(InvalidChangeError):
        await first.reload(expected_config_hash=tried.previous_config_hash)
    restarted = Process(tmp_path, journal)
    assert (restarted.max_notional, restarted.applied) == (1_000.0, [])


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_file_changes_nothing(file: Path, tmp_path: Path, journal: Journal, content: str) -> None:
    process = Process(tmp_path, journal)
    before = process.configuration.settings
    write(file, content)
    with pytest.raises(ChangeRefusedError) as refused:
        await process.reload()
    assert str(refused.value)
    assert (process.configuration.settings, process.control.version) == (before, 0)
    assert (process.applied, process.configuration.failures) == ([], 1)


async def test_a_file_that_is_gone_changes_nothing_and_keeps_a_server_from_starting(
    file: Path, tmp_path: Path, journal: Journal
) -> None:
    process = Process(tmp_path, journal)
    remove(file)
    with pytest.raises(ChangeRefusedError, match="no such file"):
        await process.reload()
    with pytest.raises(ValueError, match="no such file"):
        load()


async def test_a_file_that_changed_again_meanwhile_is_not_obeyed(file: Path, tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    write(file, GOOD)
    await first.reload()
    write(file, "[guards]\nmax_notional = 7.0\n")
    watch = asyncio.create_task(second.control.watch())
    await until(lambda: second.configuration.failures)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert second.max_notional == 1_000_000.0


def test_the_environment_says_more_than_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("[guards]\nmax_notional = 5.0\nprice_collar_bps = 7.0\n")
    monkeypatch.setenv("PRETRADE_GUARDS__MAX_NOTIONAL", "9")
    guards = load().guards
    assert (guards.max_notional, guards.price_collar_bps) == (9.0, 7.0)


def test_differences_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Settings()
    monkeypatch.setenv("PRETRADE_REDIS_URL", "redis://:hunter2@127.0.0.1:6379/0")
    monkeypatch.setenv("PRETRADE_GRPC__PORT", "7009")
    assert differences(before, Settings()) == ["grpc.port: 7001 → 7009"]
