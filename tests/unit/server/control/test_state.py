"""The control state: in force at once, kept on disk, the same in every process."""

from __future__ import annotations

import asyncio
import itertools
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
from support.control_files import role_of
from support.waiting import until

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.file import ControlFile, UnreadableControlError
from server.control.flags import FLAGS
from server.control.model import UNDECIDED, Control, Kept, Temporary
from server.control.start import halt_at_start
from server.control.state import ControlSettings, ControlState, Wanted
from server.control.subjects import breaker_subjects
from server.errors import ChangeRefusedError, ControlChangedError, InvalidChangeError, UnknownSubjectError
from server.inference.breaker import Breaker, BreakerSettings, Mode
from server.journal.journal import Journal, JournalSettings
from server.journal.journal_file import JournalReader

HALTED, ACTIVE = admin_pb2.TRADING_STATE_HALTED, admin_pb2.TRADING_STATE_ACTIVE
REDUCING = admin_pb2.TRADING_STATE_REDUCING

TRADES: ControlSettings = ControlSettings(initial_trading_state="ACTIVE")
"""Of a server that trades from its first start on, which makes version 1 of its control state."""
_NUMBERS = itertools.count()


class Process:
    """One process's view of the state, with a wall clock and a monotonic clock that the test moves."""

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        settings: ControlSettings = TRADES,
        wall: float = 1_700_000_000.0,
    ) -> None:
        self.wall = wall
        self.monotonic = 50.0
        self.breaker = Breaker("primary", BreakerSettings(), lambda: self.monotonic, lambda: 0.5, lambda *_: None)
        ids = (f"change-{next(_NUMBERS):06}" for _ in itertools.count())
        self.control = ControlState(
            settings,
            ControlFile(directory / "control.json"),
            breaker_subjects([role_of("primary", self.breaker)]),
            journal,
            f"process-{next(_NUMBERS)}",
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

    async def set_state(
        self,
        state: admin_pb2.TradingState.ValueType,
        expected_version: int | None = None,
        seconds: float | None = None,
        lifts: tuple[str, ...] = (),
    ) -> admin_pb2.Change:
        name = admin_pb2.TradingState.Name(state).removeprefix("TRADING_STATE_")
        return await self.change("trading_state", name, seconds, expected_version, lifts)

    async def change(
        self,
        subject: str,
        value: str | None,
        seconds: float | None = None,
        expected_version: int | None = None,
        lifts: tuple[str, ...] = (),
    ) -> admin_pb2.Change:
        return await self.control.change(Wanted(subject, value, "test", "test", seconds, expected_version, lifts=lifts))


Start = Callable[..., Awaitable[Process]]


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with Journal(JournalSettings(path=tmp_path / "journal.db")) as journal:
        yield journal


@pytest.fixture
def start(tmp_path: Path, journal: Journal) -> Start:
    """Starts a process of the server."""

    async def start(settings: ControlSettings = TRADES, wall: float = 1_700_000_000.0) -> Process:
        process = Process(tmp_path, journal, settings, wall)
        await process.control.synchronise()
        return process

    return start


@asynccontextmanager
async def watching(*processes: Process) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(process.control.watch()) for process in processes]
    yield
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


@contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """The file cannot be replaced, whoever we are."""
    blocker = directory / "control.json.new"
    blocker.mkdir()
    yield
    blocker.rmdir()


async def until_version(process: Process, version: int) -> None:
    await until(lambda: process.control.version == version)


def changes_in(journal: Journal) -> list[packet_pb2.ControlChange]:
    with closing(JournalReader(journal.settings.path)) as reader:
        entries = [packet_pb2.JournalEntry.FromString(row.entry) for row in reader.rows_after(0, 1_000)]
    return [entry.control_change for entry in entries]


async def test_a_change_reaches_every_other_process_as_soon_as_it_is_made(start: Start) -> None:
    processes = [await start() for _ in range(3)]
    async with watching(*processes):
        await processes[0].set_state(HALTED)
        await processes[0].force(Mode.FORCED_OPEN)
        written = time.monotonic()
        for process in processes:
            await until_version(process, 3)
        assert time.monotonic() - written < 1.0, "`make bench-flips` says how fast"
    assert [process.control.trading_state for process in processes] == [HALTED] * 3
    assert [process.breaker.mode for process in processes] == [Mode.FORCED_OPEN] * 3


