"""Every way to lose a row is found, and the first missing row is named: what a chain by itself does not show."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from pretrade.audit.v1 import packet_pb2
from server.audit.commands import app
from server.audit.reading.verify import Open, Unremembered, Verified, verify
from server.audit.shipping.heads import SigningKey, VerifyingKey, slot_of
from server.audit.shipping.shipper import Shipper
from server.audit.shipping.shipping import Progress, ShippingSettings, Task
from server.audit.shipping.shipping_process import Shipping
from server.audit.store.store import Store
from server.errors import JournalCorruptedError, KeyUnusableError
from server.journal.journal_file import Head, JournalFile, JournalReader, link
from server.machine import REAL


class ShippedError(Exception):
    """There was nothing left to ship."""


@dataclass
class Place:
    """A server's journal and its database, without a server."""

    directory: Path
    key: Path | None = None

    @property
    def journal(self) -> Path:
        return self.directory / "journal.db"

    @property
    def url(self) -> str:
        return f"sqlite:///{self.directory / 'audit.db'}"

    def write(self, rows: int, what: str = "d") -> None:
        with closing(JournalFile(self.journal, sync_commits=False)) as journal:
            for _ in range(rows):
                entry = packet_pb2.JournalEntry()
                entry.decision.decision.decision_id = f"{what}-{journal.journal_id[:4]}-{journal.head.position + 1:04}"
                journal.append([entry.SerializeToString()])

    def ship(self, *, close: bool = False, batch_rows: int = 2000, shipments: int = 10**9) -> Progress:
        """Ships what there is, or so many batches; the last progress."""
        closing = threading.Event()
        if close:
            closing.set()
        said: list[Progress] = []

        def wait(_: float) -> None:
            if said and said[-1].error:
                raise ShippedError
            if not close or said[-1].closed:
                raise ShippedError

        def report(progress: Progress) -> None:
            said.append(progress)
            if progress.position >= shipments * batch_rows:
                raise ShippedError

        options = ShippingSettings(batch_rows=batch_rows, signing_key=self.key)
        task = Task(
            journal=self.journal, slot=slot_of(self.journal, REAL.host_name()), database_url=self.url, settings=options
        )
        with pytest.raises(ShippedError):
            Shipping(task, report, wait, closing=closing).run()
        return said[-1]

    def trim(self, through: int) -> None:
        with closing(JournalFile(self.journal, sync_commits=False)) as journal:
            while journal.trim(through, 100):
                pass

    def journal_sql(self, statement: str) -> None:
        with closing(sqlite3.connect(self.journal, isolation_level=None)) as connection:
            connection.execute(statement)

    def database_sql(self, statement: str) -> None:
        with closing(sqlite3.connect(self.directory / "audit.db", isolation_level=None)) as connection:
            connection.execute(statement)

    def verified(self, *, full: bool = False) -> list[Verified | Open]:
        found = list(verify(self.url, self.journal, full=full))
        assert all(isinstance(one, Verified | Open) for one in found)
        return found  # type: ignore[return-value]  # as asserted

    def run(self, *arguments: str) -> Result:
        targets = ("--journal", str(self.journal), "--database-url", self.url)
        return CliRunner().invoke(app, ["verify", *arguments, *targets], env={"COLUMNS": "200"})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def missing(place: Place, position: int, problem: str = "missing") -> None:
    """`pretrade audit verify` exits with 1 and names this row as the first that is missing."""
    result = place.run()
    assert result.exit_code == 1, result.output
    assert f"position {position}: " in result.stderr
    assert problem in result.stderr


def test_what_was_shipped_and_trimmed_in_order_is_whole(place: Place) -> None:
    place.write(100)
    place.ship()
    place.trim(60)
    place.write(20)
    database, journal = place.verified()
    assert isinstance(database, Verified)
    assert isinstance(journal, Verified)
    assert (database.first, database.last, journal.first, journal.last) == (1, 100, 61, 120)
    assert journal.compared == ("row 100 shipped", "row 100 stated with the database")
    assert place.run().exit_code == 0


def test_rows_that_are_in_neither_place_are_named(place: Place) -> None:
    """Both pieces are sound chains by themselves."""
    place.write(50)
    place.ship()
    place.write(70)
    place.trim(100)  # as an attacker would, though 51 to 100 were never shipped
    missing(place, 51, "in neither the database nor the journal")


