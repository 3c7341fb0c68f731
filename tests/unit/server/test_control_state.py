"""The control state: in force at once, kept on disk, the same in every process."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.journal import Journal, JournalSettings
from server.audit.journal_file import JournalReader
from server.control.errors import ControlChangedError
from server.control.file import ControlFile, UnreadableControlError
from server.control.model import Control, Kept, Temporary
from server.control.state import ControlSettings, ControlState, Wanted, halt_at_start
from server.control.subjects import breaker_subjects
from server.inference.breaker import Breaker, BreakerSettings, Mode

HALTED, ACTIVE = admin_pb2.TRADING_STATE_HALTED, admin_pb2.TRADING_STATE_ACTIVE


_NUMBERS = itertools.count()


class Process:
    """One process's view of the state, with a wall clock and a monotonic clock that the test moves."""

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        settings: ControlSettings | None = None,
        wall: float = 1_700_000_000.0,
    ) -> None:
        self.wall = wall
        self.monotonic = 50.0
        self.breaker = Breaker("primary", BreakerSettings(), lambda: self.monotonic, lambda: 0.5, lambda *_: None)
        ids = (f"change-{next(_NUMBERS):06}" for _ in itertools.count())
        self.control = ControlState(
            settings or ControlSettings(),
            ControlFile(directory / "control.json"),
            breaker_subjects({"primary": self.breaker}),
            journal,
            "server-1",
            lambda: next(ids),
            lambda: int(self.wall * 1e9),
            lambda: self.monotonic,
        )

    async def force(self, mode: Mode, seconds: float | None = None) -> None:
        await self.change("breaker/primary", mode.value, seconds)

    def modes_after(self, *seconds: float) -> list[Mode]:
        """Who drives the breaker at these instants from now on."""
        start, modes = self.monotonic, []
        for after in seconds:
            self.monotonic = start + after
            modes.append(self.breaker.mode)
        return modes

    async def set_state(self, state: admin_pb2.TradingState.ValueType, expected_version: int | None = None) -> None:
        name = admin_pb2.TradingState.Name(state).removeprefix("TRADING_STATE_")
        await self.change("trading_state", name, expected_version=expected_version)

    async def change(
        self, subject: str, value: str | None, seconds: float | None = None, expected_version: int | None = None
    ) -> admin_pb2.Change:
        return await self.control.change(Wanted(subject, value, "test", "test", seconds, expected_version))


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        yield journal


@asynccontextmanager
async def watching(*processes: Process) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(process.control.watch()) for process in processes]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """The file cannot be replaced, whoever we are."""
    blocker = directory / "control.json.new"
    blocker.mkdir()
    yield
    blocker.rmdir()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition never held")


async def until_version(process: Process, version: int) -> None:
    await until(lambda: process.control.version == version)


async def test_a_change_reaches_every_other_process_in_less_than_200_ms(tmp_path: Path, journal: Journal) -> None:
    processes = [Process(tmp_path, journal) for _ in range(3)]
    async with watching(*processes):
        await processes[0].set_state(HALTED)
        await processes[0].force(Mode.FORCED_OPEN)
        written = time.monotonic()
        for process in processes:
            await until_version(process, 2)
        assert time.monotonic() - written < 0.2
    assert [process.control.trading_state for process in processes] == [HALTED] * 3
    assert [process.breaker.mode for process in processes] == [Mode.FORCED_OPEN] * 3


async def test_changes_of_several_processes_at_once_are_all_kept(tmp_path: Path, journal: Journal) -> None:
    first, second, third = (Process(tmp_path, journal) for _ in range(3))
    async with watching(first, second, third):
        await asyncio.gather(
            first.set_state(HALTED), second.force(Mode.FORCED_OPEN), third.change("flag/shadow", "off")
        )
        for process in (first, second, third):
            await until_version(process, 3)
            assert process.control.trading_state == HALTED
            assert process.breaker.mode is Mode.FORCED_OPEN
            assert process.control.flags_on == ("cached_score",)


async def test_a_change_is_in_force_before_it_is_written(tmp_path: Path, journal: Journal) -> None:
    process = Process(tmp_path, journal)
    change = asyncio.ensure_future(process.set_state(HALTED))
    await asyncio.sleep(0)
    assert process.control.trading_state == HALTED
    assert not (tmp_path / "control.json").exists()
    await change
    assert ControlFile(tmp_path / "control.json").read() is not None


async def test_a_caller_that_gives_up_does_not_take_its_change_back(tmp_path: Path, journal: Journal) -> None:
    process = Process(tmp_path, journal)
    change = asyncio.ensure_future(process.set_state(HALTED))
    await asyncio.sleep(0)
    change.cancel()
    await until_version(process, 1)
    await until(lambda: journal.position == 1)


async def test_everything_survives_a_restart_forced_breakers_for_what_is_left(tmp_path: Path, journal: Journal) -> None:
    before = Process(tmp_path, journal)
    await before.set_state(HALTED)
    await before.force(Mode.FORCED_OPEN, 60)
    after = Process(tmp_path, journal)
    assert (after.control.trading_state, after.breaker.mode) == (HALTED, Mode.FORCED_OPEN)
    late = Process(tmp_path, journal, wall=before.wall + 20)
    assert late.modes_after(39.9, 40.1) == [Mode.FORCED_OPEN, Mode.AUTOMATIC]