async def test_changes_of_several_processes_at_once_are_all_kept(start: Start) -> None:
    first, second, third = [await start() for _ in range(3)]
    async with watching(first, second, third):
        await asyncio.gather(
            first.set_state(HALTED), second.force(Mode.FORCED_OPEN), third.change("flag/shadow", "off")
        )
        for process in (first, second, third):
            await until_version(process, 4)
            assert process.control.trading_state == HALTED
            assert process.breaker.mode is Mode.FORCED_OPEN
            assert process.control.flags_on == ("cached_score", "embedded", "out_of_domain")


async def test_a_change_is_in_force_before_it_is_written(start: Start, tmp_path: Path) -> None:
    process = await start()
    before = ControlFile(tmp_path / "control.json").read()
    change = asyncio.ensure_future(process.set_state(HALTED))
    await asyncio.sleep(0)
    assert process.control.trading_state == HALTED
    assert ControlFile(tmp_path / "control.json").read() == before
    await change
    assert ControlFile(tmp_path / "control.json").read() != before


async def test_a_change_that_relaxes_is_in_force_when_it_is_written_and_not_before(
    start: Start, tmp_path: Path
) -> None:
    process, other = await start(), await start()
    await process.set_state(HALTED)
    with unwritable(tmp_path):
        with pytest.raises(ChangeRefusedError, match="lifted"):
            await process.set_state(ACTIVE)
        assert process.control.trading_state == HALTED
    await process.set_state(ACTIVE)
    assert process.control.trading_state == ACTIVE
    async with watching(other):
        await until(lambda: other.control.version == process.control.version)
    assert other.control.trading_state == ACTIVE


async def test_a_caller_that_gives_up_does_not_take_its_change_back(start: Start, journal: Journal) -> None:
    process = await start()
    change = asyncio.ensure_future(process.set_state(HALTED))
    await asyncio.sleep(0)
    change.cancel()
    await until_version(process, 2)
    await until(lambda: journal.position == 1)


async def test_everything_survives_a_restart_forced_breakers_for_what_is_left(start: Start) -> None:
    before = await start()
    await before.set_state(HALTED)
    await before.force(Mode.FORCED_OPEN, 60)
    after = await start()
    assert (after.control.trading_state, after.breaker.mode) == (HALTED, Mode.FORCED_OPEN)
    late = await start(wall=before.wall + 20)
    assert late.modes_after(39.9, 40.1) == [Mode.FORCED_OPEN, Mode.AUTOMATIC]


@pytest.mark.parametrize("jump", [-3_600.0, 3_600.0])
async def test_a_wall_clock_that_jumps_does_not_prolong_a_forced_breaker(start: Start, jump: float) -> None:
    process = await start()
    await process.force(Mode.FORCED_OPEN, 60)
    process.wall += jump
    await process.set_state(HALTED)  # another change takes nothing of it over again
    assert process.modes_after(59.9, 60.1) == [Mode.FORCED_OPEN, Mode.AUTOMATIC]
    ends = process.wall + 60
    forced = Temporary(id="1", value="forced_open", seconds=60, expires_at=ends, author="test", reason="test")
    assert forced.remaining_seconds(process.wall - 3_600) == 60


async def test_a_breaker_that_is_handed_back_is_automatic_everywhere(start: Start) -> None:
    first, second = await start(), await start()
    async with watching(first, second):
        await first.force(Mode.FORCED_CLOSED)
        await until_version(second, 2)
        await second.force(Mode.AUTOMATIC)
        await until_version(first, 3)
    assert first.breaker.mode is second.breaker.mode is Mode.AUTOMATIC


async def test_an_expected_version_that_has_passed_refuses_the_change(start: Start) -> None:
    first, second = await start(), await start()
    await first.set_state(HALTED, expected_version=1)
    with pytest.raises(ControlChangedError):
        await second.set_state(ACTIVE, expected_version=1)  # it has not heard of the first change: the file has
    assert second.control.trading_state == HALTED
    with pytest.raises(ControlChangedError):
        await first.set_state(ACTIVE, expected_version=1)
    await first.set_state(ACTIVE, expected_version=2)
    assert first.control.version == 3


