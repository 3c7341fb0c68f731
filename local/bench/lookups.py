"""`pretrade bench-lookups`: how long the audit takes to find decisions among many millions of a single day.

The rows are made in PostgreSQL itself, with columns and entries of the sizes of real ones: 32 decisions became
durable together, and share a hash and an entry of the journal, as they do under load. They are all of one day, since
the day's partition is what a look-up with a time searches. The questions are asked as the server asks them.
Everything is made in a database of its own, which is dropped in the end.
"""

from __future__ import annotations

import datetime as dt
import json as json_module
import random
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg import sql
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from local.bench.journal_entries import entry_of_rows, id_of, of_time, pairs_of
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.query import AuditQuery
from server.audit.store.days import summarize
from server.audit.store.store import Store
from server.canary.pairs import MOST_IN_ENTRY
from server.journal.journal_file import GENESIS, Head, JournalFile

T = TypeVar("T")

_ENTRY_ROWS: Final = 32
"""Decisions of one entry: one batch of 64 callers."""
_INSTRUMENTS: Final = 20
"""Different ones in an entry of a journal; the first ones twice."""
_PAIRS_EACH: Final = MOST_IN_ENTRY // _ENTRY_ROWS
"""Entries after which there is one with scores of their decisions."""
_APPENDED: Final = 500
"""Entries of decisions that are written to a journal at once."""
_CHUNK_ROWS: Final = 8_000 * _ENTRY_ROWS
_ROW_BYTES: Final = 950
"""On the disk, with indexes: what the largest number of rows is computed from."""
_LEFT_BYTES: Final = 5 * 2**30
_RARE_ROWS: Final = 40
_GETS: Final = 300
_REPEATS: Final = 5
_PAGE_ROWS: Final = 50
_JOURNAL: Final = "0123456789abcdef" * 2
_FILL: Final = """
WITH made AS MATERIALIZED (
    SELECT i, %(day)s::timestamptz + interval '1 day' * (i / %(rows)s::float8) AS at
    FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS i
), timed AS MATERIALIZED (
    SELECT i, at, lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') AS hex FROM made
), named AS MATERIALIZED (
    SELECT i, at, substr(hex, 1, 8) || '-' || substr(hex, 9) || '-7000-8000-' || lpad(to_hex(i), 12, '0') AS id,
        i / %(entry_rows)s::bigint + 1 AS position, min(at) OVER (PARTITION BY i / %(entry_rows)s::bigint) AS shipped_at
    FROM timed
), evidence AS (
    INSERT INTO journal_entries (journal_id, position, entry, hash, shipped_at)
    SELECT %(journal)s::text, position,
        %(before_ids)s::bytea || string_agg(%(tag)s::bytea || convert_to(id, 'UTF8'), ''::bytea ORDER BY i)
            || %(after_ids)s::bytea,
        sha256(int8send(position)), shipped_at
    FROM named GROUP BY position, shipped_at
)
INSERT INTO decisions (decision_id, decided_at, order_ref, instrument, side, quantity, limit_price, strategy, action,
    score, threshold, source, reasons, degradations, model_name, model_version, feature_age_us, used_us, allowed_us,
    instance_id, config_hash, durability, reply_status, heard_action, heard_reasons, journal_id, journal_position,
    journal_row, shipped_at)
SELECT id, at,
    'order-' || lpad(i::text, 12, '0'),
    CASE WHEN i %% %(rare)s::bigint = 5 THEN 'RARE.VENUE' ELSE 'COIN' || i %% 20 || 'USDT.BINANCE' END,
    CASE WHEN i %% 2 = 0 THEN 'BUY' ELSE 'SELL' END, 0.25, CASE WHEN i %% 3 = 0 THEN 100.5 END,
    CASE WHEN i %% %(rare)s::bigint = 7 THEN 'rare' WHEN i %% 100000 = 11 THEN 'one in 100,000'
         WHEN i %% 10000 = 13 THEN 'one in 10,000' WHEN i %% 1000 = 17 THEN 'one in 1,000'
         ELSE 'strategy-' || i %% 8 END,
    CASE WHEN i %% %(rare)s::bigint = 23 THEN 'ABSTAIN' WHEN i %% 2 = 0 THEN 'TRADE' ELSE 'NO_TRADE' END,
    0.75, 0.6, CASE WHEN i %% %(rare)s::bigint = 29 THEN 'RULES' ELSE 'PRIMARY' END,
    '["SCORE_BELOW_THRESHOLD"]', '[]', 'champion',
    CASE WHEN i %% %(rare)s::bigint = 31 THEN 'ffffffffffffffff' ELSE '0123456789abcdef' END, 15000, 2500, 25000,
    'server-1/1', 'c0ffee00c0ffee00', 'fsync', 'replied',
    CASE WHEN i %% %(rare)s::bigint = 23 THEN 'ABSTAIN' WHEN i %% 2 = 0 THEN 'TRADE' ELSE 'NO_TRADE' END,
    '["SCORE_BELOW_THRESHOLD"]', %(journal)s::text, position, i %% %(entry_rows)s::bigint, shipped_at
FROM named
"""


