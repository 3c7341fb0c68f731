"""Checking that nothing in the audit was changed, and that nothing is missing.

A hash chain by itself shows what was changed in its middle. It does not show that its end was cut off, that rows are
gone between what was shipped and what the journal still holds, or that a journal was exchanged for another. Therefore
every chain is held against its *anchors*: what the database has of it, how far its server said that it had come (with
the database and on the topic, see `server/audit/shipping/heads.py`), and which journal was written at the same place
before.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.heads import VerifyingKey, slot_of
from server.audit.store.store import Shipped, Store
from server.errors import JournalCorruptedError, JournalError
from server.journal.journal_file import Head, JournalReader, Point, journals_of
from server.machine import REAL


@dataclass(frozen=True, slots=True)
class Verified:
    """A stretch of a journal that is as it was written."""

    where: str
    """`database` or `journal`."""
    journal_id: str
    first: int
    """First position; 0 when there are no rows."""
    last: int
    compared: tuple[str, ...] = ()
    """The anchors that it fits, for people."""
    checkpoint: int = 0
    """Rows up to this position were only counted: they were verified before. 0 without a checkpoint."""


@dataclass(frozen=True, slots=True)
class Open:
    """A journal that cannot be verified from here: it is open on another host, or it was written off."""

    journal_id: str
    what: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A place that could not be checked, which proves nothing about it."""

    where: str
    why: str


@dataclass(frozen=True, slots=True)
class Unremembered:
    """It could not be noted what was verified, as where the database may only be read. The audit is none the worse."""

    why: str


Finding = Verified | Open | Unreachable | Unremembered


@dataclass(frozen=True, slots=True)
class _Request:
    database_url: str | None
    journal: Path | None
    full: bool
    key: VerifyingKey | None
    topic_heads: Sequence[packet_pb2.JournalHead]


def verify(
    database_url: str | None,
    journal_path: Path | None,
    *,
    full: bool = False,
    key: VerifyingKey | None = None,
    topic_heads: Sequence[packet_pb2.JournalHead] = (),
) -> Iterator[Finding]:
    """Walks every hash chain in the database and the journals, and holds them against all anchors.

    Args:
        database_url: SQLAlchemy URL; None: no database.
        journal_path: The journal, those of all places with it; None: none.
        full: Also what was verified before. Otherwise the database's rows up to the last checkpoint are only counted.
        key: Heads must be signed by it; None: signatures are not looked at.
        topic_heads: What was found on the topic. Read before this is called, none is newer than what is read here.

    Raises:
        JournalCorruptedError: A row is missing or was changed; with its journal and the first such position.
        JournalError: A journal cannot be read.
    """
    request = _Request(database_url, journal_path, full, key, topic_heads)
    heads = _by_journal(request)
    known: dict[str, Shipped] = {}
    store = None if database_url is None else Store(database_url)
    try:
        if store is not None:
            try:
                for shipped in store.shipments():
                    known[shipped.journal_id] = shipped
                    yield _verify_stored(store, shipped, request, heads.get(shipped.journal_id))
            except sa.exc.SQLAlchemyError as error:
                yield Unreachable("database", _first_line(error))
                store.close()
                store, known = None, {}
        here = set()
        for path in _existing(journal_path):
            with closing(JournalReader(path)) as journal:
                here.add(journal.journal_id)
                yield _verify_journal(journal, store, known.get(journal.journal_id), heads.get(journal.journal_id))
        if journal_path is not None and not here and not known:
            raise JournalError(f"there is no journal {journal_path}")
        if store is not None:
            yield from _account_for_absent(request, known, heads, here)
            yield from _remember(store, known)
    except sa.exc.SQLAlchemyError as error:  # it went away meanwhile
        yield Unreachable("database", _first_line(error))
    finally:
        if store is not None:
            store.close()


def _remember(store: Store, known: Mapping[str, Shipped]) -> Iterator[Unremembered]:
    try:
        for shipped in known.values():
            store.remember_verified(shipped.journal_id, shipped.head)
    except sa.exc.SQLAlchemyError as error:
        yield Unremembered(_first_line(error))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _by_journal(request: _Request) -> Mapping[str, packet_pb2.JournalHead]:
    """The furthest head of each journal on the topic."""
    heads: dict[str, packet_pb2.JournalHead] = {}
    for head in request.topic_heads:
        _check_signature(head, request.key)
        if head.journal_id not in heads or head.position > heads[head.journal_id].position:
            heads[head.journal_id] = head
    return heads


def _check_signature(head: packet_pb2.JournalHead, key: VerifyingKey | None) -> None:
    if key is not None and not key.has_signed(head):
        who = f"signed by key {head.key_id}" if head.key_id else "not signed"
        raise JournalCorruptedError(head.position, f"its stated head is {who}, not by {key.key_id}", head.journal_id)


def _verify_stored(
    store: Store, shipped: Shipped, request: _Request, on_topic: packet_pb2.JournalHead | None
) -> Verified:
    """What the database has of a journal."""
    compared = []
    try:
        checkpoint = None if request.full else store.checkpoint(shipped)
        since = None if checkpoint is None else checkpoint.head
        first, last = store.verify(shipped.journal_id, since)
        if shipped.missed and not shipped.missed_written_off:
            gone = (
                f"missing, like every row up to {shipped.missed}: gone from the journal before they were shipped here"
            )
            raise JournalCorruptedError(1, gone)
        if shipped.stated is not None:
            _check_signature(shipped.stated, request.key)
        for head, what in ((shipped.stated, "stated with the database"), (on_topic, "published on the topic")):
            if head is not None and _is_stored(store, shipped, head, what):
                compared.append(_described(head, what))
    except JournalCorruptedError as error:
        again = next((one for one in store.shipments() if one.journal_id == shipped.journal_id), shipped)
        if again.anchor != shipped.anchor:  # old days were removed meanwhile
            return _verify_stored(store, again, request, on_topic)
        raise JournalCorruptedError(error.position, f"{error.problem} (database)", shipped.journal_id) from error
    if since is not None and not first:
        first = last = since.position
    return Verified(
        "database", shipped.journal_id, first, last, tuple(compared), 0 if since is None else since.position
    )