async def test_a_disk_that_refuses_does_not_undo_the_change_and_gets_it_later(start: Start, tmp_path: Path) -> None:
    first, second = await start(), await start()
    async with watching(first, second):
        with unwritable(tmp_path):
            await first.set_state(HALTED)
            assert first.control.trading_state == HALTED
            assert first.control.store.write_failures >= 1
            assert second.control.trading_state == ACTIVE
        await until_version(second, 2)
    assert second.control.trading_state == HALTED


async def test_every_flag_is_in_force_where_it_is_changed_and_after_a_restart(start: Start) -> None:
    process = await start()
    for name in FLAGS:
        before = getattr(process.control, name)
        await process.change(f"flag/{name}", "off" if before else "on")
        assert getattr(process.control, name) is not before, name
        assert (name in process.control.flags_on) is not before, "the packet says what was looked at"
        assert getattr((await start()).control, name) is not before, name


async def test_a_file_that_becomes_unreadable_changes_nothing_and_the_next_change_mends_it(
    start: Start, tmp_path: Path
) -> None:
    process = await start()
    await process.set_state(HALTED)
    async with watching(process):
        (tmp_path / "control.json").write_text("{")
        await asyncio.sleep(0.15)
        assert process.control.trading_state == HALTED
        await process.change("flag/shadow", "off")
    kept = ControlFile(tmp_path / "control.json").read()
    assert kept is not None
    assert {subject: setting.permanent for subject, setting in kept.control.settings.items()} == {"flag/shadow": "off"}
    assert [one.level for one in kept.control.trading.restrictions.values()] == ["HALTED"]
    assert kept.control.version == 3


async def test_a_file_that_cannot_be_read_at_start_halts_also_a_server_that_is_to_trade_at_first(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "control.json").write_text('{"control": {"version": "many"}}')
    with pytest.raises(UnreadableControlError, match="version"):
        ControlFile(tmp_path / "control.json").read()
    process = await start()
    assert process.control.trading_state == HALTED
    await process.set_state(ACTIVE)
    assert (await start()).control.trading_state == ACTIVE


async def test_a_new_installation_is_halted_until_somebody_sets_the_trading_state(
    start: Start, journal: Journal
) -> None:
    first = await start(ControlSettings())
    assert (first.control.trading_state, first.control.version) == (HALTED, 0)
    assert [one.id for one in first.control.restrictions()] == [UNDECIDED.id]
    await first.change("flag/shadow", "off")
    assert (await start(ControlSettings())).control.trading_state == HALTED, "nobody has said that it may trade"
    made = await first.set_state(ACTIVE)
    assert (list(made.lifts), made.previous, made.value) == ([UNDECIDED.id], "HALTED", "ACTIVE")
    assert (await start(ControlSettings())).control.trading_state == ACTIVE
    assert [list(change.lifts) for change in changes_in(journal)] == [[], [UNDECIDED.id]]


@pytest.mark.parametrize(("initial", "state"), [("ACTIVE", ACTIVE), ("REDUCING", REDUCING), ("HALTED", HALTED)])
async def test_the_settings_may_say_what_a_new_installation_does_and_the_audit_then_says_so_once(
    start: Start, journal: Journal, initial: str, state: admin_pb2.TradingState.ValueType
) -> None:
    settings = ControlSettings.model_validate({"initial_trading_state": initial})
    processes = [await start(settings) for _ in range(3)]
    assert [process.control.trading_state for process in processes] == [state] * 3
    async with watching(*processes):
        if initial != "HALTED":
            await until(lambda: journal.position == 1)
        await processes[0].change("flag/shadow", "off")
        await until(lambda: len(changes_in(journal)) == (1 if initial == "HALTED" else 2))
    if initial != "HALTED":
        first = changes_in(journal)[0]
        assert (first.author, first.previous, first.value) == ("server", "HALTED", initial)
        assert "initial_trading_state" in first.reason
    await processes[0].set_state(HALTED)
    assert (await start(settings)).control.trading_state == HALTED, "it is not new any more"