@pytest.mark.fault(
    "D6",
    "Rows are removed from the journal and from the database",
    "`pretrade audit verify` exits with 1 and names the first missing row.",
)
def test_rows_cut_out_of_journal_and_database_are_named(place: Place) -> None:
    place.write(120)
    place.ship()
    place.trim(100)
    place.database_sql("DELETE FROM journal_entries WHERE position > 50 AND position <= 100")
    missing(place, 51)


@pytest.mark.fault(
    "D6", "The end of a journal is cut off", "`pretrade audit verify` exits with 1 and names the first missing row."
)
def test_an_end_that_was_never_shipped_and_is_cut_off_is_named(place: Place) -> None:
    place.write(120)
    place.ship(batch_rows=50, shipments=2)  # 100 of them; the server has said that there are 120
    place.journal_sql("DELETE FROM entries WHERE position > 105")
    missing(place, 106, "stated with the database, up to 120, but gone")
    progress = place.ship()
    assert "position 106: stated with the database, up to 120, but not in the journal" in progress.error, (
        "the server says so, too"
    )


@pytest.mark.fault(
    "D6", "A journal is deleted", "`pretrade audit verify` exits with 1 as soon as another journal takes its place."
)
def test_a_journal_that_was_deleted_is_missed_as_soon_as_another_takes_its_place(place: Place) -> None:
    place.write(100)
    place.ship()
    place.write(7)
    place.journal.unlink()
    missing(place, 101, "was never closed, and is gone")
    place.write(10)
    progress = place.ship()
    assert "is gone, with what followed its row 100" in progress.neglected, "the server says so, too"
    missing(place, 101, "was never closed, and is gone")


def test_a_journal_whose_stated_end_was_never_shipped_is_missed_when_it_is_deleted(place: Place) -> None:
    place.write(120)
    place.ship(batch_rows=50, shipments=2)
    place.journal.unlink()
    missing(place, 101, "every row up to 120")


def test_a_journal_that_was_closed_may_go(place: Place) -> None:
    place.write(100)
    assert place.ship(close=True).closed
    place.journal.unlink()
    assert place.run().exit_code == 0
    place.write(10)
    assert place.ship().neglected == ""
    assert place.run().exit_code == 0


def test_a_journal_that_was_opened_again_is_not_closed_any_more(place: Place) -> None:
    place.write(100)
    place.ship(close=True)
    place.ship()
    place.journal.unlink()
    missing(place, 101, "was never closed")


def test_the_journals_of_a_place_follow_one_another(place: Place) -> None:
    ids = []
    for _ in range(3):
        place.write(5)
        place.ship(close=True)
        with closing(JournalReader(place.journal)) as journal:
            ids.append(journal.journal_id)
        place.journal.unlink()
    with closing(Store(place.url)) as store:
        found = [(one.journal_id, one.predecessor_id, one.slot) for one in store.shipments()]
    assert found == [
        (one, before, slot_of(place.journal, REAL.host_name())) for one, before in zip(ids, ["", *ids], strict=False)
    ]


def test_a_restored_backup_of_the_journal_is_found(place: Place) -> None:
    place.write(50)
    place.ship()
    backup = place.directory / "backup.db"
    shutil.copy(place.journal, backup)
    place.write(50)
    place.ship()
    shutil.copy(backup, place.journal)
    missing(place, 51, "shipped, up to 100, but gone")
    assert "position 51" in place.ship().error
    place.write(80, "other")  # it grows beyond what was shipped, into another history
    missing(place, 100, "not what was shipped")
    assert "position 101" in place.ship().error


def test_a_restored_backup_of_the_database_is_found(place: Place) -> None:
    place.write(50)
    place.ship()
    backup = place.directory / "backup"
    shutil.copy(place.directory / "audit.db", backup)
    place.write(50)
    place.ship()
    place.trim(80)
    shutil.copy(backup, place.directory / "audit.db")
    missing(place, 51, "in neither the database nor the journal")


def test_rows_changed_with_all_their_hashes_do_not_fit_what_was_stated(place: Place) -> None:
    place.write(50)
    place.ship(close=True)
    place.journal.unlink()
    rewrite(place, 20)
    with closing(Store(place.url)) as store:
        (shipped,) = store.shipments()
        assert shipped.stated is not None
        assert shipped.stated.hash != shipped.head.hash
    missing(place, 50, "not what was stated")