def _is_stored(store: Store, shipped: Shipped, head: packet_pb2.JournalHead, what: str) -> bool:
    """True when a head that the server stated is among the rows in the database, as it must be where they reach so far.

    Raises:
        JournalCorruptedError: Another row is in its place.
    """
    if not shipped.anchor.position < head.position <= shipped.head.position:
        return False
    if store.hash_at(shipped.journal_id, head.position) != head.hash:
        raise JournalCorruptedError(head.position, f"not what was {what}")
    return True


def _described(head: packet_pb2.JournalHead, what: str) -> str:
    signed = f", signed by {head.key_id}" if head.key_id else ""
    return f"row {head.position} {what}{signed}{', closed' if head.closed else ''}"


def _verify_journal(
    journal: JournalReader, store: Store | None, shipped: Shipped | None, on_topic: packet_pb2.JournalHead | None
) -> Verified:
    """What a journal here holds, and whether it continues what the database has."""
    points, compared = [], []
    if shipped is not None:
        points.append(Point(shipped.head, "shipped"))
        compared.append(f"row {shipped.head.position} shipped")
        if shipped.stated is not None:
            points.append(Point(Head(shipped.stated.position, shipped.stated.hash), "stated with the database"))
            compared.append(_described(shipped.stated, "stated with the database"))
    if on_topic is not None:
        points.append(Point(Head(on_topic.position, on_topic.hash), "published on the topic"))
        compared.append(_described(on_topic, "published on the topic"))
    try:
        anchor, head = journal.verify(points)
    except JournalCorruptedError as error:
        raise JournalCorruptedError(error.position, error.problem, journal.journal_id) from error
    if store is not None:
        # What was read of the database before may be older than the journal's last trim.
        newest = next((one for one in store.shipments() if one.journal_id == journal.journal_id), None)
        stored = 0 if newest is None else newest.head.position
        if stored < anchor.position:
            gone = f"missing, like every row up to {anchor.position}: in neither the database nor the journal"
            raise JournalCorruptedError(stored + 1, gone, journal.journal_id)
    return Verified(
        "journal", journal.journal_id, anchor.position + 1 if head != anchor else 0, head.position, tuple(compared)
    )


def _existing(journal: Path | None) -> list[Path]:
    return [] if journal is None else [path for path in journals_of(journal) if path.exists()]


def _account_for_absent(
    request: _Request,
    known: Mapping[str, Shipped],
    heads: Mapping[str, packet_pb2.JournalHead],
    here: set[str],
) -> Iterator[Open]:
    """Says of every journal that is not here where its end is; raises where that is lost."""
    for journal_id in sorted(heads.keys() - known.keys() - here):
        gone = f"missing, like every row up to {heads[journal_id].position}: published on the topic, and nowhere else"
        raise JournalCorruptedError(1, gone, journal_id)
    followed = {}
    for shipped in known.values():
        followed[shipped.predecessor_id] = shipped.journal_id
        if shipped.stated is not None:  # by a server, and perhaps signed
            followed[shipped.stated.predecessor_id] = shipped.journal_id
    for journal_id in sorted(followed.keys() - known.keys() - here - {""}):
        gone = f"missing, like all its rows: the journal {followed[journal_id]} followed it, and nobody has it"
        raise JournalCorruptedError(1, gone, journal_id)
    for shipped in known.values():
        if shipped.missed:
            yield Open(
                shipped.journal_id, f"the rows up to {shipped.missed} were given up: {shipped.missed_written_off}"
            )
    for shipped in known.values():
        journal_id, stored = shipped.journal_id, shipped.head.position
        said = [head for head in (shipped.stated, heads.get(journal_id)) if head is not None]
        last = max((head.position for head in said), default=0)
        whole = any(head.closed and head.position == stored == last for head in said)
        if journal_id in here or whole or not shipped.slot:
            continue
        if shipped.written_off:
            yield Open(journal_id, f"what followed row {stored} was given up: {shipped.written_off}")
        elif journal_id not in followed and not _belongs_here(shipped.slot, request.journal):
            heard = "" if shipped.stated is None else f", last heard of at {_instant(shipped.stated.stated_at_ns)}"
            rows = f"{max(0, last - stored)} rows not shipped yet"
            yield Open(journal_id, f"is open at {shipped.slot}, where alone its end can be checked: {rows}{heard}")
        elif last > stored:
            gone = f"missing, like every row up to {last}: stated, never shipped, and the journal is gone"
            raise JournalCorruptedError(stored + 1, gone, journal_id)
        else:
            gone = f"missing, with whatever followed: the journal at {shipped.slot} was never closed, and is gone"
            raise JournalCorruptedError(stored + 1, gone, journal_id)


def _instant(nanoseconds: int) -> str:
    return f"{dt.datetime.fromtimestamp(nanoseconds / 1e9, dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _belongs_here(slot: str, journal: Path | None) -> bool:
    """True when the journal that is written there would be among those looked at."""
    if journal is None:
        return False
    ours = slot_of(journal, REAL.host_name())
    return slot == ours or slot.startswith(f"{ours}.")