@dataclass(frozen=True, slots=True)
class LookUp:
    """How long one question took; milliseconds."""

    question: str
    found: int
    """Decisions in the answer."""
    first: float
    """Of the first time, when little of it is in memory."""
    median: float
    slowest: float


def run_lookup_bench(given: Mapping[str, Any], rows: int, journal_gib: float, json: Path | None) -> int:
    """Makes the rows, measures, prints and returns the exit code.

    Args:
        given: Settings of the stack.
        rows: Decisions in the database; fewer if the disk cannot hold them.
        journal_gib: Size of a journal that is read without a database.
        json: File for the figures.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        url = stack.endpoints.database_url
        assert url is not None
        room = max(0, shutil.disk_usage(settings.dir).free - _LEFT_BYTES) // _ROW_BYTES
        if room < rows:
            console.print(f"the disk has room for {room:,} decisions")
        with database(url) as own:
            day = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            number = min(rows, room)
            size = _fill(own, day, number, console)
            with closing(AuditQuery(own, None)) as query:
                figures = [_gets(query, day, number), *_lists(query, day)]
        console.print(_table(figures, f"{number:,} decisions of one day, {size / 2**30:.1f} GiB"))
        journal = settings.dir / "lookups.sqlite"
        try:
            number = _fill_journal(journal, day, journal_gib, console)
            with closing(AuditQuery(None, journal)) as query:
                of_journal = [_gets(query, day, number), *_lists_of_journal(query, day)]
        finally:
            for left in settings.dir.glob(f"{journal.name}*"):
                left.unlink()
        console.print(_table(of_journal, f"{number:,} decisions that are in a journal alone, {journal_gib:g} GiB"))
        if json is not None:
            json.parent.mkdir(parents=True, exist_ok=True)
            figures_by_place = {"database": figures, "journal": of_journal}
            as_json = {place: [asdict(one) for one in some] for place, some in figures_by_place.items()}
            json.write_text(json_module.dumps(as_json, indent=2) + "\n")
        return OK

    return run_with_stack(given, use, parts={"postgres"})


@contextmanager
def database(url: str) -> Iterator[str]:
    """The URL of an empty database on the same server, dropped in the end."""
    admin, name = _libpq(url), f"lookups_{uuid.uuid4().hex}"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _libpq(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _fill(url: str, day: dt.datetime, rows: int, console: Console) -> int:
    """Makes the rows as shipping would have left them; returns how many bytes they fill."""
    with closing(Store(url)) as store:
        store.migrate()
        store.shipped(_JOURNAL, Head(0, GENESIS))
        store.prepare_days(0)  # today's
    values: dict[str, Any] = {"day": day, "rows": rows, "journal": _JOURNAL, "rare": max(50, rows // _RARE_ROWS)}
    values |= {"entry_rows": _ENTRY_ROWS} | _entry_around_its_ids()
    began = time.monotonic()
    engine = sa.create_engine(url)
    with psycopg.connect(_libpq(url), autocommit=True) as connection:
        for first in range(0, rows, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, rows) - 1
            connection.execute(_FILL, values | {"first": first, "last": last})
            summarize(engine, {day.date()})  # as the shipper does every minute
        console.print(f"{rows:,} rows made in {time.monotonic() - began:.0f} s")
        connection.execute("VACUUM (ANALYZE) decisions, journal_entries")  # as autovacuum does while rows arrive
        size = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    engine.dispose()
    assert size is not None
    return int(size[0])


def _fill_journal(path: Path, day: dt.datetime, gib: float, console: Console) -> int:
    """Writes a journal of a day's decisions as servers do, each entry of 32, with the scores of a challenger for all.

    Returns:
        How many decisions it holds.
    """
    entry = entry_of_rows(_ENTRY_ROWS, _INSTRUMENTS)
    rare = packet_pb2.JournalEntry()
    rare.CopyFrom(entry)
    rare.decisions.orders[-1].strategy = "rare"  # of one decision
    pairs = pairs_of(0, MOST_IN_ENTRY, MOST_IN_ENTRY, day)
    entries = int(gib * 2**30 / (len(entry.SerializeToString()) + len(pairs) / _PAIRS_EACH))
    each = max(2, entries // _RARE_ROWS)
    decisions = entries * _ENTRY_ROWS
    began = time.monotonic()

    def written(number: int) -> Iterator[bytes]:
        yield of_time(rare if number % each == 1 else entry, number, decisions, day)
        if (number + 1) % _PAIRS_EACH == 0:
            yield pairs_of((number + 1 - _PAIRS_EACH) * _ENTRY_ROWS, MOST_IN_ENTRY, decisions, day)

    with closing(JournalFile(path, sync_commits=False)) as journal:
        for first in range(0, entries, _APPENDED):
            some = range(first, min(first + _APPENDED, entries))
            journal.append([one for number in some for one in written(number)])
            journal.checkpoint()
    console.print(f"a journal of {decisions:,} decisions written in {time.monotonic() - began:.0f} s")
    return decisions


def _lists_of_journal(query: AuditQuery, day: dt.datetime) -> Iterator[LookUp]:
    tomorrow, noon = day + dt.timedelta(days=1), day + dt.timedelta(hours=12)
    minutes = noon + dt.timedelta(minutes=10)
    yield _listed(query, "no filter", day, tomorrow, {})
    yield _listed(query, "no filter, until noon", day, noon, {})
    yield _listed(query, "no filter, ten minutes", noon, minutes, {})
    yield _listed(query, "a strategy without rows, ten minutes", noon, minutes, {"strategies": ["unheard of"]})
    yield _listed(query, "a strategy without rows", day, tomorrow, {"strategies": ["unheard of"]})
    yield _listed(query, "a rare strategy", day, tomorrow, {"strategies": ["rare"]})
    yield _listed(
        query, "a heard action without rows", day, tomorrow, {"heard_actions": [audit_pb2.HEARD_ACTION_ABSTAIN]}
    )


def _entry_around_its_ids() -> dict[str, bytes]:
    """The bytes of an entry: what stands before and after its column of ids, and an id's tag."""
    entry = entry_of_rows(_ENTRY_ROWS)
    before, tag, *_, after = entry.SerializeToString().split(entry.decisions.decision_id[0].encode())
    return {"before_ids": before.removesuffix(tag), "tag": tag, "after_ids": after}


