"""The shipping loop, on a real journal and a real SQLite store, with the pauses under the test's control."""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.shipping import Progress, ShippingSettings, Task
from server.audit.shipping.shipping_process import Shipping
from server.audit.store.schema import DECISIONS, JOURNAL_ENTRIES
from server.audit.store.store import Store
from server.journal.journal_file import PASSED_ON_BYTES, JournalFile


class _Stopped(BaseException):
    """Leaves the loop that ships for ever."""


def entry(decision_id: str) -> bytes:
    packet = packet_pb2.JournalEntry()
    packet.decision.decision.decision_id = decision_id
    return packet.SerializeToString()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalFile]:
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        yield journal


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        journal=tmp_path / "journal.db",
        slot="here:/journal.db",
        database_url=f"sqlite:///{tmp_path / 'audit.db'}",
        settings=ShippingSettings(batch_rows=10, retry_min_seconds=1.0, retry_max_seconds=4.0, poll_seconds=0.5),
    )


def ship(task: Task, at_pause: Callable[[int, float], None] | None = None) -> tuple[list[Progress], list[float]]:
    """Ships until the first pause, or for as long as `at_pause(number of the pause, seconds)` does not stop it."""
    reports: list[Progress] = []
    pauses: list[float] = []

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        if at_pause is None:
            raise _Stopped
        at_pause(len(pauses), seconds)

    with pytest.raises(_Stopped):
        Shipping(task, reports.append, wait).run()
    return reports, pauses


def shipped_ids(task: Task, ids: list[str]) -> list[str]:
    with closing(Store(task.database_url)) as store:
        return [one for one in ids if store.find(one)]


def test_everything_is_shipped_in_batches_and_then_it_waits(journal: JournalFile, task: Task) -> None:
    ids = [str(i) for i in range(25)]
    journal.append([entry(one) for one in ids])
    reports, pauses = ship(task)
    assert [(report.position, report.error) for report in reports] == [(0, ""), (10, ""), (20, ""), (25, "")]
    assert pauses == [0.5]
    assert shipped_ids(task, ids) == ids


