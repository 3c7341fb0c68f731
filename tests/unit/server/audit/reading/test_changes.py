"""The history of changes: from the journal, from the database, and while rows move from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from google.protobuf.timestamp_pb2 import Timestamp

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.reading.query import AuditQuery
from server.audit.shipping.leftovers import ship_leftovers
from server.audit.shipping.shipping import ShippingSettings
from server.errors import AuditUnavailableError, InvalidRequestError
from server.journal.journal import Journal, JournalSettings

START_NS = 1_700_000_000_000_000_000
SUBJECTS = ("flag/shadow", "trading_state", "flag/cached_score", "flagstaff", "trading_state")


@pytest.fixture
async def journal(tmp_path: Path) -> Path:
    path = tmp_path / "journal.db"
    async with Journal(JournalSettings(path=path)) as journal:
        for number, subject in enumerate(SUBJECTS):
            change = packet_pb2.ControlChange(
                change_id=f"id-{number}",
                subject=subject,
                previous="a",
                value="b",
                author="ann",
                reason=f"reason {number}",
                changed_at_ns=START_NS + number * 1_000_000_000,
                previous_version=number,
                version=number + 1,
                diff=[f"{subject}: a → b"],
            )
            await journal.append(packet_pb2.JournalEntry(control_change=change).SerializeToString())
            await journal.append(packet_pb2.JournalEntry().SerializeToString())
    return path


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'audit.db'}"


@pytest.fixture
def query(journal: Path, url: str) -> Iterator[AuditQuery]:
    with closing(AuditQuery(url, journal)) as query:
        yield query


def reasons(query: AuditQuery, **asked: object) -> list[int]:
    found = query.changes(admin_pb2.ListChangesRequest(**asked))  # type: ignore[arg-type]
    return [int(change.reason.removeprefix("reason ")) for change in found.changes]


def all_pages(query: AuditQuery, size: int) -> list[int]:
    token, found = "", []
    for _ in range(10):
        page = query.changes(admin_pb2.ListChangesRequest(page_size=size, page_token=token))
        found += [int(change.reason.removeprefix("reason ")) for change in page.changes]
        token = page.next_page_token
        if not token:
            return found
    raise AssertionError("pages without an end")


async def test_it_is_the_same_before_and_after_it_was_shipped(journal: Path, url: str, query: AuditQuery) -> None:
    for _ in ("in the journal", "in the database"):
        assert reasons(query) == [4, 3, 2, 1, 0]
        assert all_pages(query, 2) == all_pages(query, 5) == [4, 3, 2, 1, 0]
        assert reasons(query, subject="flag") == [2, 0]
        assert reasons(query, subject="trading_state") == [4, 1]
        assert reasons(query, since=Timestamp(seconds=START_NS // 10**9 + 3)) == [4, 3]
        (newest,) = query.changes(admin_pb2.ListChangesRequest(page_size=1)).changes
        assert (newest.previous_version, newest.version, list(newest.diff)) == (4, 5, ["trading_state: a → b"])
        await ship_leftovers(journal, url, ShippingSettings())
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM control_changes")).scalar() == 5
    engine.dispose()


async def test_it_outlives_the_evidence_of_its_day(journal: Path, url: str, query: AuditQuery) -> None:
    await ship_leftovers(journal, url, ShippingSettings())
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM journal_entries"))
    engine.dispose()
    (newest, *_) = query.changes(admin_pb2.ListChangesRequest()).changes
    assert (newest.reason, list(newest.diff), newest.changed_at.ToNanoseconds()) == (
        "reason 4",
        ["trading_state: a → b"],
        START_NS + 4_000_000_000,
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"page_size": 1_001},
        {"page_token": "garbage"},
        {"page_token": "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OmE="},
        {"subject": "a\0b"},
        {"since": Timestamp(seconds=-(10**14))},
    ],
)
def test_a_request_that_breaks_a_rule_is_refused(query: AuditQuery, asked: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        reasons(query, **asked)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'no' / 'audit.db'}"
    with closing(AuditQuery(url, None)) as query, pytest.raises(AuditUnavailableError, match="database"):
        reasons(query)
