"""`pretrade audit list`, `replay` and `label` on a real journal, a real SQLite store and an archived model."""

from __future__ import annotations

import asyncio
import copy
import datetime as dt
import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from google.protobuf.timestamp_pb2 import Timestamp
from support.desk import SETTINGS_JSON, Desk, values
from typer.testing import CliRunner, Result

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.enum_names import enum_choices
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.commands import app
from server.audit.reading.journals import Step
from server.audit.reading.labels import Label
from server.audit.reading.query import AuditQuery
from server.audit.review import instant
from server.audit.store.store import Store
from server.decision.record import hash_of
from server.errors import AuditUnavailableError, InvalidRequestError, OutcomeConflictError
from server.journal.journal_file import JournalFile, JournalReader
from server.models.archive import RunningModel, read_archive
from server.models.registry import Registry

DECISIONS, SHIPPED = 30, 20
REPLY_LATE = "reply_unconfirmed:audit_late"


def audit_late(decision_id: str) -> packet_pb2.JournalEntry:
    """Says that the packet was not durable in time, and what the caller was told."""
    reasons = (pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD, pb.REASON_CODE_AUDIT_LATE)
    note = packet_pb2.ReplyUnconfirmed(
        decision_id=decision_id, cause="audit_late", heard_action=pb.ACTION_ABSTAIN, heard_reasons=reasons
    )
    return packet_pb2.JournalEntry(reply_unconfirmed=note)


@dataclass(frozen=True)
class Audit:
    """A journal, two thirds of whose decisions were shipped."""

    packets: dict[str, packet_pb2.DecisionPacket]
    journal: Path
    database_url: str
    models: Path

    def run(self, *arguments: str, models: bool = False, terminal: int | None = None) -> Result:
        """Runs a command; `terminal` is the width of the terminal that its output goes to."""
        targets = ["--journal", str(self.journal), "--database-url", self.database_url]
        if models:
            targets += ["--models", str(self.models)]
        env = {"COLUMNS": "200"} if terminal is None else {"COLUMNS": str(terminal), "FORCE_COLOR": "1"}
        return CliRunner().invoke(app, [*arguments, *targets], env=env)

    def query(self) -> AuditQuery:
        return AuditQuery(self.database_url, self.journal)


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> dict[str, packet_pb2.DecisionPacket]:
    async def decide(desk: Desk) -> None:
        for row in range(DECISIONS):
            await desk.decide(values(row), strategy=f"s{row % 3}")

    with RunningModel(read_archive(model_store / "champion.mar")) as running:
        desk = Desk(tmp_path_factory.mktemp("desk"), running)
        asyncio.run(decide(desk))
    return desk.packets


@pytest.fixture
def audit(tmp_path: Path, model_store: Path, decided: dict[str, packet_pb2.DecisionPacket]) -> Audit:
    settings = packet_pb2.SettingsInForce(config_hash=hash_of(SETTINGS_JSON), settings_json=SETTINGS_JSON)
    entries = [packet_pb2.JournalEntry(settings=settings)]
    entries += [packet_pb2.JournalEntry(decision=packet) for packet in decided.values()]
    unconfirmed = packet_pb2.JournalEntry()
    unconfirmed.reply_unconfirmed.decision_id, unconfirmed.reply_unconfirmed.cause = "decision-00003", "cancelled"
    path, url = tmp_path / "audit-journal.db", f"sqlite:///{tmp_path / 'audit.db'}"
    packed = [entry.SerializeToString() for entry in (*entries, unconfirmed)]
    with (
        closing(JournalFile(path, sync_commits=False)) as journal,
        closing(Store(url)) as store,
        closing(JournalReader(path)) as reader,
    ):
        store.migrate()
        journal.append(packed[: 1 + SHIPPED])
        store.write(reader.journal_id, store.shipped(reader.journal_id, reader.anchor()), reader.rows_after(0, -1))
        journal.append(packed[1 + SHIPPED :])
    return Audit(copy.deepcopy(decided), path, url, model_store)