async def test_a_server_told_to_start_halted_is_halted_whatever_it_was(
    start: Start, tmp_path: Path, journal: Journal
) -> None:
    await (await start()).set_state(ACTIVE)
    settings, file = ControlSettings(halted=True, store="file"), ControlFile(tmp_path / "control.json")
    for number in range(3):
        halt_at_start(settings, file, f"halt-{number}".__str__, time.time_ns)
    process = await start(settings)
    assert process.control.trading_state == HALTED
    assert [one.id for one in process.control.restrictions()] == ["halt-2"], "one for the last start, none for others"
    await process.set_state(ACTIVE)
    assert (await start(settings)).control.trading_state == ACTIVE


async def test_halts_of_several_people_are_lifted_by_their_ids_or_all_together(start: Start) -> None:
    process = await start()
    ann = await process.set_state(HALTED)
    ben = await process.set_state(HALTED)
    partly = await process.set_state(ACTIVE, lifts=(ann.change_id,))
    assert process.control.trading_state == HALTED
    assert list(partly.lifts) == [ann.change_id]
    assert [line.partition(" by ")[0] for line in partly.diff] == ["lifts HALTED", "stays HALTED"]
    assert ben.change_id in partly.diff[1]
    with pytest.raises(UnknownSubjectError, match=ben.change_id):
        await process.set_state(ACTIVE, lifts=(ann.change_id,))
    third = await process.set_state(REDUCING)
    assert (list(third.lifts), process.control.trading_state) == ([ben.change_id], REDUCING)
    last = await process.set_state(ACTIVE)
    assert (list(last.lifts), process.control.trading_state) == ([third.change_id], ACTIVE)
    assert process.control.restrictions() == []


async def test_a_halt_that_is_set_while_another_one_is_lifted_stays(start: Start) -> None:
    first, second = await start(), await start()
    await first.set_state(HALTED)
    made, another = await asyncio.gather(first.set_state(ACTIVE), second.set_state(HALTED))
    assert another.change_id not in made.lifts
    async with watching(first, second):
        await until(lambda: first.control.version == second.control.version)
    assert first.control.trading_state == second.control.trading_state == HALTED


async def test_very_many_halts_take_each_others_place(start: Start) -> None:
    process = await start()
    for _ in range(40):
        await process.set_state(HALTED)
    standing = process.control.restrictions()
    assert 0 < len(standing) <= 32
    assert process.control.trading_state == HALTED
    assert set((await process.set_state(ACTIVE)).lifts) == {one.id for one in standing}
    assert process.control.trading_state == ACTIVE


async def test_a_halt_for_a_time_gives_way_to_what_was_there(start: Start, journal: Journal) -> None:
    process = await start()
    await process.set_state(REDUCING)
    made = await process.set_state(HALTED, seconds=60)
    assert list(made.diff) == ["trading_state: REDUCING → HALTED for 60 s, then REDUCING"]
    assert process.control.reverts_in_seconds("trading_state") == 60.0
    async with watching(process):
        process.monotonic += 60.1
        await until(lambda: process.control.trading_state == REDUCING)
        await until(lambda: len(changes_in(journal)) == 4)
    ended = changes_in(journal)[-1]
    assert (ended.author, ended.previous, ended.value) == ("expiry", "HALTED", "REDUCING")
    assert list(ended.lifts) == [made.change_id]
    assert process.control.reverts_in_seconds("trading_state") is None


async def test_what_is_lifted_for_a_time_is_in_force_again_afterwards_for_good(start: Start, journal: Journal) -> None:
    process = await start()
    halt = await process.set_state(HALTED)
    made = await process.set_state(ACTIVE, seconds=60)
    assert made.diff[0] == "trading_state: HALTED → ACTIVE for 60 s, then HALTED"
    assert (list(made.lifts), process.control.trading_state) == ([halt.change_id], ACTIVE)
    assert [(one.level, one.begins) for one in process.control.restrictions()] == [("HALTED", True)]
    restarted = await start(wall=process.wall + 30)
    assert restarted.control.reverts_in_seconds("trading_state") == pytest.approx(30.0)
    async with watching(process):
        process.monotonic += 60.1
        await until(lambda: process.control.trading_state == HALTED)
        await until(lambda: len(changes_in(journal)) == 4)
    ended = changes_in(journal)[-1]
    assert (ended.author, ended.previous, ended.value) == ("expiry", "ACTIVE", "HALTED")
    behind = await start(wall=process.wall - 3_600)
    assert behind.control.trading_state == HALTED, "no wall clock lifts it once more"
    await process.set_state(ACTIVE)
    assert process.control.trading_state == ACTIVE