def rewrite(place: Place, position: int) -> None:
    """Changes a row in the database and every hash from there on, as one may who can write it."""
    with closing(sqlite3.connect(place.directory / "audit.db", isolation_level=None)) as connection:
        rows = connection.execute("SELECT position, entry, hash FROM journal_entries ORDER BY position").fetchall()
        previous = rows[position - 2][2]
        for number, entry, _ in rows[position - 1 :]:
            changed = b"" if number == position else entry
            previous = link(previous, changed)
            connection.execute(
                "UPDATE journal_entries SET entry = ?, hash = ? WHERE position = ?", (changed, previous, number)
            )
        connection.execute("UPDATE shipments SET hash = ?", (previous,))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return new_keys(tmp_path, "ours")


@pytest.fixture
def signed_place(tmp_path: Path, keys: tuple[Path, Path]) -> Place:
    """50 rows, all shipped and stated to be the last, signed with our key."""
    place = Place(tmp_path, keys[0])
    place.write(50)
    place.ship(close=True)
    return place


def new_keys(directory: Path, name: str) -> tuple[Path, Path]:
    key = Ed25519PrivateKey.generate()
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_who_can_write_the_database_but_has_no_key_cannot_make_another_history(
    signed_place: Place, keys: tuple[Path, Path]
) -> None:
    place, public = signed_place, keys[1]
    signed = place.run("--key", str(public))
    assert signed.exit_code == 0
    assert f"row 50 stated with the database, signed by {VerifyingKey(public).key_id}, closed" in signed.stdout
    place.journal.unlink()
    rewrite(place, 20)
    with closing(Store(place.url)) as store:
        (shipped,) = store.shipments()
        assert shipped.stated is not None
        shipped.stated.hash = shipped.head.hash
        store.state(shipped.journal_id, shipped.stated.SerializeToString())
    assert place.run("--full").exit_code == 0, "without the key nobody can tell"
    refused = place.run("--key", str(public))
    assert refused.exit_code == 1
    assert "position 50: its stated head is signed by key" in refused.stderr


def test_a_whole_journal_that_was_taken_out_of_the_database_is_missed_by_the_one_that_followed(
    signed_place: Place, keys: tuple[Path, Path]
) -> None:
    place, public = signed_place, keys[1]
    with closing(JournalReader(place.journal)) as journal:
        removed = journal.journal_id
    place.journal.unlink()
    place.write(20)
    place.ship()
    assert place.run("--key", str(public)).exit_code == 0
    for table in ("shipments", "journal_entries", "decisions", "verifications"):
        place.database_sql(f"DELETE FROM {table} WHERE journal_id = '{removed}'")
    missing(place, 1, "followed it, and nobody has it")
    place.database_sql("UPDATE shipments SET predecessor_id = NULL")
    refused = place.run("--key", str(public))
    assert refused.exit_code == 1, "what the server stated names it, too"
    assert removed in refused.stderr


def test_what_nobody_signed_is_refused_where_a_signature_is_asked_for(place: Place, keys: tuple[Path, Path]) -> None:
    place.write(5)
    place.ship()
    refused = place.run("--key", str(keys[1]))
    assert refused.exit_code == 1
    assert "its stated head is not signed" in refused.stderr


