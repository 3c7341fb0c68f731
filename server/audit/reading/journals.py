"""The journals of a server, one of each of its processes, read together beside their writers."""

from __future__ import annotations

import datetime as dt
import itertools
import re
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading import filters
from server.audit.store.newest import Bounds
from server.errors import AuditUnavailableError, InvalidRequestError, JournalError
from server.journal.entries import decision_ids, entry_of, packet_of
from server.journal.journal_file import Head, JournalReader, Kind, Row, journals_of
from server.journal.ranges import Range
from server.journal.reply_status import AS_DECIDED, NOT_SETTLED, SAY_OF_REPLIES, Reply, Statuses

T = TypeVar("T")

_PLACE: Final = r"[0-9a-f]{32}:[0-9]{1,18}(?:\+[0-9]{1,9})?"
_CURSOR: Final = re.compile(rf"{_PLACE}(?:,{_PLACE}){{0,199}}")
_WATCHED_ROWS: Final = 250
"""Entries of a journal that one step of a watch looks at, and decisions that it tells, so that no step is long."""
_CHUNK: Final = 1_000
DISORDER: Final = dt.timedelta(seconds=10)
"""By how much the time in an id may be before that in an id of an earlier row."""
_NEAR_ROWS: Final = 100
"""How far from the place of its id a decision is looked for at first: as many are decided at once, at most."""


class _Place(NamedTuple):
    """How far a watch has come in a journal."""

    position: int
    """All entries up to this one."""
    told: int = 0
    """So many decisions of the next one."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a watch got to see at once."""

    events: list[audit_pb2.WatchDecisionsResponse]
    """What matched."""
    cursor: str
    """Where to go on."""
    more: bool
    """True when there are rows left to look at."""


