"""Every face of the audit says what each caller heard, wherever the decision and the note about its reply are."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
import pytest
from support.batches import together
from support.desk import CALM, SETTINGS_JSON, Desk, values
from typer.testing import CliRunner

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.commands import app
from server.audit.reading.labels import Label
from server.audit.reading.query import AuditQuery
from server.audit.store.store import Store
from server.decision.record import hash_of
from server.journal.journal_file import JournalFile, JournalReader
from server.journal.reply_status import heard, unconfirmed
from server.models.archive import ModelStore
from server.rpc.reading import Replays

DECIDED: Final = pb.REASON_CODE_RULES_PASSED
AS_DECIDED, LATE, WITHDRAWN, CANCELLED, KILLED, AFTER_ALL = (f"decision-{number:05}" for number in range(6))
HEARD: Final = {
    AS_DECIDED: (audit_pb2.HEARD_ACTION_TRADE, [DECIDED], "caller heard TRADE"),
    LATE: (
        audit_pb2.HEARD_ACTION_ABSTAIN,
        [DECIDED, pb.REASON_CODE_AUDIT_LATE],
        "caller heard ABSTAIN (AUDIT_LATE); decided TRADE",
    ),
    WITHDRAWN: (
        audit_pb2.HEARD_ACTION_NO_TRADE,
        [DECIDED, pb.REASON_CODE_TRADING_HALTED],
        "caller heard NO_TRADE (withdrawn: TRADING_HALTED); decided TRADE",
    ),
    CANCELLED: (audit_pb2.HEARD_ACTION_NOTHING, [], "caller heard nothing (cancelled); decided TRADE"),
    KILLED: (audit_pb2.HEARD_ACTION_UNKNOWN, [], "not known what the caller heard (killed); decided TRADE"),
    AFTER_ALL: (audit_pb2.HEARD_ACTION_TRADE, [DECIDED], "caller heard TRADE"),
}
"""Of each decision, all of which were TRADE: the action and reasons that were heard, and the title for people."""
LISTED: Final = {
    "trade": [AFTER_ALL, AS_DECIDED],
    "no_trade": [WITHDRAWN],
    "abstain": [LATE],
    "nothing": [CANCELLED],
    "unknown": [KILLED],
}
"""What a list finds by what was heard, the newest first."""
NOTES: Final = (
    unconfirmed(LATE, "audit_late", pb.ACTION_ABSTAIN, HEARD[LATE][1]),
    unconfirmed(WITHDRAWN, "withdrawn", pb.ACTION_NO_TRADE, HEARD[WITHDRAWN][1]),
    unconfirmed(CANCELLED, "cancelled"),
    unconfirmed(KILLED, "killed"),
    unconfirmed(AFTER_ALL, "deadline"),
    heard(AFTER_ALL),
)


@dataclass(frozen=True)
class Audit:
    """A database and a journal that together hold a decision of each kind."""

    database_url: str
    journal: Path

    def run(self, *arguments: str, width: int = 200) -> str:
        env = {"COLUMNS": str(width), "PRETRADE_DATABASE_URL": self.database_url}
        result = CliRunner().invoke(app, arguments, env=env | {"PRETRADE_JOURNAL__PATH": str(self.journal)})
        assert result.exit_code == 0, result.output
        return result.output

    def listed(self, *options: str) -> list[str]:
        lines = self.run("list", "--json", *options).splitlines()
        return [json.loads(line)["packet"]["decision"]["decision_id"] for line in lines]


def ship(database_url: str, path: Path) -> None:
    """Ships what the journal holds."""
    with closing(Store(database_url)) as store, closing(JournalReader(path)) as journal:
        store.migrate()
        head = store.shipped(journal.journal_id, journal.anchor())
        if rows := journal.rows_after(head.position, -1):
            assert store.write(journal.journal_id, head, rows)


@pytest.fixture(scope="module", params=["together", "each by itself"])
def decisions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The entries of the decisions, in one of their own or in one for all, and of their settings."""

    async def decide(desk: Desk) -> None:
        for number in range(len(HEARD)):
            await desk.decide(values(0, **CALM), idempotency_key=f"key-{number}")

    desk = Desk(tmp_path_factory.mktemp("desk"))
    asyncio.run(decide(desk))
    settings = packet_pb2.SettingsInForce(config_hash=hash_of(SETTINGS_JSON), settings_json=SETTINGS_JSON)
    entries = [packet_pb2.JournalEntry(settings=settings)]
    packets = list(desk.packets.values())
    assert {packet.decision.action for packet in packets} == {pb.ACTION_TRADE}
    groups = [packets] if request.param == "together" else [[packet] for packet in packets]
    entries += [together(group) for group in groups]
    return [entry.SerializeToString() for entry in entries]


