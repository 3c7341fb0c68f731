"""The journal on real files: durable in order, refuses in time, recovers by itself."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.waiting import until

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import (
    JournalClosedError,
    JournalCorruptedError,
    JournalError,
    JournalFullError,
    JournalInUseError,
    JournalUnwritableError,
)
from server.journal.journal import Durability, Journal, JournalSettings
from server.journal.journal_file import JournalReader, link
from server.machine import Files, Machine, Volume


def settings(tmp_path: Path, **changes: object) -> JournalSettings:
    return JournalSettings.model_validate(
        {"path": tmp_path / "journal.db", "retry_min_seconds": 0.01, "retry_max_seconds": 0.05, **changes}
    )


def entries_in(path: Path) -> list[bytes]:
    with closing(JournalReader(path)) as journal:
        journal.verify()
        return [row.entry for row in journal.rows_after(journal.anchor().position, -1)]


@pytest.mark.parametrize("durability", [Durability.FSYNC, Durability.OS])
async def test_a_row_can_be_read_by_others_once_its_future_resolves(tmp_path: Path, durability: Durability) -> None:
    async with Journal(settings(tmp_path, durability=durability)) as journal:
        await journal.append(b"one")
        assert entries_in(journal.settings.path) == [b"one"]
        assert (journal.position, journal.written, journal.depth) == (1, 1, 0)


async def test_rows_keep_the_order_of_their_appends(tmp_path: Path) -> None:
    rows = [str(i).encode() for i in range(1000)]
    async with Journal(settings(tmp_path, batch_rows=64)) as journal:
        await asyncio.gather(*(journal.append(row) for row in rows))
        assert journal.written == 1000
        assert journal.batches < 1000
    assert entries_in(journal.settings.path) == rows


async def test_rows_appended_together_share_one_commit(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await journal.append_many([b"a", b"b", b"c"])
        assert journal.batches == 1
        assert journal.commit_rows.buckets()[1] == 3
        assert 0 < journal.commits.buckets()[1] == journal.last_commit_seconds
    assert entries_in(journal.settings.path) == [b"a", b"b", b"c"]


class Decisions:
    """As much of a batch of decisions as the journal knows: text whose lines are decisions."""

    def __init__(self, *lines: str, state: str = "") -> None:
        self.lines = lines
        self.state = state

    def __len__(self) -> int:
        return len(self.lines)

    def can_join(self, other: Decisions) -> bool:
        return self.state == other.state

    def entry(self, others: Sequence[Decisions]) -> bytes:
        lines = [line for batch in (self, *others) for line in batch.lines]
        if "broken" in lines:
            raise ValueError("a bug")
        return "\n".join(lines).encode()


async def test_decisions_side_by_side_in_a_commit_are_one_entry(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        appends = [
            journal.append_batch(Decisions("a", "b")),
            journal.append_batch(Decisions("c")),
            journal.append(b"a note"),
            journal.append_batch(Decisions("d")),
            journal.append_batch(Decisions("e", state="halted")),
            journal.append_batch(Decisions("f", state="halted")),
        ]
        assert journal.depth == 7
        await asyncio.gather(*appends)
        assert (journal.batches, journal.written, journal.depth, journal.position) == (1, 7, 0, 4)
        assert journal.commit_rows.buckets()[1] == 7
    assert entries_in(journal.settings.path) == [b"a\nb\nc", b"a note", b"d", b"e\nf"]


async def test_a_batch_of_which_no_entry_can_be_made_harms_no_other(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        with capture_logs() as lines:
            appends = [journal.append_batch(Decisions(one)) for one in ("a", "broken", "c")]
            results = await asyncio.gather(*appends, return_exceptions=True)
        assert results[0] is results[2] is True
        assert isinstance(results[1], JournalError)
        assert [line["event"] for line in lines] == ["audit_entry_failed"]
        assert (journal.writable, journal.outages, journal.refused, journal.depth) == (True, 0, 1, 0)
        alone = await asyncio.gather(journal.append_batch(Decisions("broken")), return_exceptions=True)
        assert isinstance(alone[0], JournalError)
        await journal.append_batch(Decisions("d"))
    assert entries_in(journal.settings.path) == [b"a", b"c", b"d"]


async def test_a_batch_counts_as_many_rows_as_it_has_decisions(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path, queue_rows=3)) as journal:
        kept = journal.append_batch(Decisions("a", "b"))
        with pytest.raises(JournalFullError):
            journal.append_batch(Decisions("c", "d"))
        assert journal.refused == 2
        await kept
        await journal.append_batch(Decisions("c", "d"))


async def test_who_stops_waiting_harms_nobody_and_loses_no_row(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        first, second, third = (journal.append(row) for row in (b"first", b"second", b"third"))
        second.cancel()
        await asyncio.gather(first, third)
        assert second.cancelled()
        assert journal.depth == 0
    assert entries_in(journal.settings.path) == [b"first", b"second", b"third"]


async def test_closing_writes_what_waits(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        futures = [journal.append(str(i).encode()) for i in range(500)]
    assert all(future.done() and future.exception() is None for future in futures)
    assert len(entries_in(journal.settings.path)) == 500


async def test_with_durability_off_nobody_waits_and_the_rows_are_written_all_the_same(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path, durability=Durability.OFF)) as journal:
        assert journal.append(b"row").done()
        await journal.flush()
        assert entries_in(journal.settings.path) == [b"row"]


async def test_a_full_queue_refuses_at_once_and_takes_rows_again_when_it_has_room(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path, queue_rows=3)) as journal:
        waiting = [journal.append(b"row") for _ in range(3)]
        with pytest.raises(JournalFullError):
            journal.append(b"one too many")
        assert journal.refused == 1
        await asyncio.gather(*waiting)
        await journal.append(b"again")
    assert entries_in(journal.settings.path) == [b"row", b"row", b"row", b"again"]


async def test_a_journal_that_holds_all_it_may_refuses_decisions_until_shipped_rows_are_trimmed(tmp_path: Path) -> None:
    row = bytes(10_000)
    async with Journal(settings(tmp_path, max_mebibytes=1)) as journal:
        while not journal.full:
            await journal.append(row)
        assert journal.position < 2**20 / 10_000 + 1
        assert journal.outages == 1
        assert "1 MiB" in journal.problem
        with pytest.raises(JournalFullError, match="1 MiB"):
            journal.append(row)
        await journal.append(b"a note", even_if_full=True)
        kept = journal.position
        journal.trim(kept - 10)
        await until(lambda: not journal.full)
        assert journal.problem == ""
        await journal.append(row)
        assert journal.bytes < 2**19
    async with Journal(settings(tmp_path, max_mebibytes=1)) as journal:
        assert 0 < journal.bytes < 2**19
    assert len(entries_in(journal.settings.path)) == 11


class SmallDisk(Files):
    """Files on a volume that has as much left as a test says, beside what the journal itself takes."""

    def __init__(self, path: Path, total_mebibytes: float, others_bytes: int = 0) -> None:
        self.path = path
        self.total_bytes = int(total_mebibytes * 2**20)
        self.others_bytes = others_bytes

    def volume(self, directory: Path) -> Volume:
        assert directory == self.path.absolute().parent
        ours = self.path.stat().st_size if self.path.exists() else 0
        return Volume(self.total_bytes, max(0, self.total_bytes - self.others_bytes - ours))


SMALL: dict[str, object] = {"checkpoint_pages": 100, "queue_rows": 100}
"""With these a journal keeps a reserve of 3.3 MiB: 8 logs of 100 pages, and 100 large rows."""


async def test_a_journal_fills_its_volume_only_so_far_that_it_can_recover(tmp_path: Path) -> None:
    row = bytes(10_000)
    made = settings(tmp_path, **SMALL)
    disk = SmallDisk(made.path, 10)
    async with Journal(made, machine=Machine(files=disk)) as journal:
        while not journal.full:
            await journal.append(row)
        assert 6.6 * 2**20 < journal.bytes < 7.2 * 2**20
        assert "6 MiB" in journal.problem
        with pytest.raises(JournalFullError):
            journal.append(row)
        assert disk.volume(tmp_path).free_bytes > 2.5 * 2**20, "what is behind the limit"
        journal.trim(journal.position - 10)
        await until(lambda: not journal.full)
        await journal.append(row)


async def test_a_full_volume_that_cannot_be_written_either_is_one_outage(tmp_path: Path) -> None:
    made = settings(tmp_path, **SMALL)
    disk = SmallDisk(made.path, 50)
    async with Journal(made, machine=Machine(files=disk)) as journal:
        for outage in (1, 2):
            await journal.append(b"row")
            disk.others_bytes = 47 * 2**20
            while not journal.full:
                await journal.append(bytes(10_000))
            with closing(sqlite3.connect(made.path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(JournalUnwritableError):
                    await journal.append(b"a note", even_if_full=True)
                other.execute("ROLLBACK")
            await until(lambda: journal.writable)
            assert journal.full
            disk.others_bytes = 0
            await until(lambda: not journal.full)
            assert journal.outages == outage


async def test_a_journal_makes_way_for_others_and_takes_rows_again_when_they_are_gone(tmp_path: Path) -> None:
    made = settings(tmp_path, **SMALL)
    disk = SmallDisk(made.path, 50)
    async with Journal(made, machine=Machine(files=disk)) as journal:
        await journal.append(b"row")
        disk.others_bytes = 47 * 2**20
        while not journal.full:
            await journal.append(bytes(10_000))
        with pytest.raises(JournalFullError):
            journal.append(b"row")
        assert journal.writable
        assert journal.bytes < 2**20
        disk.others_bytes = 0
        await until(lambda: not journal.full)
        await journal.append(b"row")


@pytest.mark.parametrize(
    ("total_mebibytes", "max_mebibytes", "problem"),
    [
        (2048, 16_384, r"journal\.max_mebibytes: .* has 2048 MiB, 70 of them .*cannot hold 16384 .*at most 1977"),
        (2048, 1978, r"journal\.max_mebibytes"),
        (100, None, r"has 100 MiB, and the journal needs 140"),
    ],
)
async def test_a_journal_whose_volume_cannot_hold_what_it_should_does_not_start(
    tmp_path: Path, total_mebibytes: int, max_mebibytes: int | None, problem: str
) -> None:
    made = settings(tmp_path, max_mebibytes=max_mebibytes)
    with pytest.raises(JournalError, match=problem):
        await Journal(made, machine=Machine(files=SmallDisk(made.path, total_mebibytes))).__aenter__()


async def test_what_all_processes_together_may_fill_must_fit_on_their_volume(tmp_path: Path) -> None:
    made = settings(tmp_path, max_mebibytes=500)
    disk = SmallDisk(made.path, 2048)
    async with Journal(made, machine=Machine(files=disk), on_volume=3) as journal:
        assert journal.limit_bytes >> 20 == 500
    with pytest.raises(JournalError, match="cannot hold 500 MiB of rows of 4 journals each; set at most 441,"):
        await Journal(made, machine=Machine(files=disk), on_volume=4).__aenter__()


@pytest.mark.parametrize(
    ("total_mebibytes", "max_mebibytes", "limit_mebibytes"),
    [(2048, None, 1977), (2048, 1977, 1977), (2048, 100, 100), (100_000, None, 16_384), (0, None, 16_384)],
)
async def test_what_a_journal_may_fill_is_what_the_settings_say_and_the_volume_has(
    tmp_path: Path, total_mebibytes: int, max_mebibytes: int | None, limit_mebibytes: int
) -> None:
    made = settings(tmp_path, max_mebibytes=max_mebibytes)
    async with Journal(made, machine=Machine(files=SmallDisk(made.path, total_mebibytes))) as journal:
        assert journal.limit_bytes >> 20 == limit_mebibytes


async def test_a_closed_journal_refuses(tmp_path: Path) -> None:
    journal = Journal(settings(tmp_path))
    with pytest.raises(JournalClosedError):
        journal.append(b"too early")
    async with journal:
        pass
    with pytest.raises(JournalClosedError):
        journal.append(b"too late")
    with pytest.raises(JournalClosedError):
        await journal.flush()


async def test_two_writers_cannot_share_a_journal(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)):
        with pytest.raises(JournalInUseError):
            await Journal(settings(tmp_path)).__aenter__()
    async with Journal(settings(tmp_path)) as journal:
        await journal.append(b"the lock went with its holder")


async def test_a_journal_continues_its_chain_after_a_restart(tmp_path: Path) -> None:
    for i in range(3):
        async with Journal(settings(tmp_path)) as journal:
            assert journal.position == i
            await journal.append(str(i).encode())
    assert entries_in(journal.settings.path) == [b"0", b"1", b"2"]


async def test_a_journal_whose_tail_was_changed_refuses_to_start(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await journal.append_many([b"a", b"b", b"c"])
    with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as connection:
        connection.execute("UPDATE entries SET entry = 'B' WHERE position = 2")
    with pytest.raises(JournalCorruptedError) as caught:
        await Journal(settings(tmp_path)).__aenter__()
    assert caught.value.position == 2


async def test_a_database_of_somebody_else_refuses_to_start_and_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db")) as other:
        other.execute("CREATE TABLE orders (id INTEGER)")
        with pytest.raises(JournalError, match="not a journal"):
            await Journal(settings(tmp_path)).__aenter__()
        assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("orders",)]


async def test_a_file_that_is_no_database_refuses_to_start(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(JournalError, match="not a database"):
        await Journal(settings(tmp_path)).__aenter__()


async def test_a_missing_directory_refuses_to_start(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot open"):
        await Journal(settings(tmp_path / "missing")).__aenter__()


async def test_a_failed_write_fails_its_rows_then_refuses_at_once_then_recovers(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await journal.append(b"before")
        # Somebody else holds the write lock: to the journal an error like any other.
        with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = [journal.append(b"lost") for _ in range(3)]
            for failed in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(failed, JournalUnwritableError)
            assert not journal.writable
            assert "locked" in journal.last_error
            with pytest.raises(JournalUnwritableError, match="locked"):
                journal.append(b"refused at once")
            with pytest.raises(JournalUnwritableError):
                await journal.flush()
            other.execute("ROLLBACK")
        await until(lambda: journal.writable)
        await journal.append(b"after")
        assert (journal.last_error, journal.outages, journal.refused, journal.depth) == ("", 1, 4, 0)
    assert entries_in(journal.settings.path) == [b"before", b"after"]


async def test_a_journal_stays_unwritable_as_long_as_probes_fail_though_the_file_can_be_opened(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalUnwritableError):
                await journal.append(b"lost")
            with pytest.raises(TimeoutError):  # many times the longest pause between two probes
                async with asyncio.timeout(1):
                    await until(lambda: journal.writable)
            assert journal.outages == 1
            other.execute("ROLLBACK")
        await until(lambda: journal.writable)


async def test_a_journal_can_be_closed_during_an_outage(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as other:
        async with Journal(settings(tmp_path)) as journal:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalUnwritableError):
                await journal.append(b"lost")
        other.execute("ROLLBACK")
    assert entries_in(journal.settings.path) == []


async def test_a_failed_row_that_turns_up_after_all_is_marked_as_not_durable(tmp_path: Path) -> None:
    """As after a sync error whose pages reached the disk: the row is there, and its caller was told that it is not."""

    def decision(decision_id: str) -> bytes:
        entry = packet_pb2.JournalEntry()
        entry.decision.decision.decision_id = decision_id
        return entry.SerializeToString()

    acknowledged, unheard = decision("acknowledged"), decision("unheard")
    async with Journal(settings(tmp_path)) as journal:
        await journal.append(acknowledged)
        with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as disk:
            disk.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalUnwritableError):
                await journal.append(unheard)
            previous = disk.execute("SELECT hash FROM entries WHERE position = 1").fetchone()[0]
            disk.execute(
                "INSERT INTO entries (position, entry, hash, settled) VALUES (2, ?, ?, 1)",
                (unheard, link(previous, unheard)),
            )
            disk.execute("COMMIT")
        await until(lambda: journal.writable)
        await journal.append(b"next")
    mark = packet_pb2.JournalEntry()
    mark.reply_unconfirmed.decision_id = "unheard"
    mark.reply_unconfirmed.cause = "not_durable"
    mark.reply_unconfirmed.heard_action = pb.ACTION_ABSTAIN
    mark.reply_unconfirmed.heard_reasons.append(pb.REASON_CODE_AUDIT_UNAVAILABLE)
    assert entries_in(journal.settings.path) == [acknowledged, unheard, mark.SerializeToString(), b"next"]


async def test_acknowledged_rows_that_vanish_keep_the_journal_unwritable(tmp_path: Path) -> None:
    # The first probe is to come after they have vanished.
    async with Journal(settings(tmp_path, retry_min_seconds=0.5, retry_max_seconds=0.5)) as journal:
        await journal.append_many([b"a", b"b"])
        with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as disk:
            disk.execute("BEGIN IMMEDIATE")
            with pytest.raises(JournalUnwritableError):
                await journal.append(b"c")
            disk.execute("DELETE FROM entries WHERE position = 2")
            disk.execute("COMMIT")
        await until(lambda: "position 2" in journal.last_error)
        assert not journal.writable


async def test_trimming_removes_rows_from_the_front_and_keeps_the_chain(tmp_path: Path) -> None:
    rows = [str(i).encode() for i in range(1, 1001)]
    async with Journal(settings(tmp_path)) as journal:
        await journal.append_many(rows)
        journal.trim(700)
        with closing(JournalReader(journal.settings.path)) as reader:
            await until(lambda: reader.anchor().position == 700)
        await journal.append(b"more")
    assert entries_in(journal.settings.path) == [*rows[700:], b"more"]


async def test_what_is_to_be_trimmed_during_an_outage_is_trimmed_after_it(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await journal.append_many([b"row"] * 100)
        with (
            closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as other,
            closing(JournalReader(journal.settings.path)) as reader,
        ):
            other.execute("BEGIN IMMEDIATE")
            journal.trim(30)  # fails, and that is an outage, since what it wrote may not be on the disk
            await until(lambda: not journal.writable)
            journal.trim(70)
            assert reader.anchor().position == 0
            other.execute("ROLLBACK")
            await until(lambda: reader.anchor().position == 70)
        assert (journal.writable, journal.outages) == (True, 1)
    assert len(entries_in(journal.settings.path)) == 30


async def test_a_row_that_somebody_removed_stops_trimming_and_not_the_writing(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await asyncio.gather(*(journal.append(b"row") for _ in range(300)))
        with closing(sqlite3.connect(journal.settings.path, isolation_level=None)) as connection:
            connection.execute("DELETE FROM entries WHERE position = 256")
        with capture_logs() as lines:
            journal.trim(through=300)
            await journal.append(b"more")
            await until(lambda: bool(lines))
        assert [(line["event"], line["error"]) for line in lines] == [
            ("audit_journal_neglected", "position 256: missing")
        ]
        assert await journal.append(b"and more")
        with closing(JournalReader(journal.settings.path)) as reader:
            assert reader.anchor().position == 0
            with pytest.raises(JournalCorruptedError) as caught:
                reader.verify()
    assert caught.value.position == 256


async def test_a_journal_that_was_trimmed_empty_goes_on_counting(tmp_path: Path) -> None:
    async with Journal(settings(tmp_path)) as journal:
        await journal.append_many([b"a", b"b"])
        journal.trim(10_000)
    async with Journal(settings(tmp_path)) as journal:
        assert journal.position == 2
        await journal.append(b"c")
    with closing(JournalReader(journal.settings.path)) as reader:
        anchor, head = reader.verify()
        assert (anchor.position, head.position) == (2, 3)


@pytest.mark.long
async def test_rows_move_from_the_log_into_the_file_and_the_log_is_used_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    log = path.with_name("journal.db-wal")
    async with Journal(settings(tmp_path, checkpoint_pages=100, durability=Durability.OS)) as journal:
        async with asyncio.timeout(60):
            while not log.exists() or path.stat().st_size < 4 * log.stat().st_size:
                await journal.append_many([bytes(1000)] * 50)
    assert len(entries_in(path)) == journal.position
