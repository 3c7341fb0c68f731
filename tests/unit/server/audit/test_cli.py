"""`pretrade audit` as an operator uses it, on a real journal and a real SQLite store."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from support.guest_sets import MIXED, REGISTERED, know
from support.stack_files import stack_file
from typer.testing import CliRunner, Result

from feature_cache import features
from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.file_lock import take_lock
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.cli import screen, to_dict
from server.audit.commands import app
from server.audit.store.store import Store
from server.journal.journal_file import JournalFile, JournalReader

SHIPPED, RECENT = "0197-shipped", "0197-recent"


def decision(decision_id: str) -> packet_pb2.JournalEntry:
    entry = packet_pb2.JournalEntry()
    packet = entry.decision
    order, answer = packet.order, packet.decision
    order.instrument, order.side, order.quantity, order.strategy = "BTCUSDT.BINANCE", pb.SIDE_SELL, 0.25, "maker"
    order.limit_price, order.order_ref = 67890.12, "[red]ref\x1b[31m"
    answer.decision_id, answer.action, answer.source = decision_id, pb.ACTION_NO_TRADE, pb.SOURCE_SECONDARY
    answer.reasons.append(pb.REASON_CODE_SCORE_BELOW_THRESHOLD)
    answer.degradations.append(pb.DEGRADATION_PRIMARY_TIMEOUT)
    answer.score, answer.threshold = 0.25, 0.95
    answer.model_name, answer.model_version = "champion", "0123456789abcdef"
    answer.decided_at.FromNanoseconds(1_700_000_000_123_456_789)
    answer.budget.used_us, answer.budget.allowed_us = 2_345, 20_000
    answer.budget.stages.add(stage=pb.STAGE_PRIMARY, allowed_us=12_000, used_us=1_500)
    answer.budget.stages.add(stage=pb.STAGE_CACHED_SCORE, skipped=pb.DEGRADATION_CACHED_SCORE_OFF)
    values = np.arange(features.N_FEATURES, dtype="<f4")
    values[features.INDEX["ret_30s_bps"]] = np.nan
    packet.model_input, packet.feature_set_id = values.tobytes(), features.MF1.id
    packet.features.sequence, packet.features.age_us = 4711, 15_321
    packet.attempts.add(replica="primary", outcome="timeout", used_us=1_500)
    packet.attempts.add(replica="secondary", outcome="success", used_us=700, model_version="0123456789abcdef")
    packet.instance_id, packet.config_hash, packet.trading_state = "server-1", "c0ffee", "ACTIVE"
    packet.mid_price = 67890.5
    packet.parts.add(model_version="00000000000000aa", weight=0.25, score=0.5)
    packet.trace_id, packet.correlation_id = "4bf92f3577b34da6a3ce929d0e0e4736", "basket-7"
    return entry


@dataclass(frozen=True)
class Audit:
    """A journal of which everything but the last decision was shipped."""

    journal: Path
    database_url: str

    def run(self, *arguments: str) -> Result:
        targets = ("--journal", str(self.journal), "--database-url", self.database_url)
        return CliRunner().invoke(app, [*arguments, *targets], env={"COLUMNS": "120"})


@pytest.fixture
def audit(tmp_path: Path) -> Audit:
    path, url = tmp_path / "journal.db", f"sqlite:///{tmp_path / 'audit.db'}"
    unconfirmed = packet_pb2.JournalEntry()
    unconfirmed.reply_unconfirmed.decision_id, unconfirmed.reply_unconfirmed.cause = SHIPPED, "cancelled"
    with (
        closing(JournalFile(path, sync_commits=False)) as journal,
        closing(Store(url)) as store,
        closing(JournalReader(path)) as reader,
    ):
        journal.append([decision(SHIPPED).SerializeToString(), unconfirmed.SerializeToString()])
        store.migrate()
        store.write(reader.journal_id, store.shipped(reader.journal_id, reader.anchor()), reader.rows_after(0, -1))
        journal.append([decision(RECENT).SerializeToString()])
    return Audit(path, url)


def test_one_screen_shows_what_was_asked_known_and_answered_why_and_at_what_cost(audit: Audit) -> None:
    result = audit.run("show", RECENT)
    assert result.exit_code == 0, result.output
    for text in (
        RECENT,
        "NO_TRADE",
        "2023-11-14 22:13:20.123456789 UTC",
        "SELL 0.25 BTCUSDT.BINANCE, limit 67890.12",
        "SECONDARY",
        "0.250000 against a threshold of 0.950000",
        "champion 0123456789abcdef",
        "00000000000000aa: score 0.500000, weight 0.25",
        "SCORE_BELOW_THRESHOLD",
        "PRIMARY_TIMEOUT",
        "67890.5",
        "sequence 4711, 15.321 ms old",
        "turned for a sell",
        "2.345 ms of 20.000 ms",
        "1.500 ms",
        "CACHED_SCORE_OFF",
        "timeout",
        "c0ffee",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736, correlation id basket-7",
        "entry 3, row 0",
        "journal",
    ):
        assert text in result.output
    for name in features.NAMES:
        assert name in result.output
    assert "nan" not in result.output
    assert re.search(r"ret_30s_bps +undefined", result.output)


def test_a_narrow_terminal_cuts_nothing_off(audit: Audit) -> None:
    shown = json.loads(audit.run("show", RECENT, "--json").output)["evidence"]["hash"]
    targets = ("--journal", str(audit.journal), "--database-url", audit.database_url)
    lines = CliRunner().invoke(app, ["show", RECENT, *targets], env={"COLUMNS": "80"}).output.splitlines()
    start = next(number for number, line in enumerate(lines) if " hash " in line)
    assert shown in "".join(line.strip("│ ").removeprefix("hash").strip() for line in lines[start : start + 2])


def test_what_callers_wrote_is_neither_markup_nor_a_control_sequence(audit: Audit) -> None:
    assert "[red]ref\N{REPLACEMENT CHARACTER}[31m" in audit.run("show", RECENT).output


def test_a_shipped_decision_is_found_in_the_database_with_its_reply_status(audit: Audit) -> None:
    shown = json.loads(audit.run("show", SHIPPED, "--json").output)
    assert shown["evidence"]["found_in"] == "database"
    assert shown["reply_status"] == "reply_unconfirmed:cancelled"
    assert shown["packet"]["order"]["instrument"] == "BTCUSDT.BINANCE"
    assert shown["features"]["trade_age_ms"] == features.N_FEATURES - 1
    assert shown["features"]["ret_30s_bps"] is None


def test_a_decision_of_a_moment_ago_is_found_in_the_journal(audit: Audit) -> None:
    shown = json.loads(audit.run("show", RECENT, "--json").output)
    assert (shown["evidence"]["found_in"], shown["evidence"]["position"]) == ("journal", 3)
    assert shown["reply_status"] == "replied"


def test_the_journal_answers_when_the_database_cannot(audit: Audit, tmp_path: Path) -> None:
    broken = Audit(audit.journal, f"sqlite:///{tmp_path / 'missing' / 'audit.db'}")
    result = broken.run("show", SHIPPED, "--json")
    assert result.stderr == "", "the journal reaches back to it, and holds every outcome"
    shown = json.loads(result.stdout)
    assert shown["evidence"]["found_in"] == "journal"
    assert shown["reply_status"] == "reply_unconfirmed:cancelled"
    with closing(JournalFile(audit.journal.with_name(f"{audit.journal.name}.0"), sync_commits=False)) as other:
        other.append([packet_pb2.JournalEntry().SerializeToString()])
        other.trim(1, 1)
    result = broken.run("show", SHIPPED, "--json")
    assert result.stderr.startswith("outcomes may be missing: the database: OperationalError")


def test_news_that_was_not_shipped_is_shown_with_a_shipped_decision(audit: Audit) -> None:
    outcome = packet_pb2.JournalEntry()
    outcome.outcome.decision_id, outcome.outcome.reporter = SHIPPED, "ems"
    outcome.outcome.filled_quantity, outcome.outcome.fill_price = 0.25, 67890.0
    late = packet_pb2.JournalEntry()
    late.reply_unconfirmed.decision_id, late.reply_unconfirmed.cause = SHIPPED, "audit_late"
    with closing(JournalFile(audit.journal, sync_commits=False)) as journal:
        journal.append([outcome.SerializeToString(), late.SerializeToString()])
    shown = json.loads(audit.run("show", SHIPPED, "--json").output)
    assert shown["evidence"]["found_in"] == "database"
    assert shown["reply_status"] == "reply_unconfirmed:audit_late"
    assert [(one["reporter"], one["fill_price"]) for one in shown["outcomes"]] == [("ems", 67890.0)]
    assert "0.25 filled at 67890; recorded 1970" in audit.run("show", SHIPPED).output


@pytest.mark.parametrize("decision_id", ["", "x" * 65, "nul\0"])
def test_what_cannot_be_a_decision_id_is_unknown(audit: Audit, decision_id: str) -> None:
    result = audit.run("show", decision_id)
    assert result.exit_code == 1
    assert result.stderr.startswith("pretrade audit: no decision")


def test_an_unknown_decision_is_a_clear_error(audit: Audit) -> None:
    result = audit.run("show", "nobody")
    assert result.exit_code == 1
    assert result.stderr == "pretrade audit: no decision nobody in the audit\n"


def test_verify_walks_database_and_journal(audit: Audit) -> None:
    result = audit.run("verify")
    assert result.exit_code == 0, result.output
    database, journal = result.output.splitlines()
    assert "rows 1 to 2 are as they were written" in database
    assert "rows 1 to 3 are as they were written" in journal


@pytest.mark.parametrize(
    ("database", "tamper", "problem"),
    [
        ("journal.db", "UPDATE entries SET entry = X'00' WHERE position = 2", "position 2: changed"),
        ("audit.db", "UPDATE journal_entries SET entry = X'00' WHERE position = 1", "position 1: changed"),
        ("audit.db", "DELETE FROM journal_entries WHERE position = 2", "position 2: missing"),
        ("journal.db", "DELETE FROM entries WHERE position > 1", "position 2: shipped, up to 2, but gone"),
    ],
)
def test_verify_names_the_position_that_was_tampered_with(
    audit: Audit, tmp_path: Path, database: str, tamper: str, problem: str
) -> None:
    with closing(sqlite3.connect(tmp_path / database, isolation_level=None)) as connection:
        assert connection.execute(tamper).rowcount
    result = audit.run("verify")
    assert result.exit_code == 1
    assert problem in result.stderr


def test_verify_beside_a_database_that_is_down_verifies_the_journal_and_says_so(audit: Audit, tmp_path: Path) -> None:
    result = Audit(audit.journal, f"sqlite:///{tmp_path / 'missing' / 'audit.db'}").run("verify")
    assert result.exit_code == 2
    assert "rows 1 to 3 are as they were written" in result.stdout
    assert "database: not reachable, not verified" in result.stderr


def test_verify_finds_the_journal_of_a_stack_that_was_stopped(audit: Audit, tmp_path: Path) -> None:
    left = tmp_path / "stack" / "server" / "journal.sqlite"
    left.parent.mkdir(parents=True)
    shutil.copy(audit.journal, left)
    result = CliRunner().invoke(app, ["verify"], env={"PRETRADE_LOCAL_DIR": str(tmp_path / "stack")})
    assert result.exit_code == 2
    assert "rows 1 to 3 are as they were written" in result.stdout
    assert "its database is not reachable" in result.stderr


@pytest.mark.long
def test_the_journals_of_a_server_that_is_gone_are_shipped_and_closed(audit: Audit) -> None:
    """From its volume, by hand: what waits there is then in the database, and nothing is missed any more."""
    place = audit.journal.with_name("journal.db.1")
    with closing(JournalFile(place, sync_commits=False)) as journal:
        journal.append([decision("0197-of-a-place").SerializeToString()])
    command = ["ship", str(audit.journal), "--database-url", audit.database_url]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.findall(r"in the database up to row (\d+)", result.output) == ["3", "1"]
    with closing(Store(audit.database_url)) as store:
        assert [one.stated.closed for one in store.shipments() if one.stated is not None] == [True, True]
        assert store.find(RECENT) is not None
        assert store.find("0197-of-a-place") is not None
    writer = take_lock(audit.journal.with_name("journal.db.lock"))
    assert writer is not None
    refused = CliRunner().invoke(app, command)
    os.close(writer)
    assert (refused.exit_code, "journal.db" in refused.output) == (1, True), refused.output
    lost = CliRunner().invoke(app, ["ship", str(audit.journal.with_name("no.db")), *command[2:]])
    assert (lost.exit_code, "there is no journal" in lost.output) == (1, True)


def test_reading_a_database_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mistyped.db"
    for command in (["show", "0197"], ["verify"], ["export", "--since", "2026-11-01", "--to", str(tmp_path / "cold")]):
        result = CliRunner().invoke(app, [*command, "--database-url", f"sqlite:///{path}"])
        assert result.exit_code != 0
        assert f"there is no database {path}" in result.output
    assert not path.exists()


def test_migrate_makes_the_tables_and_says_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    first, second = (CliRunner().invoke(app, ["migrate", "--database-url", url]) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.output.endswith(", from an empty database\n")
    assert second.output.endswith(" already\n")


def test_without_targets_the_running_stack_is_asked(audit: Audit, tmp_path: Path) -> None:
    with stack_file(tmp_path, database_url=audit.database_url, journal=str(audit.journal)):
        result = CliRunner().invoke(app, ["show", RECENT, "--json", "--dir", str(tmp_path)])
    assert json.loads(result.output)["decision_id"] == RECENT


def test_without_targets_and_without_a_stack_the_error_says_what_to_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["show", RECENT, "--dir", str(tmp_path)])
    assert result.exit_code == 3
    assert "--database-url URL or --journal FILE" in result.stderr


def test_a_malformed_database_url_is_refused_without_showing_its_password(audit: Audit) -> None:
    result = CliRunner().invoke(app, ["show", RECENT, "--database-url", "mysql://user:secret@host/db"])
    assert result.exit_code == 1
    assert "SQLite and PostgreSQL" in result.stderr
    assert "secret" not in result.stderr


def test_what_a_model_of_another_set_saw_stands_beside_what_the_guards_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    packet = decision(RECENT).decision
    packet.scored_input = np.array([1.5, np.nan, 0.25], dtype="<f4").tobytes()
    packet.scored_feature_set = MIXED.version
    console = Console(width=200, record=True)
    for known, name in (((REGISTERED,), "urgency"), ((), "2")):
        know(monkeypatch, *known)
        console.print(screen(audit_pb2.AuditedDecision(packet=packet), []))
        shown = console.export_text()
        assert "features mf1, as rules and guards saw them" in shown
        assert f"features {MIXED.version}, as the model saw them" in shown
        assert re.search(rf"{name} +0.25", shown)
        in_json = to_dict(audit_pb2.AuditedDecision(packet=packet), [])["scored_features"]
        assert [*in_json.values()] == [1.5, None, 0.25]
        assert [*in_json][2] == name
