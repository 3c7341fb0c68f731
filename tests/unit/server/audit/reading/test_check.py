"""What the audit says of itself: calibration by independent labels, old labels, stranded and deserted journals."""

from __future__ import annotations

import datetime as dt
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pretrade.audit.v1 import packet_pb2
from pretrade.client.file_lock import take_lock
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.calibration import FEWEST, Calibration, ScoredLabel, calibration
from server.audit.reading.check import AuditCheck
from server.audit.reading.labels import Label
from server.audit.reading.query import AuditQuery
from server.audit.shipping.heads import Stating
from server.audit.store.store import Store
from server.decision.ids import id_bound
from server.errors import AuditUnavailableError
from server.journal.journal_file import Head, JournalFile, JournalReader
from server.timing.pace import Pace

BEGIN = dt.datetime(2026, 11, 23, 7, 0, tzinfo=dt.UTC)
HORIZON = 5.0


def labels(groups: int, seed: int, *, tilt: float = 0.0, rows: int = 4) -> list[ScoredLabel]:
    """Groups of decisions that share a score and an outcome; with a tilt, high scores promise too much."""
    random = np.random.default_rng(seed)
    scores = random.uniform(0.05, 0.95, groups)
    eligible = random.random(groups) < scores - tilt * (scores - 0.5)
    return [
        ScoredLabel("BTCUSDT.SIM", 10.0 * group + 2 * row, float(scores[group]), bool(eligible[group]))
        for group in range(groups)
        for row in range(rows)
    ]


def known(found: Calibration | None) -> tuple[Calibration, float]:
    assert found is not None
    assert found.limit is not None
    return found, found.limit


def test_a_calibrated_model_is_within_its_limit_however_many_decisions_share_an_outcome() -> None:
    beyond = 0
    for seed in range(60):
        found, limit = known(calibration(labels(200, seed, rows=5), HORIZON))
        assert found.independent == pytest.approx(200)
        beyond += found.error > limit
    assert beyond <= 1, "one in a thousand is expected; rows that counted as observations would have it in most"


def test_scores_that_promise_too_much_are_beyond_the_limit_though_their_mean_is_right() -> None:
    found, limit = known(calibration(labels(600, 1, tilt=0.6), HORIZON))
    assert abs(found.predicted - found.observed) < 0.05, "the scores' mean says nothing of it"
    assert found.error > limit


def test_a_burst_of_decisions_weighs_as_much_as_a_single_one() -> None:
    quiet = labels(100, 2, rows=1)
    burst = [quiet[7]._replace(decided_at=quiet[7].decided_at + 0.001 * number) for number in range(1_000)]
    alone, together = calibration(quiet, HORIZON), calibration(quiet + burst, HORIZON)
    assert alone is not None
    assert together is not None
    assert (together.predicted, together.observed) == pytest.approx((alone.predicted, alone.observed))


def test_too_few_labels_have_no_limit_and_none_no_calibration() -> None:
    few = calibration(labels(FEWEST - 1, 3, rows=5), HORIZON)
    assert few is not None
    assert few.limit is None
    assert calibration([], HORIZON) is None


def packet(number: int, version: str = "v1", score: float = 0.9) -> packet_pb2.DecisionPacket:
    at = BEGIN + dt.timedelta(seconds=10 * number)
    made = packet_pb2.DecisionPacket()
    made.order.instrument, made.order.side = "BTCUSDT.SIM", pb.SIDE_BUY
    made.decision.decision_id = f"{id_bound(at)}-7000-8000-{number:012}"
    made.decision.decided_at.FromDatetime(at)
    made.decision.source, made.decision.action = pb.SOURCE_PRIMARY, pb.ACTION_TRADE
    made.decision.model_version, made.decision.score = version, score
    return made


class Audit:
    """A journal with decisions, and a database that has some of its rows."""

    def __init__(self, folder: Path) -> None:
        self.path, self.url = folder / "journal.db", f"sqlite:///{folder / 'audit.db'}"
        with closing(Store(self.url)) as store:
            store.migrate()

    def write(self, packets: list[packet_pb2.DecisionPacket], *, shipped: bool, name: str = "journal.db") -> None:
        path = self.path.with_name(name)
        with closing(JournalFile(path, sync_commits=False)) as journal:
            before = journal.head.position
            journal.append([packet_pb2.JournalEntry(decision=one).SerializeToString() for one in packets])
        if shipped:
            with closing(Store(self.url)) as store, closing(JournalReader(path)) as reader:
                known = store.shipped(reader.journal_id, reader.anchor())
                store.write(reader.journal_id, known, reader.rows_after(before, -1))

    def label(self, packets: list[packet_pb2.DecisionPacket], *, eligible: bool, horizon: float = HORIZON) -> None:
        with closing(AuditQuery(self.url, self.path)) as query:
            query.add_labels([Label(one.decision.decision_id, 0.0, eligible) for one in packets], horizon)

    def checker(self) -> AuditCheck:
        return AuditCheck(AuditQuery(self.url, self.path), self.path, lambda _: HORIZON)


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    return Audit(tmp_path)