def test_a_file_that_holds_no_key_is_refused_at_the_start(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("not a key")
    for path in (wrong, tmp_path / "missing.pem"):
        with pytest.raises(KeyUnusableError, match=path.name):
            SigningKey(path)
        with pytest.raises(KeyUnusableError, match=path.name):
            VerifyingKey(path)
    with pytest.raises(KeyUnusableError):
        VerifyingKey(keys[0])
    with pytest.raises(KeyUnusableError):
        Shipper(None, "sqlite:///a.db", ShippingSettings(signing_key=wrong))  # type: ignore[arg-type]  # not reached


def head(place: Place, row: int, **changes: object) -> packet_pb2.JournalHead:
    with closing(JournalReader(place.journal)) as journal:
        (found,) = journal.rows_after(row - 1, 1)
        stated = packet_pb2.JournalHead(journal_id=journal.journal_id, position=row, hash=found.hash)
    stated.MergeFrom(packet_pb2.JournalHead(**changes))  # type: ignore[arg-type]  # fields of it
    return stated


def test_what_was_published_is_compared_too(place: Place) -> None:
    place.write(50)
    place.ship()
    place.write(20)
    sound = [head(place, 30), head(place, 70)]
    database, journal = verify(place.url, place.journal, topic_heads=sound)
    assert isinstance(database, Verified)
    assert database.compared == ("row 50 stated with the database",), "it has no row 70 to compare"
    assert isinstance(journal, Verified)
    assert "row 70 published on the topic" in journal.compared
    for other, position, problem in (
        (head(place, 30, hash=bytes(32)), 30, "not what was published"),
        (head(place, 60, hash=bytes(32)), 60, "not what was published"),
        (head(place, 70, position=90), 71, "published on the topic, up to 90, but gone"),
        (head(place, 10, journal_id="0" * 32), 1, "published on the topic, and nowhere else"),
    ):
        with pytest.raises(JournalCorruptedError, match=problem) as caught:
            list(verify(place.url, place.journal, topic_heads=[other]))
        assert caught.value.position == position


def test_a_database_that_may_only_be_read_is_verified_and_the_checkpoint_missed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write(10)
    place.ship()

    def refuse(*_: object) -> None:
        raise sa.exc.OperationalError("INSERT", None, sqlite3.OperationalError("attempt to write a readonly database"))

    monkeypatch.setattr(Store, "remember_verified", refuse)
    *found, last = verify(place.url, place.journal)
    assert [type(one) for one in found] == [Verified, Verified]
    assert isinstance(last, Unremembered)
    assert "readonly" in last.why
    result = place.run()
    assert result.exit_code == 0
    assert "not remembered for the next time" in result.stdout


def test_of_two_verifications_at_once_the_further_one_is_remembered(place: Place) -> None:
    place.write(100)
    place.ship()
    with closing(Store(place.url)) as store:
        (shipped,) = store.shipments()
        store.remember_verified(shipped.journal_id, shipped.head)
        store.remember_verified(shipped.journal_id, Head(1, bytes(32)))
        checkpoint = store.checkpoint(shipped)
    assert checkpoint is not None
    assert checkpoint.head == shipped.head


def test_a_checkpoint_spares_the_walk_but_not_the_count(place: Place) -> None:
    place.write(100)
    place.ship()
    (first, _) = place.verified()
    assert isinstance(first, Verified)
    assert (first.first, first.last, first.checkpoint) == (1, 100, 0)
    place.write(20)
    place.ship()
    (second, _) = place.verified()
    assert isinstance(second, Verified)
    assert (second.first, second.last, second.checkpoint) == (101, 120, 100)
    (full, _) = place.verified(full=True)
    assert isinstance(full, Verified)
    assert (full.first, full.last, full.checkpoint) == (1, 120, 0)


@pytest.mark.parametrize(
    ("tamper", "position", "problem"),
    [
        ("DELETE FROM journal_entries WHERE position BETWEEN 30 AND 40", 30, "missing; it was verified before"),
        ("DELETE FROM journal_entries WHERE position = 1", 1, "missing; it was verified before"),
        ("DELETE FROM journal_entries WHERE position = 100", 100, "missing; it was verified before"),
        ("UPDATE journal_entries SET hash = X'00' WHERE position = 100", 100, "not what was verified before"),
        ("UPDATE journal_entries SET entry = X'00' WHERE position = 100", 100, "not what was verified before"),
        ("UPDATE verifications SET hash = X'00'", 100, "not what was verified before"),
    ],
)
def test_what_was_verified_before_must_still_be_there(place: Place, tamper: str, position: int, problem: str) -> None:
    place.write(100)
    place.ship()
    place.verified()
    place.write(20)
    place.ship()
    place.database_sql(tamper)
    missing(place, position, problem)


def test_a_row_changed_before_the_checkpoint_is_found_by_a_full_walk_alone(place: Place) -> None:
    place.write(100)
    place.ship()
    place.verified()
    place.database_sql("UPDATE journal_entries SET entry = X'00' WHERE position = 50")
    assert place.run().exit_code == 0
    result = place.run("--full")
    assert result.exit_code == 1
    assert "position 50: changed" in result.stderr


def test_nothing_is_remembered_of_what_was_not_whole(place: Place) -> None:
    place.write(100)
    place.ship()
    place.journal.unlink()
    missing(place, 101)
    with closing(Store(place.url)) as store:
        (shipped,) = store.shipments()
        assert store.checkpoint(shipped) is None


def test_a_lost_end_that_was_given_up_is_told_and_fails_no_more(place: Place) -> None:
    place.write(100)
    place.ship()
    with closing(JournalReader(place.journal)) as journal:
        journal_id = journal.journal_id
    place.journal.unlink()
    missing(place, 101)
    arguments = ["write-off", journal_id, "--author", "ann", "--reason", "the volume was lost"]
    given_up = CliRunner().invoke(app, [*arguments, "--database-url", place.url])
    assert given_up.exit_code == 0, given_up.output
    result = place.run()
    assert result.exit_code == 0
    assert f"journal {journal_id}: what followed row 100 was given up" in result.stdout
    assert "ann: the volume was lost" in result.stdout
    nobody = CliRunner().invoke(app, ["write-off", "nobody", *arguments[2:], "--database-url", place.url])
    assert nobody.exit_code == 1
    assert "no journal nobody" in nobody.stderr


def test_rows_that_a_lost_database_had_alone_are_missed_when_a_new_one_takes_its_place(place: Place) -> None:
    place.write(100)
    place.ship()
    place.trim(60)
    (place.directory / "audit.db").unlink()
    place.write(5)
    progress = place.ship()
    assert (progress.position, progress.error) == (105, ""), "what there is goes on being shipped"
    assert "rows of this journal up to 60" in progress.neglected
    missing(place, 1, "missing, like every row up to 60")
    with closing(JournalReader(place.journal)) as journal:
        journal_id = journal.journal_id
    arguments = [journal_id, "--author", "ann", "--reason", "moved", "--database-url", place.url]
    assert CliRunner().invoke(app, ["write-off", "--beginning", *arguments]).exit_code == 0
    result = place.run()
    assert result.exit_code == 0, result.output
    assert f"journal {journal_id}: the rows up to 60 were given up" in result.stdout
    assert place.ship().neglected == ""
    place.journal.unlink()
    missing(place, 106, "never closed")


def test_a_journal_on_another_host_is_no_loss(place: Place) -> None:
    place.write(100)
    place.ship(batch_rows=50, shipments=1)
    place.database_sql("UPDATE shipments SET slot = 'elsewhere:/var/lib/pretrade/journal.db'")
    with closing(Store(place.url)) as store:
        (shipped,) = store.shipments()
        assert shipped.stated is not None
        shipped.stated.stated_at_ns = 1_795_000_000_000_000_000
        store.state(shipped.journal_id, shipped.stated.SerializeToString())
    (database, still) = verify(place.url, None)
    assert isinstance(database, Verified)
    assert isinstance(still, Open)
    assert still.what == (
        "is open at elsewhere:/var/lib/pretrade/journal.db, where alone its end can be checked: "
        "50 rows not shipped yet, last heard of at 2026-11-18 11:06:40 UTC"
    )


def test_a_journal_that_is_not_there_and_never_was_is_a_clear_error(place: Place) -> None:
    with closing(Store(place.url)) as store:
        store.migrate()
    result = place.run()
    assert result.exit_code == 1
    assert f"there is no journal {place.journal}" in result.stderr


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """100 rows, 80 of them shipped, 40 of these trimmed."""
    place = Place(tmp_path_factory.mktemp("sound"))
    place.write(100)
    place.ship(batch_rows=40, shipments=2)
    place.trim(40)
    return place


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(1, 100), rows=st.integers(1, 100), where=st.sampled_from(("both", "journal", "database")))
def test_whatever_is_cut_out_the_first_row_that_nobody_has_is_named(
    sound: Place, tmp_path_factory: pytest.TempPathFactory, first: int, rows: int, where: str
) -> None:
    place = Place(tmp_path_factory.mktemp("cut"))
    for file in sound.directory.iterdir():
        shutil.copy(file, place.directory)
    place.database_sql(f"UPDATE shipments SET slot = '{slot_of(place.journal, REAL.host_name())}'")
    last = first + rows - 1
    cut = f"position BETWEEN {first} AND {last}"
    if where != "database":
        place.journal_sql(f"DELETE FROM entries WHERE {cut}")
    if where != "journal":
        place.database_sql(f"DELETE FROM journal_entries WHERE {cut}")
    in_database = range(max(first, 1), min(last, 80) + 1) if where != "journal" else range(0)
    in_journal = range(max(first, 41), min(last, 100) + 1) if where != "database" else range(0)
    if not in_database and not in_journal:
        list(verify(place.url, place.journal))
        return
    with pytest.raises(JournalCorruptedError) as caught:
        list(verify(place.url, place.journal))
    assert caught.value.position == (in_database or in_journal)[0]
