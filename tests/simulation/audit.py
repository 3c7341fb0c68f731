"""What the audit says in the end: every row of every journal, from the database, and what the notes say of it."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.store.schema import JOURNAL_ENTRIES, SHIPMENTS
from server.errors import AuditError
from server.journal.entries import entry_of, packets
from server.journal.journal_file import Head, JournalReader, Point

if TYPE_CHECKING:
    from simulation.scene import Scene


@dataclass(slots=True)
class Row:
    """A decision's row."""

    packet: packet_pb2.DecisionPacket
    journal_id: str
    position: int


@dataclass(slots=True)
class Audit:
    """Everything that the audit holds."""

    decisions: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    """By decision id."""
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Causes for which replies are unconfirmed, by decision id."""
    withdrawn: dict[str, list[tuple[int, tuple[int, ...]]]] = field(default_factory=lambda: defaultdict(list))
    """What repeats were told instead, action and reasons, by decision id."""
    repeated: set[str] = field(default_factory=set)
    """Decisions that a repeat of their call was about to hear."""
    heard: set[str] = field(default_factory=set)
    """Decisions that a repeat of their call heard, whatever the notes say."""
    changes: list[packet_pb2.ControlChange] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What does not verify."""
    rows: int = 0

    def unconfirmed(self, decision_id: str) -> tuple[str, ...]:
        """Why a reply is unconfirmed, the last word last; nothing if it was heard."""
        notes = self.notes.get(decision_id)
        if not notes or decision_id in self.heard:
            return ()
        return (*notes, "repeated") if decision_id in self.repeated else tuple(notes)


def read_audit(scene: Scene) -> Audit:
    """Reads the database, and verifies it and the journals."""
    audit = Audit()
    entries = JOURNAL_ENTRIES.c
    with closing(scene.database.open()) as store:
        with store.connect() as connection:
            query = sa.select(entries.journal_id, entries.position, entries.entry)
            for journal_id, position, packed in connection.execute(
                query.order_by(entries.journal_id, entries.position)
            ):
                _add(audit, journal_id, position, packed)
            shipped = connection.execute(sa.select(SHIPMENTS.c.journal_id)).scalars().all()
        heads = store.journals()
        stated_heads = {one.journal_id: one.stated for one in store.shipments()}
        for journal_id in shipped:
            try:
                store.verify(journal_id)
            except AuditError as error:
                audit.problems.append(f"I2: the database does not verify: {error}")
    for server in scene.servers.values():
        path = server.settings.journal.path
        if server.host.disk.find(str(path)) is None:
            continue
        try:
            with closing(JournalReader(Path(path))) as journal:
                known = heads.get(journal.journal_id)
                points = [] if known is None else [Point(known, "shipped")]
                stated = stated_heads.get(journal.journal_id)
                if stated is not None:
                    points.append(Point(Head(stated.position, stated.hash), "stated"))
                anchor, head = journal.verify(points)
                if known is not None and known.position < anchor.position:
                    audit.problems.append(f"I2: {server.name}'s rows {known.position + 1} on are nowhere")
                if known is not None and known.position < head.position:
                    audit.problems.append(
                        f"drain: {server.name}'s rows {known.position + 1} to {head.position} never reach the database"
                    )
                if known is None and head.position > anchor.position:
                    audit.problems.append(f"drain: {server.name}'s journal never reaches the database")
        except AuditError as error:
            audit.problems.append(f"I2: {server.name}'s journal does not verify: {error}")
    return audit


def _add(audit: Audit, journal_id: str, position: int, packed: bytes) -> None:
    audit.rows += 1
    entry = entry_of(packed)
    for packet in packets(entry):
        audit.decisions[packet.decision.decision_id].append(Row(packet, journal_id, position))
    match entry.WhichOneof("entry"):
        case "reply_unconfirmed":
            note = entry.reply_unconfirmed
            if note.cause == "withdrawn":
                audit.withdrawn[note.decision_id].append((note.heard_action, tuple(note.heard_reasons)))
            elif note.cause == "repeated":
                audit.repeated.add(note.decision_id)
            else:
                audit.notes[note.decision_id].append(note.cause)
        case "reply_heard":
            audit.heard.add(entry.reply_heard.decision_id)
        case "control_change":
            audit.changes.append(entry.control_change)