def test_the_calibration_is_of_the_champion_and_of_labels_of_its_horizon(audit: Audit) -> None:
    ours, theirs = [packet(number) for number in range(40)], [packet(number, "v2") for number in range(40, 80)]
    audit.write(ours + theirs, shipped=True)
    audit.label(ours, eligible=False)
    audit.label(ours, eligible=True, horizon=1.0)
    audit.label(theirs, eligible=True)
    found = audit.checker().check({"default": "v1", "desk": "v3", "new": ""}).calibrations
    assert list(found) == ["default"]
    one = found["default"]
    assert (one.model_version, one.decisions) == ("v1", 40)
    assert one.independent == pytest.approx(40)
    assert (one.predicted, one.observed, one.error) == pytest.approx((0.9, 0.0, 0.9))
    assert one.limit < one.error


@pytest.mark.long
def test_newer_labels_are_looked_at_and_the_same_ones_are_not_read_again(audit: Audit) -> None:
    ours = [packet(number) for number in range(40)]
    audit.write(ours, shipped=True)
    audit.label(ours[:20], eligible=False)
    checker = audit.checker()
    assert checker.check({"default": "v1"}).calibrations["default"].decisions == 20
    audit.label(ours[:10], eligible=False, horizon=2.0)
    assert checker.check({"default": "v1"}).calibrations["default"].decisions == 20
    audit.label(ours[20:], eligible=True)
    assert checker.check({"default": "v1"}).calibrations["default"].observed == pytest.approx(0.5)


def test_nobody_waits_for_a_look_so_it_rests_between_parts_of_the_day(
    audit: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = list[Pace]()

    def rest(pace: Pace) -> None:
        rests.append(pace)
        with closing(sqlite3.connect(audit.url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute(f"CREATE TABLE others{len(rests)} (one)")
            assert other.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0, "a transaction is open meanwhile"

    monkeypatch.setattr(Pace, "rest", rest)
    ours = [packet(number) for number in range(40)]
    audit.write(ours, shipped=True)
    audit.label(ours, eligible=True)
    assert audit.checker().check({"default": "v1"}).calibrations["default"].decisions == 40
    assert len(rests) == 120


def test_the_lag_of_labels_is_from_the_newest_labelled_decision_to_the_newest(audit: Audit) -> None:
    ours = [packet(number) for number in range(40)]
    audit.write(ours, shipped=True)
    assert not audit.checker().check({}).HasField("label_lag_seconds"), "nobody labels here"
    audit.label(ours[:10], eligible=True)
    assert audit.checker().check({}).label_lag_seconds == pytest.approx(300)


def test_a_journal_without_a_writer_is_stranded_until_all_of_it_is_shipped(audit: Audit) -> None:
    audit.write([packet(1), packet(2)], shipped=True)
    audit.write([packet(3)], shipped=True, name="journal.db.1")
    audit.write([packet(4), packet(5), packet(6)], shipped=False, name="journal.db.1")
    assert dict(audit.checker().check({}).stranded) == {"journal.db.1": 3}
    writer = take_lock(audit.path.with_name("journal.db.1.lock"))
    assert writer is not None
    assert not audit.checker().check({}).stranded, "its writer will ship it"
    os.close(writer)
    assert dict(audit.checker().check({}).stranded) == {"journal.db.1": 3}


def test_looking_for_stranded_journals_leaves_their_locks_free(audit: Audit) -> None:
    audit.write([packet(1)], shipped=False)
    lock = audit.path.with_name("journal.db.lock")
    lock.touch()
    assert audit.checker().check({}).stranded
    assert take_lock(lock) is not None


def test_a_journal_that_nobody_closed_is_deserted_when_nothing_has_been_heard_of_it(audit: Audit) -> None:
    """Its volume may be anywhere: the database alone tells of it."""
    audit.write([packet(1), packet(2)], shipped=True)
    with closing(JournalReader(audit.path)) as journal:
        journal_id, head = journal.journal_id, journal.head()

    def state(minute: int, *, closed: bool = False, ahead: int = 0) -> None:
        stating = Stating(journal_id, "server-2:/journal.db", "", None)
        at = round((BEGIN + dt.timedelta(minutes=minute)).timestamp() * 1e9)
        with closing(Store(audit.url)) as store:
            store.shipped(journal_id, Head(0, b""), "server-2:/journal.db")
            store.state(journal_id, stating.head(Head(head.position + ahead, head.hash), at, closed=closed))

    def deserted(minute: int) -> dict[str, str]:
        query = AuditQuery(audit.url, audit.path.with_name("elsewhere.db"))
        now = BEGIN + dt.timedelta(minutes=minute)
        return dict(AuditCheck(query, audit.path, lambda _: HORIZON, lambda: now).check({}).deserted)

    state(0)
    assert not deserted(14)
    assert deserted(16) == {journal_id: "server-2:/journal.db"}
    state(10)
    assert not deserted(16), "its server has said since then that it is there"
    state(10, closed=True, ahead=1)
    assert deserted(30), "the database has not got all that it held"
    state(10, closed=True)
    assert not deserted(30)
    state(10)
    with closing(Store(audit.url)) as store:
        store.write_off(journal_id, "the disk burnt")
    assert not deserted(30)


def test_a_database_that_cannot_say_is_an_error_and_not_a_stranded_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([b"a row"])
    checker = AuditCheck(AuditQuery(f"sqlite:///{tmp_path / 'audit.db'}", path), path, lambda _: HORIZON)
    with pytest.raises(AuditUnavailableError, match="database"):
        checker.check({})