class Journals:
    """Reads the journals of a server; used by one thread.

    Args:
        path: Where the server keeps its journal, or those of its processes (`<path>.<i>`); None: there is none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def each(self, read: Callable[[JournalReader], T], problems: list[str]) -> Iterator[T]:
        """What `read` makes of each journal; one that cannot be read is added to `problems` instead."""
        for path in [] if self._path is None else journals_of(self._path):
            try:
                with closing(JournalReader(path)) as journal:
                    yield read(journal)
            except (JournalError, sqlite3.Error, OSError) as error:
                problems.append(f"the journal {path.name}: {error}")

    def find(
        self, decision_id: str, shipped: Mapping[str, Head], problems: list[str]
    ) -> audit_pb2.AuditedDecision | None:
        """A decision that a journal holds beyond some heads, without what later entries say of its reply."""

        def read(journal: JournalReader) -> audit_pb2.AuditedDecision | None:
            settled = journal.settled()
            row = _find(journal, decision_id, _shipped_through(journal, shipped))
            if row is None:
                return None
            entry = entry_of(row.entry)
            number = list(decision_ids(entry)).index(decision_id)
            reply = AS_DECIDED if row.position <= settled else NOT_SETTLED
            return audited(packet_of(entry, number), row, number, reply, "journal", journal.journal_id)

        return next(filter(None, self.each(read, problems)), None)

    def naming(
        self, decision_id: str, kinds: Sequence[Kind], shipped: Mapping[str, Head], problems: list[str]
    ) -> list[packet_pb2.JournalEntry]:
        """What the journals say of a decision beyond some heads, in rows of these kinds, in order."""
        wanted = decision_id.encode()

        def read(journal: JournalReader) -> list[packet_pb2.JournalEntry]:
            rows = unshipped_others(journal, shipped, kinds)
            return [entry_of(row.entry) for row in rows if wanted in row.entry]

        return [entry for news in self.each(read, problems) for entry in news]

    def reach_back_to(self, decision_id: str) -> bool:
        """True when every journal holds all that was written to it since a decision: ids are time-ordered."""
        problems: list[str] = []

        def read(journal: JournalReader) -> bool:
            anchor = journal.anchor().position
            each = (decision_ids(entry_of(row.entry)) for row in _rows_after(journal, anchor))
            oldest = next(filter(None, each), None)
            return anchor == 0 or (oldest is not None and min(oldest) <= decision_id)

        return all(list(self.each(read, problems))) and not problems

    def find_settings(self, config_hash: str) -> packet_pb2.SettingsInForce | None:
        """The settings with this hash, which a server writes down when it starts; None when no journal holds them."""
        wanted = config_hash.encode()

        def read(journal: JournalReader) -> packet_pb2.SettingsInForce | None:
            rows = journal.others_after(journal.anchor().position, (Kind.SETTINGS,))
            found = (entry_of(row.entry).settings for row in rows if wanted in row.entry)
            return next((one for one in found if one.config_hash == config_hash), None)

        return next(filter(None, self.each(read, [])), None)

    def after(self, wanted: audit_pb2.WatchDecisionsRequest) -> Step:
        """What the journals hold beyond a cursor, some rows of it.

        Raises:
            InvalidRequestError: The cursor is not one, or the filter breaks a rule.
            AuditUnavailableError: No journal can be read.
        """
        filters.instants(wanted.filter)
        positions = _positions(wanted.cursor)
        anew = not positions
        events: list[audit_pb2.WatchDecisionsResponse] = []
        problems: list[str] = []

        def add(event: audit_pb2.WatchDecisionsResponse, journal_id: str, place: _Place) -> None:
            positions[journal_id] = place
            event.cursor = _cursor(positions)
            events.append(event)

        def read(journal: JournalReader) -> bool:
            name, anchor = journal.journal_id, journal.anchor().position
            if anew:
                positions[name] = _Place(anchor if wanted.from_oldest else journal.settled())
                return wanted.from_oldest
            # A journal the cursor does not name came later: all that it holds is new.
            position = positions.setdefault(name, _Place(0)).position
            if position < anchor:
                missed = audit_pb2.Missed(journal_id=name, first_position=position + 1, last_position=anchor)
                add(audit_pb2.WatchDecisionsResponse(missed=missed), name, _Place(anchor))
            told = 0
            position = positions[name].position
            rows = journal.settled_rows_after(position, _WATCHED_ROWS)
            statuses = Statuses()
            said = journal.others_until_settled(position, rows[-1].position, SAY_OF_REPLIES) if rows else ()
            for other in said:
                statuses.add(entry_of(other.entry))
            for row in rows:
                entry = entry_of(row.entry)
                for number, reply in matching(wanted.filter, entry, lambda one: statuses.of(one) or AS_DECIDED):
                    if number < positions[name].told:
                        continue
                    decision = audited(packet_of(entry, number), row, number, reply, "journal", name)
                    place = _Place(row.position - 1, number + 1)
                    add(audit_pb2.WatchDecisionsResponse(decision=decision), name, place)
                    told += 1
                if entry.HasField("reply_unconfirmed"):
                    note = audit_pb2.WatchDecisionsResponse(reply_unconfirmed=entry.reply_unconfirmed)
                    add(note, name, _Place(row.position))
                elif entry.HasField("reply_heard"):
                    add(audit_pb2.WatchDecisionsResponse(reply_heard=entry.reply_heard), name, _Place(row.position))
                positions[name] = _Place(row.position)
                if told >= _WATCHED_ROWS:
                    return True
            return bool(rows) and journal.settled() > rows[-1].position

        more = list(self.each(read, problems))
        if not more:
            raise AuditUnavailableError("; ".join(problems) or "there is no journal here")
        return Step(events, _cursor(positions), any(more))


def newest_unshipped(
    journal: JournalReader,
    shipped: Mapping[str, Head],
    wanted: audit_pb2.DecisionFilter,
    bounds: Bounds,
    may_hold: Callable[[Range], bool],
) -> Iterator[tuple[Row, packet_pb2.JournalEntry]]:
    """What a journal holds beyond the database and may match, the last written first.

    Of a large journal only what lies within the bounds is read, of that only the ranges that may hold a match, and the
    caller may stop at any row: ids are time-ordered, but for `DISORDER`. When the wall clock was set back by more, some
    decisions are missing from lists until they are in the database; each is found by its id all the time.

    Args:
        journal: The journal.
        shipped: How far each journal is in the database; all of this one is unshipped when that is not known.
        wanted: Entries without its texts are passed over.
        bounds: Entries beyond them are passed over.
        may_hold: Ranges of which it says no are passed over.
    """
    low, high = _shipped_through(journal, shipped), journal.last_position()
    first, last = bounds.ids(DISORDER)
    if first:
        low = _before(journal, first, low, high)
    if last:
        high = _before(journal, last, low, high)
    texts = [[text.encode() for text in texts] for texts in (wanted.instruments, wanted.strategies) if texts]
    if wanted.model:
        texts.append([wanted.model.encode()])
    for begin, end in _to_read(journal.ranges(low, high), may_hold, low, high):
        for row in _rows_backwards(journal, begin, end):
            # The first look is far cheaper than taking every entry apart: texts stand in an entry as they are.
            if row.holds_decisions() and all(any(text in row.entry for text in some) for some in texts):
                yield row, entry_of(row.entry)


def _to_read(
    ranges: Iterable[Range], may_hold: Callable[[Range], bool], low: int, high: int
) -> Iterator[tuple[int, int]]:
    """What is to be read between two positions, the last first: all that is in no range, or in one that may match."""
    for one in ranges:
        if may_hold(one):
            continue
        if one.last < high:
            yield max(low, one.last), high
        high = min(high, one.first - 1)
    if high > low:
        yield low, high


def _rows_backwards(journal: JournalReader, position: int, last: int) -> Iterator[Row]:
    """The rows after a position through another one, the last first."""
    while last > position:
        reach = max(position, last - _NEAR_ROWS)
        yield from reversed(list(_rows_between(journal, reach, last)))
        last = reach


def may_hold_decided(wanted: audit_pb2.DecisionFilter, known: Range) -> bool:
    """Whether any decision of a range may be one that a filter lets through by what was decided."""
    model = [wanted.model] if wanted.model else []
    return (
        _may_hold(wanted.instruments, known.instruments)
        and _may_hold(wanted.strategies, known.strategies)
        and _may_hold(wanted.decided_actions, known.actions)
        and _may_hold(wanted.sources, known.sources)
        and _may_hold(model, known.models)
    )


def may_hold_heard(
    wanted: audit_pb2.DecisionFilter, known: Range, settled: int, heard_otherwise: Sequence[str]
) -> bool:
    """Whether the caller of any decision of a range may have heard an action that a filter lets through.

    Args:
        wanted: The filter.
        known: The range.
        settled: Up to which position it is known of every decision what its caller heard.
        heard_otherwise: The decisions of which a note says that the caller heard such an action, sorted.
    """
    noted = bisect_left(heard_otherwise, known.oldest_id)
    return (
        _may_hold(wanted.heard_actions, known.actions)
        or (known.last > settled and audit_pb2.HEARD_ACTION_UNKNOWN in wanted.heard_actions)
        or (noted < len(heard_otherwise) and heard_otherwise[noted] <= known.newest_id)
    )


def _may_hold(wanted: Collection[Any], known: Collection[Any] | None) -> bool:
    """Whether a range with these values may hold one that is wanted.

    No range says whether any decision lacks such a part, as those of servers never do: its value is the empty one.
    """
    return not wanted or known is None or any(not value or value in known for value in wanted)


def unshipped_others(journal: JournalReader, shipped: Mapping[str, Head], kinds: Sequence[Kind]) -> Iterator[Row]:
    """What a journal holds beyond the database in rows of some kinds, in order."""
    return journal.others_after(_shipped_through(journal, shipped), kinds)


def _shipped_through(journal: JournalReader, shipped: Mapping[str, Head]) -> int:
    return (shipped.get(journal.journal_id) or journal.anchor()).position


def _find(journal: JournalReader, decision_id: str, after: int) -> Row | None:
    """The row of a decision after a position.

    Ids are time-ordered, and so are rows but for those of the same moment: halving leads close to the row, and it is
    looked for in ever larger steps around that place. Only after the wall clock was set is it anywhere else.
    """
    first, last = max(after, journal.anchor().position), journal.last_position()
    low = _before(journal, decision_id, first, last)
    wanted = decision_id.encode()
    below, above, step = low, low, _NEAR_ROWS
    while below > first or above < last:
        reach = min(last, above + step)
        for row in _rows_between(journal, above, reach):
            if _is_of(row, wanted, decision_id):
                return row
        above, reach = reach, max(first, below - step)
        for row in _rows_between(journal, reach, below):
            if _is_of(row, wanted, decision_id):
                return row
        below, step = reach, 4 * step
    return None


def _before(journal: JournalReader, bound: str, low: int, high: int) -> int:
    """The last position between two, up to which all ids are less than a bound, if they are in order; by halving."""
    last = high
    while low < high:
        middle = (low + high) // 2
        row = journal.decision_after(middle)
        if row is None or row.position > last or max(decision_ids(entry_of(row.entry)), default="") >= bound:
            high = middle
        else:
            low = row.position
    return low


def _is_of(row: Row, wanted: bytes, decision_id: str) -> bool:
    """Whether a row holds this decision. The first look is far cheaper than taking every entry apart."""
    return wanted in row.entry and decision_id in decision_ids(entry_of(row.entry))


def _rows_between(journal: JournalReader, position: int, last: int) -> Iterator[Row]:
    """The rows after a position through another one."""
    while position < last and (rows := journal.rows_after(position, min(_CHUNK, last - position))):
        yield from itertools.takewhile(lambda row: row.position <= last, rows)
        position = rows[-1].position


def _rows_after(journal: JournalReader, position: int) -> Iterator[Row]:
    while rows := journal.rows_after(position, _CHUNK):
        yield from rows
        position = rows[-1].position


def matching(
    wanted: audit_pb2.DecisionFilter, entry: packet_pb2.JournalEntry, reply_to: Callable[[str], Reply]
) -> list[tuple[int, Reply]]:
    """The rows of the decisions in an entry that a filter lets through, with what became of the replies.

    Args:
        wanted: The filter.
        entry: From `entry_of`.
        reply_to: What became of the reply to a decision.
    """
    replies = ((row, action, reply_to(decision_id)) for row, decision_id, action in _rows_of(wanted, entry))
    return [(row, reply) for row, action, reply in replies if matches_heard(wanted, action, reply)]


def matches(wanted: audit_pb2.DecisionFilter, packet: packet_pb2.DecisionPacket, reply: Reply) -> bool:
    """True when a filter lets a decision through."""
    return bool(matching(wanted, packet_pb2.JournalEntry(decision=packet), lambda _: reply))


def matches_heard(wanted: audit_pb2.DecisionFilter, decided: pb.Action.ValueType, reply: Reply) -> bool:
    """True when a filter lets a decision with this action through by what its caller heard."""
    return not wanted.heard_actions or (reply.heard_action or decided) in wanted.heard_actions


def _rows_of(
    wanted: audit_pb2.DecisionFilter, entry: packet_pb2.JournalEntry
) -> Iterator[tuple[int, str, pb.Action.ValueType]]:
    """The rows, ids and actions of the decisions in an entry that a filter lets through by what was decided."""
    if entry.WhichOneof("entry") == "decision":
        packet = entry.decision
        decision = packet.decision
        let_through = _in_time(wanted, decision.decided_at.ToNanoseconds()) and _of_order(wanted, packet.order)
        if let_through and decision.decision_id and _of_answer(wanted, decision):
            yield 0, decision.decision_id, decision.action
        return
    batch = entry.decisions
    orders = [_of_order(wanted, order) for order in (pb.Order(), *batch.orders)]
    decisions = [pb.Decision(), *(answer.decision for answer in batch.answers)]
    answers = [_of_answer(wanted, decision) for decision in decisions]
    columns = zip(batch.order, batch.answer, batch.decided_at_ns, batch.decision_id, strict=True)
    for row, (order, answer, at, decision_id) in enumerate(columns):
        if orders[order] and answers[answer] and _in_time(wanted, at):
            yield row, decision_id, decisions[answer].action


def _in_time(wanted: audit_pb2.DecisionFilter, at_ns: int) -> bool:
    return (not wanted.HasField("since") or at_ns >= wanted.since.ToNanoseconds()) and (
        not wanted.HasField("until") or at_ns < wanted.until.ToNanoseconds()
    )


def _of_order(wanted: audit_pb2.DecisionFilter, order: pb.Order) -> bool:
    return (not wanted.instruments or order.instrument in wanted.instruments) and (
        not wanted.strategies or order.strategy in wanted.strategies
    )


def _of_answer(wanted: audit_pb2.DecisionFilter, decision: pb.Decision) -> bool:
    return (
        (not wanted.decided_actions or decision.action in wanted.decided_actions)
        and (not wanted.sources or decision.source in wanted.sources)
        and (not wanted.model or wanted.model in (decision.model_name, decision.model_version))
    )


def audited(
    packet: packet_pb2.DecisionPacket, row: Row, number: int, reply: Reply, found_in: str, journal_id: str
) -> audit_pb2.AuditedDecision:
    """A decision in the contract's words.

    Args:
        packet: What it says.
        row: The row of the journal with its entry.
        number: Which of the entry's decisions it is, counted from 0.
        reply: What became of the reply.
        found_in: `database` or `journal`.
        journal_id: The journal.
    """
    decision = audit_pb2.AuditedDecision(
        packet=packet, found_in=found_in, journal_id=journal_id, position=row.position, hash=row.hash, row=number
    )
    set_reply(decision, reply)
    return decision


def set_reply(decision: audit_pb2.AuditedDecision, reply: Reply) -> None:
    """Says what became of the reply to a decision."""
    answer = decision.packet.decision
    decision.reply_status = reply.status
    if reply.heard_action:
        decision.heard_action, decision.heard_reasons[:] = reply.heard_action, reply.heard_reasons
    else:
        decision.heard_action = audit_pb2.HeardAction.ValueType(answer.action)
        decision.heard_reasons[:] = answer.reasons


def _cursor(places: Mapping[str, _Place]) -> str:
    return ",".join(
        f"{journal_id}:{place.position}" + (f"+{place.told}" if place.told else "")
        for journal_id, place in places.items()
    )


def _positions(cursor: str) -> dict[str, _Place]:
    if cursor and not _CURSOR.fullmatch(cursor):
        raise InvalidRequestError("cursor: must be that of an event of an earlier watch")
    places = (one.partition(":") for one in cursor.split(",") if one)
    return {name: _Place(*map(int, place.split("+"))) for name, _, place in places}