def test_large_entries_fill_a_shipment_too(journal: JournalFile, task: Task) -> None:
    large = [packet_pb2.JournalEntry.FromString(entry(str(i))) for i in range(5)]
    for one in large:
        one.decision.model_input = bytes(PASSED_ON_BYTES // 2)
    journal.append([one.SerializeToString() for one in large])
    reports, pauses = ship(task)
    assert [report.position for report in reports] == [0, 2, 4, 5]
    assert pauses == [0.5], "it waits for more only after the last one"


def test_rows_that_trickle_in_are_shipped_together_after_a_pause(journal: JournalFile, task: Task) -> None:
    """What arrives while a few rows are shipped is not shipped at once: a transaction for each would cost too much."""
    positions: list[int] = []

    def report(progress: Progress) -> None:
        positions.append(progress.position)
        assert len(positions) < 10
        journal.append([entry(f"during {progress.position}")])  # another one is written meanwhile

    def wait(seconds: float) -> None:
        positions.append(-1)
        assert seconds == task.settings.poll_seconds
        if positions.count(-1) == 3:
            raise _Stopped
        journal.append([entry(f"{len(positions)} {i}") for i in range(3)])

    with pytest.raises(_Stopped):
        Shipping(task, report, wait).run()
    assert positions == [0, 1, -1, 5, -1, 9, -1]


def test_a_new_process_goes_on_where_the_last_one_was_killed(journal: JournalFile, task: Task) -> None:
    journal.append([entry("1"), entry("2")])
    ship(task)
    journal.append([entry("3")])
    reports, _ = ship(task)
    assert [report.position for report in reports] == [2, 3]
    assert shipped_ids(task, ["1", "2", "3"]) == ["1", "2", "3"]


def test_two_processes_on_one_journal_ship_every_row_once(journal: JournalFile, task: Task) -> None:
    ids = [str(i) for i in range(4)]
    journal.append([entry(ids[0])])

    def overtake(number: int, _seconds: float) -> None:
        if number == 2:
            raise _Stopped
        journal.append([entry(one) for one in ids[1:3]])
        ship(task)
        journal.append([entry(ids[3])])

    reports, _ = ship(task, overtake)
    assert [report.position for report in reports] == [0, 1, 3, 4]
    assert {report.error for report in reports} == {""}
    with closing(Store(task.database_url)) as store:
        assert store.verify(journal.journal_id) == (1, 4)
    assert shipped_ids(task, ids) == ids


def test_a_changed_row_is_reported_for_ever_and_nothing_behind_it_is_shipped(journal: JournalFile, task: Task) -> None:
    journal.append([entry(str(i)) for i in range(1, 21)])
    with closing(sqlite3.connect(task.journal, isolation_level=None)) as connection:
        connection.execute("UPDATE entries SET entry = X'00' WHERE position = 15")

    def give_up(number: int, _seconds: float) -> None:
        if number == 5:
            raise _Stopped

    reports, pauses = ship(task, give_up)
    assert [(report.position, report.error) for report in reports] == [
        (0, ""),
        (10, ""),
        (10, "JournalCorruptedError: position 15: changed after it was written: its hash does not fit the chain"),
    ]
    # Doubling up to the longest, each with up to half of it taken off.
    for pause, longest in zip(pauses, [1.0, 2.0, 4.0, 4.0, 4.0], strict=True):
        assert longest / 2 <= pause <= longest


def test_a_journal_that_cannot_be_read_is_reported_and_read_again(journal: JournalFile, task: Task) -> None:
    journal.append([entry(str(i)) + bytes(1000) for i in range(1, 501)])
    journal.close()
    sound = task.journal.read_bytes()
    middle = len(sound) // 2 // 4096 * 4096
    task.journal.write_bytes(sound[:middle] + b"\xff" * 4096 + sound[middle + 4096 :])

    def repair(number: int, _seconds: float) -> None:
        if number == 2:
            raise _Stopped
        task.journal.write_bytes(sound)

    reports, _ = ship(task, repair)
    assert "DatabaseError: database disk image is malformed" in {report.error for report in reports}
    assert (reports[-1].position, reports[-1].error) == (500, "")


def test_an_outage_is_over_when_something_was_shipped(journal: JournalFile, task: Task, tmp_path: Path) -> None:
    journal.append([entry("1")])
    obstacle = tmp_path / "audit.db"
    obstacle.mkdir()

    def clear_away(number: int, _seconds: float) -> None:
        if number == 3:
            obstacle.rmdir()
        if number == 4:
            raise _Stopped

    reports, _ = ship(task, clear_away)
    assert [(report.position, bool(report.error)) for report in reports] == [(0, True), (1, False)]


def test_rows_that_are_in_neither_place_are_reported_not_skipped(journal: JournalFile, task: Task) -> None:
    journal.append([entry(str(i)) for i in range(1, 6)])
    ship(task)
    journal.append([entry(str(i)) for i in range(6, 11)])
    journal.trim(8, 100)
    reports, _ = ship(task)
    assert [report.error for report in reports] == [
        "JournalCorruptedError: position 6: not in the database and no longer in the journal, up to 8"
    ]


def test_a_journal_older_than_the_database_is_reported(journal: JournalFile, task: Task, tmp_path: Path) -> None:
    journal.append([entry("1")])
    journal.close()
    copy = task.journal.read_bytes()
    with closing(JournalFile(task.journal, sync_commits=False)) as ahead:
        ahead.append([entry("2"), entry("3")])
        ship(task)
    task.journal.write_bytes(copy)
    reports, _ = ship(task)
    assert [report.error for report in reports] == [
        "JournalCorruptedError: position 2: in the database, up to 3, but not in the journal"
    ]


def test_a_database_that_cannot_be_opened_is_reported_without_its_statement(
    journal: JournalFile, task: Task, tmp_path: Path
) -> None:
    journal.append([entry("1")])
    (tmp_path / "audit.db").mkdir()
    reports, pauses = ship(task)
    assert [report.error for report in reports] == ["OperationalError: unable to open database file"]
    assert len(pauses) == 1


def test_a_missing_journal_is_reported(task: Task) -> None:
    reports, _ = ship(task)
    assert reports[0].error.startswith("JournalError: cannot read the journal")


def test_days_past_their_retention_are_removed_while_shipping_goes_on(journal: JournalFile, task: Task) -> None:
    journal.append([entry("old")])
    ship(task)
    then = dt.datetime.now(dt.UTC) - dt.timedelta(days=3)
    engine = sa.create_engine(task.database_url)
    with engine.begin() as connection:
        connection.execute(sa.update(DECISIONS).values(decided_at=then))
        connection.execute(sa.update(JOURNAL_ENTRIES).values(shipped_at=then))
    engine.dispose()
    journal.append([entry("new")])
    ship(task.model_copy(update={"settings": task.settings.model_copy(update={"retention_days": 1})}))
    assert shipped_ids(task, ["old", "new"]) == ["new"]
    with closing(Store(task.database_url)) as store:
        assert store.verify(journal.journal_id) == (2, 2)


def test_a_journal_with_nothing_to_ship_is_stated_every_five_minutes(journal: JournalFile, task: Task) -> None:
    """Else it could not be told from one whose server and volume are gone."""
    journal.append([entry("1")])
    stated: list[tuple[int, int]] = []
    seconds = 0.0

    def wait(_: float) -> None:
        nonlocal seconds
        seconds += 100.0
        with closing(Store(task.database_url)) as store:
            (shipped,) = store.shipments()
        assert shipped.stated is not None
        stated.append((shipped.stated.position, shipped.stated.stated_at_ns))
        if len(stated) == 8:
            raise _Stopped

    with pytest.raises(_Stopped):
        Shipping(task, lambda _: None, wait, clock=lambda: seconds, wall_clock_ns=lambda: round(seconds * 10**9)).run()
    minutes = [at // 10**9 for _, at in stated]
    assert minutes == [0, 0, 0, 300, 300, 300, 600, 600]
    assert {position for position, _ in stated} == {1}


def test_a_database_of_a_newer_version_is_reported_and_left_alone(journal: JournalFile, task: Task) -> None:
    journal.append([entry("1")])
    ship(task)
    engine = sa.create_engine(task.database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    journal.append([entry("2")])
    reports, _ = ship(task)
    assert [report.error.partition(",")[0] for report in reports] == [
        "SchemaUnknownError: the audit database has revision 9999"
    ]
