"""Reading decisions from the audit's database, with what the journals say of their replies since."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from pretrade.audit.v1 import audit_pb2, packet_pb2
from server.audit.reading import filters
from server.audit.reading.journals import audited, matches, matches_heard, set_reply
from server.audit.store.newest import Bounds
from server.audit.store.store import Store, StoredDecision
from server.journal.entries import entry_of, packet_of
from server.journal.reply_status import Statuses

_CHUNK: Final = 1_000
"""Decisions that the database is asked about at once."""


def matching_as_stored(
    store: Store, wanted: audit_pb2.DecisionFilter, bounds: Bounds, limit: int, statuses: Statuses
) -> Iterator[audit_pb2.AuditedDecision]:
    """The newest decisions of the database that match, also by what the journals say of their replies since."""
    while limit > 0:
        rows = list(decisions_of(store.newest(filters.conditions(wanted), limit, bounds)))
        full = len(rows) == limit
        for one in rows:
            decision_id = one.packet.decision.decision_id
            bounds = replace(bounds, before=decision_id)
            reply = statuses.of(decision_id)
            if reply is not None:
                if not matches_heard(wanted, one.packet.decision.action, reply):
                    continue
                set_reply(one, reply)
            limit -= 1
            yield one
        if not full:
            return


def matching_by_news(
    store: Store, wanted: audit_pb2.DecisionFilter, bounds: Bounds, limit: int, statuses: Statuses
) -> Iterator[audit_pb2.AuditedDecision]:
    """The newest decisions of the database that match because of what the journals say of their replies since."""
    ids = iter(sorted((one for one in statuses.ids() if not bounds.before or one < bounds.before), reverse=True))
    while limit > 0 and (some := list(itertools.islice(ids, _CHUNK))):
        for one in decisions_of(store.find_all(some)):
            reply = statuses.of(one.packet.decision.decision_id)
            if reply is not None and matches(wanted, one.packet, reply):
                set_reply(one, reply)
                limit -= 1
                yield one


def decisions_of(stored: Iterable[StoredDecision]) -> Iterator[audit_pb2.AuditedDecision]:
    """Decisions in the contract's words. An entry that holds many of them is parsed once."""
    entries: dict[tuple[str, int], packet_pb2.JournalEntry] = {}
    for one in stored:
        key = (one.journal_id, one.row.position)
        if key not in entries:
            entries[key] = entry_of(one.row.entry)
        packet = packet_of(entries[key], one.number)
        yield audited(packet, one.row, one.number, one.reply, "database", one.journal_id)