@pytest.mark.parametrize("jump", [-3_600.0, 3_600.0])
async def test_a_wall_clock_that_jumps_does_not_prolong_a_forced_breaker(
    tmp_path: Path, journal: Journal, jump: float
) -> None:
    process = Process(tmp_path, journal)
    await process.force(Mode.FORCED_OPEN, 60)
    process.wall += jump
    await process.set_state(HALTED)  # another change takes nothing of it over again
    assert process.modes_after(59.9, 60.1) == [Mode.FORCED_OPEN, Mode.AUTOMATIC]
    ends = process.wall + 60
    forced = Temporary(id="1", value="forced_open", seconds=60, expires_at=ends, author="test", reason="test")
    assert forced.remaining_seconds(process.wall - 3_600) == 60


async def test_a_breaker_that_is_handed_back_is_automatic_everywhere(tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    async with watching(first, second):
        await first.force(Mode.FORCED_CLOSED)
        await until_version(second, 1)
        await second.force(Mode.AUTOMATIC)
        await until_version(first, 2)
    assert first.breaker.mode is second.breaker.mode is Mode.AUTOMATIC


async def test_an_expected_version_that_has_passed_refuses_the_change(tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    await first.set_state(HALTED, expected_version=0)
    with pytest.raises(ControlChangedError):
        await second.set_state(ACTIVE, expected_version=0)  # it has not heard of the first change: the file has
    assert second.control.trading_state == HALTED
    with pytest.raises(ControlChangedError):
        await first.set_state(ACTIVE, expected_version=0)
    await first.set_state(ACTIVE, expected_version=1)
    assert first.control.version == 2


async def test_a_disk_that_refuses_does_not_undo_the_change_and_gets_it_later(tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    async with watching(first, second):
        with unwritable(tmp_path):
            await first.set_state(HALTED)
            assert (first.control.trading_state, first.control.store.write_failures) == (HALTED, 1)
            assert second.control.trading_state == ACTIVE
        await until_version(second, 1)
    assert second.control.trading_state == HALTED


async def test_a_file_that_becomes_unreadable_changes_nothing_and_the_next_change_mends_it(
    tmp_path: Path, journal: Journal
) -> None:
    process = Process(tmp_path, journal)
    await process.set_state(HALTED)
    async with watching(process):
        (tmp_path / "control.json").write_text("{")
        await asyncio.sleep(0.15)
        assert process.control.trading_state == HALTED
        await process.change("flag/shadow", "off")
    kept = ControlFile(tmp_path / "control.json").read()
    assert kept is not None
    values = {subject: setting.permanent for subject, setting in kept.control.settings.items()}
    assert (values, kept.control.version) == ({"trading_state": "HALTED", "flag/shadow": "off"}, 2)


async def test_a_file_that_cannot_be_read_at_start_halts(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "control.json").write_text('{"trading_state": "OPEN", "flags": {}}')
    with pytest.raises(UnreadableControlError, match="trading_state"):
        ControlFile(tmp_path / "control.json").read()
    assert Process(tmp_path, journal).control.trading_state == HALTED


async def test_a_file_of_the_first_version_is_read(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "control.json").write_text('{"trading_state": "REDUCING", "flags": {"shadow": false}}')
    control = Process(tmp_path, journal).control
    assert (control.trading_state, control.version) == (admin_pb2.TRADING_STATE_REDUCING, 0)
    assert control.flags_on == ("cached_score",)


async def test_a_server_told_to_start_halted_is_halted_whatever_it_was(tmp_path: Path, journal: Journal) -> None:
    await Process(tmp_path, journal).set_state(ACTIVE)
    settings = ControlSettings(halted=True, store="file")
    halt_at_start(settings, ControlFile(tmp_path / "control.json"), lambda: "halt")
    assert Process(tmp_path, journal, ControlSettings(halted=True)).control.trading_state == HALTED
    await Process(tmp_path, journal).set_state(ACTIVE)
    assert Process(tmp_path, journal, ControlSettings(halted=True)).control.trading_state == ACTIVE


async def test_every_change_is_in_the_audit_once(tmp_path: Path, journal: Journal) -> None:
    first, second = Process(tmp_path, journal), Process(tmp_path, journal)
    async with watching(first, second):
        await first.force(Mode.FORCED_OPEN, 5)
        await until_version(second, 1)
    with closing(JournalReader(journal.settings.path)) as reader:
        entries = [packet_pb2.JournalEntry.FromString(row.entry) for row in reader.rows_after(0, 10)]
    (change,) = (entry.control_change for entry in entries)
    assert (change.subject, change.previous, change.value) == ("breaker/primary", "automatic", "forced_open")
    assert list(change.diff) == ["breaker/primary: automatic → forced_open for 5 s, then automatic"]
    assert (change.previous_version, change.version) == (0, 1)


def test_a_lock_that_nobody_lets_go_does_not_keep_a_change_from_being_made(tmp_path: Path) -> None:
    file = ControlFile(tmp_path / "control.json")
    with file._locked():
        other = ControlFile(tmp_path / "control.json")
        made = other.change(lambda _: Kept(control=Control(version=1)))
    assert file.read() == made