def test_a_list_is_one_sequence_over_database_and_journal(audit: Audit) -> None:
    lines = [json.loads(line) for line in audit.run("list", "--limit", "25", "--json").output.splitlines()]
    assert [one["packet"]["decision"]["decision_id"] for one in lines] == [
        f"decision-{number:05}" for number in range(29, 4, -1)
    ]
    assert [one["found_in"] for one in lines] == ["journal"] * 10 + ["database"] * 15


def test_a_list_for_people_has_a_line_for_every_decision(audit: Audit) -> None:
    output = audit.run("list", "--strategy", "s0").output
    assert output.count("decision-") == DECISIONS // 3
    assert "2023-11-14 22:13:20.000" in output


@pytest.mark.parametrize("width", [60, 80])
def test_nothing_of_a_list_is_cut_off_on_a_narrow_terminal(audit: Audit, width: int) -> None:
    output = re.sub("\x1b\\[[0-9;]*m", "", audit.run("list", "--strategy", "s0", terminal=width).output)
    words = output.split()
    assert [f"decision-{number:05}" in words for number in range(0, DECISIONS, 3)] == [True] * (DECISIONS // 3)
    assert "nothing (cancelled)" in output
    assert "…" not in output
    assert max(map(len, output.splitlines())) <= width


def test_a_page_token_goes_on_where_the_page_before_ended_whatever_was_shipped_meanwhile(audit: Audit) -> None:
    with closing(audit.query()) as query:
        wanted = audit_pb2.DecisionFilter(strategies=["s1"])
        first = query.page(wanted, 3, "")
        with closing(Store(audit.database_url)) as store, closing(JournalReader(audit.journal)) as journal:
            head = store.journals()[journal.journal_id]
            store.write(journal.journal_id, head, journal.rows_after(head.position, -1))
        second = query.page(wanted, 100, first.next_page_token)
        ids = [one.packet.decision.decision_id for one in (*first.decisions, *second.decisions)]
        assert ids == [f"decision-{number:05}" for number in range(28, 0, -3)]
        assert second.next_page_token == ""


def test_a_reply_that_turned_out_unconfirmed_is_known_before_that_was_shipped(audit: Audit) -> None:
    with closing(audit.query()) as query:
        page = query.page(audit_pb2.DecisionFilter(), 100, "")
    statuses = {one.packet.decision.decision_id: one.reply_status for one in page.decisions}
    assert statuses["decision-00003"] == "reply_unconfirmed:cancelled"
    assert list(statuses.values()).count("replied") == DECISIONS - 1


def test_without_the_database_the_journal_answers_and_says_that_it_is_not_all(audit: Audit, tmp_path: Path) -> None:
    with closing(AuditQuery(f"sqlite:///{tmp_path / 'missing' / 'audit.db'}", audit.journal)) as query:
        page = query.page(audit_pb2.DecisionFilter(), 100, "")
        assert len(page.decisions) == DECISIONS
        assert page.incomplete.startswith("the database:")


def test_a_database_that_was_away_is_not_asked_again_at_once(audit: Audit, tmp_path: Path) -> None:
    path, now = tmp_path / "away" / "audit.db", 100.0
    with closing(AuditQuery(f"sqlite:///{path}", audit.journal, lambda: now)) as query:
        assert query.page(audit_pb2.DecisionFilter(), 1, "").incomplete
        path.parent.mkdir()
        path.write_bytes(Path(audit.database_url.removeprefix("sqlite:///")).read_bytes())
        now += 1.9
        assert query.page(audit_pb2.DecisionFilter(), 1, "").incomplete
        now += 0.2
        assert not query.page(audit_pb2.DecisionFilter(), 1, "").incomplete


@pytest.mark.parametrize(("size", "token"), [(-1, ""), (501, ""), (1, "?")])
def test_a_page_that_breaks_a_rule_is_refused(audit: Audit, size: int, token: str) -> None:
    with closing(audit.query()) as query, pytest.raises(InvalidRequestError):
        query.page(audit_pb2.DecisionFilter(), size, token)


def test_one_decision_replays_bit_equal_from_journal_and_database_alike(audit: Audit) -> None:
    for decision_id in ("decision-00000", "decision-00029"):
        result = audit.run("replay", decision_id, models=True)
        assert result.exit_code == 0, result.output
        assert "bit-equal" in result.output


@pytest.mark.long
def test_a_replay_says_when_the_caller_heard_something_else(audit: Audit) -> None:
    output = audit.run("replay", "decision-00003", models=True).output
    assert "caller heard nothing (cancelled); decided TRADE" in output
    assert "taken from the journal: cancelled: the caller had gone" in output
    late = audit_late("decision-00004")
    with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
        journal.append([late.SerializeToString()])
    result = audit.run("replay", "decision-00004", models=True)
    assert "caller heard ABSTAIN (AUDIT_LATE); decided TRADE" in result.output
    assert "bit-equal" in result.output
    result = audit.run("replay", "decision-00004", "--threshold", "1", models=True)
    assert "another action, but the caller would have heard ABSTAIN (AUDIT_LATE) again" in result.output


@pytest.mark.long
def test_all_decisions_replay_bit_equal_and_a_forged_one_is_named(audit: Audit) -> None:
    result = audit.run("replay", models=True)
    assert result.exit_code == 0, result.output
    assert f"{DECISIONS} decisions, {DECISIONS} replayed (PRIMARY {DECISIONS}): {DECISIONS} bit-equal" in result.output
    forged = audit.packets["decision-00007"]
    forged.decision.decision_id = "decision-99999"
    forged.decision.score += 1e-9
    with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
        journal.append([packet_pb2.JournalEntry(decision=forged).SerializeToString()])
    result = audit.run("replay", models=True)
    assert result.exit_code == 1
    assert f"{DECISIONS} bit-equal, 1 different" in result.output
    assert "decision-99999" in result.output
    assert repr(forged.decision.score) in result.output


def test_another_threshold_gives_a_confusion_table_and_a_plot(audit: Audit, tmp_path: Path) -> None:
    scores = [packet.decision.score for packet in audit.packets.values()]
    threshold = sorted(scores)[9]
    before = sum(packet.decision.action == pb.ACTION_TRADE for packet in audit.packets.values())
    plot = tmp_path / "scores.svg"
    result = audit.run("replay", "--threshold", repr(threshold), "--plot", str(plot), models=True)
    assert result.exit_code == 0, result.output
    nothing = audit.packets["decision-00003"].decision  # whose caller would have heard nothing all the same
    kept = nothing.score >= threshold
    changed = abs(21 - before) - (kept != (nothing.action == pb.ACTION_TRADE))
    assert f"{DECISIONS - changed} with the same action, {changed} different" in result.output
    assert "callers heard: " in result.output
    assert "; 1 not, or perhaps not, what was decided: cancelled 1" in result.output
    rows = {line.split("│")[1].strip(): line.split("│")[2:6] for line in result.output.splitlines() if "│" in line}
    assert [int(cell) for cell in rows["nothing"]] == [0, 0, 0, 1]
    traded, refused = (int(cell) for cell in rows["TRADE"][:2]), (int(cell) for cell in rows["NO_TRADE"][:2])
    assert [a + b for a, b in zip(traded, refused, strict=True)] == [21 - kept, 9 - (not kept)]
    assert plot.read_text().startswith("<?xml")


@pytest.mark.long
def test_another_model_is_named_by_name_version_or_file(audit: Audit) -> None:
    archive = read_archive(audit.models / "challenger.mar")
    outputs = {
        audit.run("replay", "--model", model, models=True).output
        for model in ("challenger", archive.version, str(audit.models / "challenger.mar"))
    }
    assert len(outputs) == 1
    assert "would have heard" in outputs.pop()


def test_without_the_model_it_says_which_version_is_missing(audit: Audit, tmp_path: Path) -> None:
    result = audit.run("replay", "--models", str(tmp_path / "empty"))
    version = read_archive(audit.models / "champion.mar").version
    assert result.exit_code == 1
    assert f"30 not replayable: no archive of model version {version}" in " ".join(result.output.split())


def test_labels_are_stored_once_and_reported(audit: Audit, tmp_path: Path) -> None:
    with closing(audit.query()) as query:
        for _ in range(2):
            query.add_labels([Label(f"decision-{n:05}", float(n - 9), n >= 8) for n in range(SHIPPED)], 5.0)
        assert sum(one.eligible for one in query.labelled(None, None, 5.0)) == SHIPPED - 8
    report = json.loads(audit.run("label", "--horizon", "5", "--json").output)
    assert report["all"]["decisions"] == report["PRIMARY"]["decisions"] == SHIPPED
    assert report["all"]["base_rate"] == pytest.approx((SHIPPED - 8) / SHIPPED)
    assert "calibration" in audit.run("label", "--horizon", "5").output


def test_labels_are_those_that_the_champion_has_learnt(audit: Audit, tmp_path: Path) -> None:
    store = Registry(Path(shutil.copytree(audit.models, tmp_path / "store")))
    version = read_archive(audit.models / "champion.mar").version
    store.set_alias("champion", version)
    horizon = store.champions_markout().horizon_seconds
    assert horizon != 5
    with closing(audit.query()) as query:
        query.add_labels([Label("decision-00000", 1.0, True)], horizon)
        query.add_labels([Label(f"decision-{n:05}", 1.0, False) for n in range(SHIPPED)], 5.0)
    report = json.loads(audit.run("label", "--models", str(store.root), "--json").output)
    assert (report["all"]["decisions"], report["all"]["base_rate"]) == (1, 1.0)


def test_a_share_of_nothing_is_null_in_json_and_a_dash_for_people(audit: Audit) -> None:
    with closing(audit.query()) as query:
        query.add_labels([Label(f"decision-{n:05}", 1.0, True) for n in range(SHIPPED)], 5.0)
    with closing(sqlite3.connect(audit.database_url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        connection.execute("UPDATE decisions SET heard_action = 'NO_TRADE'")
    output = audit.run("label", "--horizon", "5", "--json").output
    assert "NaN" not in output
    assert json.loads(output)["all"]["precision"] is None
    table = audit.run("label", "--horizon", "5").output
    assert "nan" not in table
    assert next(row for row in table.splitlines() if row.startswith("all ")).split()[4] == "–"


def test_a_conflicting_outcome_is_found_in_the_journal(audit: Audit) -> None:
    said = packet_pb2.Outcome(decision_id="decision-00001", reporter="ems", filled_quantity=1.0, fill_price=2.0)
    with closing(audit.query()) as query:
        assert query.recorded(said) is None
        with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
            journal.append([packet_pb2.JournalEntry(outcome=said).SerializeToString()])
        assert query.recorded(said) == said
        said.fill_price = 3.0
        with pytest.raises(OutcomeConflictError):
            query.recorded(said)


def test_without_the_database_outcomes_are_known_of_decisions_that_the_journals_reach_back_to(
    audit: Audit, tmp_path: Path
) -> None:
    def outcome_of(decision_id: str) -> packet_pb2.Outcome:
        return packet_pb2.Outcome(decision_id=decision_id, reporter="ems", filled_quantity=1.0, fill_price=2.0)

    said = outcome_of("decision-00015")
    with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
        journal.append([packet_pb2.JournalEntry(outcome=said).SerializeToString()])
        with closing(AuditQuery(f"sqlite:///{tmp_path / 'missing' / 'audit.db'}", audit.journal)) as query:
            assert query.recorded(outcome_of("decision-00000")) is None, "nothing was trimmed yet"
            journal.trim(through=11, rows=11)  # the settings and ten decisions
            assert query.recorded(said) == said
            assert query.recorded(outcome_of("decision-00010")) is None
            with pytest.raises(AuditUnavailableError):
                query.outcomes("decision-00009")
            other = audit.journal.with_name(f"{audit.journal.name}.0")
            with closing(JournalFile(other, sync_commits=False)) as another:
                another.append([packet_pb2.JournalEntry().SerializeToString()] * 2)
                another.trim(through=1, rows=1)
            with pytest.raises(AuditUnavailableError):
                query.recorded(said)


def test_the_journals_of_all_processes_are_one_audit(audit: Audit) -> None:
    """A second process holds the newest decisions, and what it says of the first one's is heard."""
    moved = [packet_pb2.JournalEntry(decision=copy.deepcopy(one)) for one in list(audit.packets.values())[:3]]
    for number, entry in enumerate(moved):
        entry.decision.decision.decision_id = f"decision-{90 + number:05}"
    late = audit_late("decision-00029")
    with closing(JournalFile(audit.journal.with_name(f"{audit.journal.name}.0"), sync_commits=False)) as journal:
        journal.append([one.SerializeToString() for one in (*moved, late)])
    with closing(audit.query()) as query:
        first = query.page(audit_pb2.DecisionFilter(), 5, "")
        assert [one.packet.decision.decision_id[-2:] for one in first.decisions] == ["92", "91", "90", "29", "28"]
        assert first.decisions[3].reply_status == query.get("decision-00029").reply_status == REPLY_LATE
        rest = query.page(audit_pb2.DecisionFilter(), 100, first.next_page_token)
        assert len(rest.decisions) == DECISIONS - 2
        assert query.get("decision-00091").found_in == "journal"


def test_a_watch_goes_on_in_every_journal_where_it_broke_off(audit: Audit) -> None:
    def ids(step: Step) -> list[str]:
        return [one.decision.packet.decision.decision_id for one in step.events if one.HasField("decision")]

    with closing(audit.query()) as query:
        came = query.journals.after(audit_pb2.WatchDecisionsRequest())
        assert (came.events, came.more) == ([], False)
        oldest = query.journals.after(audit_pb2.WatchDecisionsRequest(from_oldest=True))
        seen = query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=oldest.cursor))
        assert ids(seen) == list(audit.packets)
        other = audit.journal.with_name(f"{audit.journal.name}.0")
        news = packet_pb2.JournalEntry(decision=audit.packets["decision-00000"])
        with closing(JournalFile(other, sync_commits=False)) as journal:
            journal.append([news.SerializeToString()])
        for cursor in (came.cursor, seen.cursor):
            step = query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=cursor))
            assert ids(step) == ["decision-00000"]
            assert query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=step.cursor)).events == []
        with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
            journal.trim(through=11, rows=11)
        again = query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=oldest.cursor))
        assert (again.events[0].missed.first_position, again.events[0].missed.last_position) == (1, 11)
        assert ids(again) == [*list(audit.packets)[10:], "decision-00000"]
        for wrong in ("17", "x:1", oldest.cursor + ","):
            with pytest.raises(InvalidRequestError):
                query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=wrong))
        never = audit_pb2.DecisionFilter(since=Timestamp(seconds=1 << 60))
        with pytest.raises(InvalidRequestError, match="since and until must be valid instants"):
            query.journals.after(audit_pb2.WatchDecisionsRequest(cursor=seen.cursor, filter=never))


def test_every_source_and_action_of_the_contract_can_be_asked_for(audit: Audit) -> None:
    for option, enum in (("--source", pb.Source), ("--action", pb.Action)):
        for name in enum_choices(enum):
            result = audit.run("list", option, name)
            assert result.exit_code == 0, result.output


@pytest.mark.parametrize("option", ["--source", "--action"])
def test_a_source_or_an_action_that_the_contract_does_not_have_is_refused(audit: Audit, option: str) -> None:
    result = audit.run("list", option, "nobody")
    assert result.exit_code == 2
    assert "must be one of" in result.output


def test_instants_are_iso_8601_or_a_time_ago() -> None:
    assert instant("2026-01-02T03:04:05") == dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert instant("2026-01-02T03:04:05+02:00") == dt.datetime(2026, 1, 2, 1, 4, 5, tzinfo=dt.UTC)
    ago = dt.datetime.now(dt.UTC) - instant("1.5h")
    assert abs(ago - dt.timedelta(minutes=90)) < dt.timedelta(seconds=10)
    for text in ("yesterday", "10", "10x", "1e999d"):
        with pytest.raises(typer.BadParameter):
            instant(text)