@pytest.fixture(params=["everything", "the decisions", "nothing", "the notes of another process"])
def audit(request: pytest.FixtureRequest, audit_url: str, tmp_path: Path, decisions: list[bytes]) -> Iterator[Audit]:
    """After so much was shipped."""
    path = tmp_path / "journal.db"
    with closing(Store(audit_url)) as store:
        store.migrate()
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append(decisions)
        match request.param:
            case "everything":
                journal.append(NOTES)
                ship(audit_url, path)
            case "the decisions":
                ship(audit_url, path)
                journal.append(NOTES)
            case "nothing":
                journal.append(NOTES)
            case _:
                # The process that answered the repeats of the calls has another journal, which is shipped.
                repeats = {NOTES[1], NOTES[5]}
                journal.append([note for note in NOTES if note not in repeats])
                other = path.with_name(f"{path.name}.0")
                with closing(JournalFile(other, sync_commits=False)) as another:
                    another.append([note for note in NOTES if note in repeats])
                ship(audit_url, other)
        yield Audit(audit_url, path)


def names(decisions: Iterable[audit_pb2.AuditedDecision]) -> list[str]:
    return [one.packet.decision.decision_id for one in decisions]


def test_what_the_service_reads_says_what_was_heard_and_lists_by_it(audit: Audit) -> None:
    with closing(AuditQuery(audit.database_url, audit.journal)) as query:
        replays = Replays(query, ModelStore([]))
        for decision_id, (action, reasons, title) in HEARD.items():
            found = query.get(decision_id)
            assert (found.heard_action, list(found.heard_reasons)) == (action, reasons)
            assert found.packet.decision.action == pb.ACTION_TRADE
            replayed = replays.replay(decision_id)
            assert replayed.equal
            assert (title in replayed.facts) == (decision_id not in {AS_DECIDED, AFTER_ALL})
        for name, ids in LISTED.items():
            action = audit_pb2.HeardAction.Value(f"HEARD_ACTION_{name.upper()}")
            page = query.page(audit_pb2.DecisionFilter(heard_actions=[action]), 0, "")
            assert names(page.decisions) == ids
            for one in page.decisions:
                expected = HEARD[one.packet.decision.decision_id]
                assert (one.heard_action, list(one.heard_reasons)) == expected[:2]


def test_pages_of_what_was_heard_go_on_where_the_page_before_ended(audit: Audit) -> None:
    wanted = audit_pb2.DecisionFilter(
        heard_actions=[audit_pb2.HEARD_ACTION_TRADE, audit_pb2.HEARD_ACTION_ABSTAIN, audit_pb2.HEARD_ACTION_UNKNOWN]
    )
    with closing(AuditQuery(audit.database_url, audit.journal)) as query:
        found, token = [], ""
        for _ in range(4):
            page = query.page(wanted, 1, token)
            found += names(page.decisions)
            token = page.next_page_token
    assert (found, token) == ([AFTER_ALL, KILLED, LATE, AS_DECIDED], "")


def test_a_list_finds_decisions_by_what_was_heard_and_by_what_was_decided(audit: Audit) -> None:
    for name, ids in LISTED.items():
        assert audit.listed("--action", name) == ids
    assert audit.listed("--decided", "trade") == sorted(HEARD, reverse=True)
    assert audit.listed("--decided", "abstain") == []
    assert audit.listed("--decided", "trade", "--action", "abstain", "--action", "nothing") == [CANCELLED, LATE]