async def test_what_cannot_be_meant_is_refused(start: Start) -> None:
    process = await start()
    for wanted in (Wanted("trading_state", None, "test", "test"), Wanted("trading_state", "OPEN", "test", "test")):
        with pytest.raises(InvalidChangeError):
            await process.control.change(wanted)


async def test_every_change_is_in_the_audit_once(start: Start, journal: Journal) -> None:
    first, second = await start(ControlSettings()), await start(ControlSettings())
    async with watching(first, second):
        await first.force(Mode.FORCED_OPEN, 5)
        await until_version(second, 1)
        await asyncio.sleep(0.2)
    (change,) = changes_in(journal)
    assert (change.subject, change.previous, change.value) == ("breaker/primary", "automatic", "forced_open")
    assert list(change.diff) == ["breaker/primary: automatic → forced_open for 5 s, then automatic"]
    assert (change.previous_version, change.version) == (0, 1)


async def test_a_change_whose_process_died_before_it_recorded_it_is_recorded_by_another_one(
    start: Start, tmp_path: Path, journal: Journal
) -> None:
    async with Journal(JournalSettings(path=tmp_path / "other.db")) as lost:
        dying = Process(tmp_path, lost)
        await dying.control.synchronise()
    made = await dying.set_state(HALTED)  # its journal is closed, and takes nothing any more
    other = await start()
    async with watching(other):
        await asyncio.sleep(0.3)
        assert changes_in(journal) == [], "its maker may be about to do it"

        def recorded_later() -> bool:
            other.monotonic += 0.1
            return other.control.store.unrecorded() == {}

        await until(recorded_later)
    recorded = {change.change_id: change for change in changes_in(journal)}
    assert (recorded[made.change_id].author, recorded[made.change_id].value) == ("test", "HALTED")
    assert recorded[made.change_id].instance_id == dying.control._instance_id


async def test_a_change_that_the_journal_refuses_is_recorded_when_it_is_well_again(
    start: Start, tmp_path: Path
) -> None:
    closed = Journal(JournalSettings(path=tmp_path / "journal-2.db"))
    process = Process(tmp_path, closed, ControlSettings())
    await process.set_state(HALTED)
    assert (process.control.record_failures, len(process.control.store.unrecorded())) == (1, 1)
    async with closed, watching(process):
        await until(lambda: process.control.store.unrecorded() == {})
        assert [change.value for change in changes_in(closed)] == ["HALTED"]


async def test_what_is_to_be_recorded_and_cannot_be_read_ends_no_server(start: Start) -> None:
    process = await start()
    control = process.control.store.control
    (change_id,) = control.changes
    process.control.store.control = control.with_record(change_id, "no JSON")
    async with watching(process):
        await until(lambda: process.control.store.unrecorded() == {})


def test_a_lock_that_nobody_lets_go_does_not_keep_a_change_from_being_made(tmp_path: Path) -> None:
    file = ControlFile(tmp_path / "control.json")
    with file._locked():
        other = ControlFile(tmp_path / "control.json")
        made = other.change(lambda _: Kept(control=Control(version=1)))
    assert file.read() == made


async def test_what_a_process_wrote_without_the_lock_over_another_ones_change_is_mended(
    start: Start, tmp_path: Path
) -> None:
    process = await start()
    before = (tmp_path / "control.json").read_bytes()
    await process.set_state(HALTED)
    async with watching(process):
        (tmp_path / "control.json").write_bytes(before)
        await until(lambda: b"HALTED" in (tmp_path / "control.json").read_bytes())


def test_the_file_is_synced_with_its_directory_and_only_its_user_may_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    before = os.umask(0)
    try:
        ControlFile(tmp_path / "control.json").change(lambda _: Kept(control=Control(version=1)))
    finally:
        os.umask(before)
    assert done == ["file", "rename", "directory"]
    assert stat.S_IMODE((tmp_path / "control.json").stat().st_mode) == 0o600


def test_a_directory_that_could_not_be_synced_is_synced_with_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ControlFile(tmp_path / "control.json")
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        file.change(lambda _: Kept(control=Control(version=1)))
    assert file.unsynced, "others see the change, and a loss of power may undo it"
    monkeypatch.undo()
    file.change(lambda found: found or Kept())
    assert not file.unsynced