def _gets(query: AuditQuery, day: dt.datetime, rows: int) -> LookUp:
    chance = random.Random(1)  # noqa: S311 - the same ids in every run
    numbers = [chance.randrange(rows) for _ in range(_GETS)]

    def get(number: int) -> float:
        decision_id = id_of(number, rows, day)
        taken, found = _timed(lambda: query.get(decision_id))
        assert found is not None
        assert found.packet.decision.decision_id == decision_id
        return taken

    taken = [get(number) for number in numbers]
    return LookUp(f"GetDecision, {_GETS} ids", 1, taken[0], statistics.median(taken), max(taken[1:]))


def _lists(query: AuditQuery, day: dt.datetime) -> Iterator[LookUp]:
    questions: dict[str, dict[str, Any]] = {
        "no filter": {},
        "a common strategy": {"strategies": ["strategy-3"]},
        "a strategy, one in 1,000": {"strategies": ["one in 1,000"]},
        "a strategy, one in 10,000": {"strategies": ["one in 10,000"]},
        "a strategy, one in 100,000": {"strategies": ["one in 100,000"]},
        f"a rare strategy, {_RARE_ROWS} rows": {"strategies": ["rare"]},
        "two strategies, both rare": {"strategies": ["rare", "unheard of"]},
        "a strategy without rows": {"strategies": ["unheard of"]},
        "a rare action": {"heard_actions": [audit_pb2.HEARD_ACTION_ABSTAIN]},
        "a rare source": {"sources": [pb.SOURCE_RULES]},
        "a rare model version": {"model": "f" * 16},
        "a rare instrument": {"instruments": ["RARE.VENUE"]},
        "a rare strategy and a common instrument": {"strategies": ["rare"], "instruments": ["COIN7USDT.BINANCE"]},
    }
    for name, restriction in questions.items():
        yield _listed(query, name, day, day + dt.timedelta(days=1), restriction)
    noon = day + dt.timedelta(hours=12)
    yield _listed(query, "no filter, until noon", day, noon, {})
    yield _listed(query, "no filter, ten minutes", noon, noon + dt.timedelta(minutes=10), {})
    yield _listed(
        query, "a rare strategy, ten minutes", noon, noon + dt.timedelta(minutes=10), {"strategies": ["rare"]}
    )


def _listed(
    query: AuditQuery, name: str, since: dt.datetime, until: dt.datetime, restriction: dict[str, Any]
) -> LookUp:
    wanted = audit_pb2.DecisionFilter(**restriction)
    wanted.since.FromDatetime(since)
    wanted.until.FromDatetime(until)
    runs = [_timed(lambda: len(query.page(wanted, _PAGE_ROWS, "").decisions)) for _ in range(_REPEATS)]
    taken = [seconds for seconds, _ in runs]
    return LookUp(f"list: {name}", runs[0][1], taken[0], statistics.median(taken), max(taken[1:]))


def _timed(ask: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    found = ask()
    return (time.perf_counter() - began) * 1e3, found


def _table(figures: list[LookUp], title: str) -> Table:
    table = Table(title=title, box=SIMPLE)
    table.add_column("question")
    for name in ("found", "first ms", "median ms", "slowest ms"):
        table.add_column(name, justify="right")
    for one in figures:
        times = (f"{value:,.1f}" for value in (one.first, one.median, one.slowest))
        table.add_row(one.question, str(one.found), *times)
    return table