def test_tables_and_titles_say_what_was_heard(audit: Audit) -> None:
    heading, *lines = (re.split(" {2,}", line.strip()) for line in audit.run("list").splitlines())
    decision, heard, decided = map(heading.index, ("decision", "heard", "decided"))
    assert {line[decision]: (line[heard], line[decided]) for line in lines} == {
        AS_DECIDED: ("TRADE", "TRADE"),
        LATE: ("ABSTAIN (AUDIT_LATE)", "TRADE"),
        WITHDRAWN: ("NO_TRADE (withdrawn: TRADING_HALTED)", "TRADE"),
        CANCELLED: ("nothing (cancelled)", "TRADE"),
        KILLED: ("unknown (killed)", "TRADE"),
        AFTER_ALL: ("TRADE", "TRADE"),
    }
    for decision_id, (action, reasons, title) in HEARD.items():
        assert audit.run("show", decision_id, width=80).splitlines()[0].strip() == title
        shown = json.loads(audit.run("show", decision_id, "--json"))
        assert shown["heard_action"] == audit_pb2.HeardAction.Name(action)
        assert shown["heard_reasons"] == [pb.ReasonCode.Name(reason) for reason in reasons]
        assert title in audit.run("replay", decision_id)


def test_a_replay_counts_what_was_heard_and_changes_no_reply(audit: Audit) -> None:
    line = "callers heard: TRADE 2, NO_TRADE 1, ABSTAIN 1, nothing 1, unknown 1"
    causes = {"audit_late 1", "withdrawn 1", "cancelled 1", "killed 1"}
    for options in ((), ("--threshold", "0.5")):
        (found,) = (one for one in audit.run("replay", *options).splitlines() if one.startswith("callers heard: "))
        counts, _, others = found.partition("; 4 not, or perhaps not, what was decided: ")
        assert (counts, set(others.split(", "))) == (line, causes)
    output = audit.run("replay", "--threshold", "0.5")
    assert "6 with the same action, 0 different" in output
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in output.splitlines() if row.startswith("│")]
    assert table == [
        ["TRADE", "2", "0", "0", "0", "0"],
        ["NO_TRADE", "0", "1", "0", "0", "0"],
        ["ABSTAIN", "0", "0", "1", "0", "0"],
        ["nothing", "0", "0", "0", "1", "0"],
        ["unknown", "0", "0", "0", "0", "1"],
    ]
    assert audit.run("replay", "--action", "abstain").startswith("1 decisions, 1 replayed")


def test_exports_and_labels_count_a_trade_only_if_it_was_heard(audit: Audit, tmp_path: Path) -> None:
    for journal in (audit.journal, audit.journal.with_name(f"{audit.journal.name}.0")):
        if journal.exists():
            ship(audit.database_url, journal)
    audit.run("export", "--since", "2023-11-14", "--until", "2023-11-14", "--to", str(tmp_path / "cold"))
    files = f"{tmp_path}/cold/day=*/*/*.parquet"
    rows = duckdb.execute(f"SELECT decision_id, heard_action, heard_reasons, action FROM '{files}'").fetchall()
    assert {row[0]: row[1:] for row in rows} == {
        decision_id: (
            audit_pb2.HeardAction.Name(action).removeprefix("HEARD_ACTION_"),
            [pb.ReasonCode.Name(reason).removeprefix("REASON_CODE_") for reason in reasons],
            "TRADE",
        )
        for decision_id, (action, reasons, _) in HEARD.items()
    }
    with closing(AuditQuery(audit.database_url, None)) as query:
        good = {AS_DECIDED, LATE, CANCELLED}
        query.add_labels([Label(one, 1.0, one in good) for one in HEARD], 5.0)
    report = json.loads(audit.run("label", "--horizon", "5", "--json"))["all"]
    assert report["coverage"] == pytest.approx(2 / 6)
    assert report["precision"] == pytest.approx(1 / 2)
