"""Reading the audit wherever it is by now: the database, and what only the journals hold yet.

Decisions come newest first, by id: ids are time-ordered. A journal's part are the rows after the last one shipped, so a
page is the merge of descending sequences, and nothing is missing while rows move from one to the other: the journals
are read first, and what is shipped meanwhile is in both.
"""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
import operator
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2, packet_pb2
from server.audit.reading import filters
from server.audit.reading.changes import list_changes
from server.audit.reading.journals import (
    DISORDER,
    Journals,
    audited,
    matching,
    may_hold_decided,
    may_hold_heard,
    newest_unshipped,
    set_reply,
    unshipped_others,
)
from server.audit.reading.stored import decisions_of, matching_as_stored, matching_by_news
from server.audit.store import outcomes
from server.audit.store.newest import Bounds
from server.audit.store.schema import DECISIONS
from server.audit.store.store import Store
from server.decision.ids import id_bound, made_at
from server.errors import AuditUnavailableError, InvalidRequestError, OutcomeConflictError, UnknownDecisionError
from server.journal.entries import decision_ids, entry_of, keyed_ids, packet_of
from server.journal.journal_file import Head, JournalReader, Kind, Row
from server.journal.ranges import Range
from server.journal.reply_status import AS_DECIDED, NOT_SETTLED, SAY_OF_REPLIES, Reply, Statuses

if TYPE_CHECKING:
    from server.audit.reading.labels import Label, LabelledDecision

DEFAULT_PAGE: Final = 50
LARGEST_PAGE: Final = 500
_LONGEST_ID: Final = 64
_ENTRIES: Final = 100
"""Of a journal that are read at once."""
_PARTS: Final = 120
"""Of the time that a sample is spread over: 7.5 s each of 15 minutes. Each is a query of the database."""
_AWAY_SECONDS: Final = 2.0
"""How long a database that was away is not asked again."""


class AuditQuery:
    """Answers questions about the audit; used by one thread.

    A database that cannot be reached leaves the journals, and the other way round.

    Args:
        database_url: SQLAlchemy URL; None for the journals alone.
        journal_path: The journal, those of all places with it; None for the database alone.
        monotonic: Seconds on a clock that never jumps.

    Raises:
        ValueError: The URL is malformed.
    """

    def __init__(
        self,
        database_url: str | None,
        journal_path: Path | None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = None if database_url is None else Store(database_url)
        self._monotonic = monotonic
        self._away: sa.exc.OperationalError | None = None
        self._away_until = 0.0
        self.journals: Final = Journals(journal_path)
        """The journals' part, for who watches."""

    def close(self) -> None:
        """Closes every connection."""
        if self._store is not None:
            self._store.close()

    def get(self, decision_id: str) -> audit_pb2.AuditedDecision:
        """One decision.

        Raises:
            UnknownDecisionError: It is not there.
            AuditUnavailableError: It may be where we cannot look.
        """
        if not 0 < len(decision_id) <= _LONGEST_ID:
            raise UnknownDecisionError("no decision has an empty or a very long id")
        problems: list[str] = []
        shipped = self._shipped()
        news = self.journals.naming(decision_id, SAY_OF_REPLIES, shipped, problems)
        # A decision that was just made is in no day yet: the journals are asked before all other days.
        found = self._find_stored(decision_id, problems, any_day=False)
        if found is None:
            found = self.journals.find(decision_id, {} if problems else shipped, problems)
            if found is None:
                found = self._find_stored(decision_id, problems, any_day=True)
            else:  # what was said of its reply meanwhile
                news += self.journals.naming(decision_id, SAY_OF_REPLIES, shipped, problems)
        if found is not None:
            statuses = Statuses()
            for entry in news:
                statuses.add(entry)
            self._add_repeats(statuses, (decision_id,))
            if (reply := statuses.of(decision_id)) is not None:
                set_reply(found, reply)
            return found
        if problems:
            raise AuditUnavailableError("; ".join(dict.fromkeys(problems)))
        raise UnknownDecisionError(f"no decision {decision_id} in the audit")

    def newest(
        self, wanted: audit_pb2.DecisionFilter, limit: int, incomplete: Callable[[str], object] = lambda _: None
    ) -> Iterator[audit_pb2.AuditedDecision]:
        """The newest decisions that match, page by page; `incomplete` is called with what cannot be read.

        Raises:
            InvalidRequestError: The filter breaks a rule.
            AuditUnavailableError: There is nothing that can be read.
        """
        token = ""
        while limit > 0:
            page = self.page(wanted, min(limit, LARGEST_PAGE), token)
            if page.incomplete:
                incomplete(page.incomplete)
            yield from page.decisions
            limit -= len(page.decisions)
            token = page.next_page_token
            if not token:
                return

    def spread(
        self,
        wanted: audit_pb2.DecisionFilter,
        limit: int,
        incomplete: Callable[[str], object] = lambda _: None,
        rest: Callable[[], object] = lambda: None,
    ) -> list[packet_pb2.DecisionPacket]:
        """Decisions that match, spread evenly over the time from `wanted.since` to `wanted.until`, the newest first.

        That time is cut into 120 equal parts, and as many decisions are taken of each, its newest ones. The newest of
        the whole time may all be of its last seconds.

        Args:
            wanted: The filter, with both instants.
            limit: Most decisions.
            incomplete: Called with what cannot be read.
            rest: Called before each part is read from the database.

        Raises:
            InvalidRequestError: The filter breaks a rule.
            AuditUnavailableError: There is nothing that can be read.
        """
        since, until = filters.instants(wanted)
        filters.check_text(wanted)
        if since is None or until is None or since >= until:
            raise InvalidRequestError("filter: must have a since before its until")
        count = min(_PARTS, limit)
        each = limit // count
        # A part is found by its ids, which are ordered by time: no row outside it is looked at.
        edges = [id_bound(since + (until - since) * number / count) for number in range(count + 1)]
        problems: list[str] = []
        parts: list[dict[str, packet_pb2.DecisionPacket]] = [{} for _ in range(count)]
        readable = False
        read = partial(_newest_by_part, wanted, Bounds("", since, until), edges, each, self._shipped())
        for packets in self.journals.each(read, problems):
            readable = True
            for part, found in zip(parts, packets, strict=True):
                part.update(found)
        for part, end in zip(parts, edges[1:], strict=True):
            rest()
            stored = self._stored(wanted, Bounds(before=end, since=since), each, Statuses(), problems)
            if stored is None:
                break
            readable = True
            part.update((one.packet.decision.decision_id, one.packet) for one in stored)
        if not readable:
            raise AuditUnavailableError("; ".join(problems) or "there is neither database nor journal")
        if problems:
            incomplete("; ".join(problems))
        chosen = (
            packet
            for part, begin in zip(parts, edges, strict=False)
            for decision_id, packet in heapq.nlargest(each, part.items())
            if decision_id >= begin
        )
        return sorted(chosen, key=lambda packet: packet.decision.decision_id, reverse=True)

    def page(self, wanted: audit_pb2.DecisionFilter, size: int, token: str) -> audit_pb2.ListDecisionsResponse:
        """One page of the decisions that match, the newest first.

        Raises:
            InvalidRequestError: Filter, size or token break a rule.
            AuditUnavailableError: There is nothing that can be read.
        """
        if not 0 <= size <= LARGEST_PAGE:
            raise InvalidRequestError(f"page_size: must be 1 to {LARGEST_PAGE}, or 0 for {DEFAULT_PAGE}, not {size}")
        size = size or DEFAULT_PAGE
        before = filters.read_token(token)
        since, until = filters.instants(wanted)
        filters.check_text(wanted)
        problems: list[str] = []
        shipped = self._shipped()
        replies = self._replies(shipped, problems)
        bounds = Bounds(before, since, until)
        tails = self._tails(wanted, bounds, size + 1, shipped, replies, problems)
        stored = self._stored(wanted, bounds, size + 1, replies.statuses, problems)
        incomplete = "; ".join(dict.fromkeys(problems))
        if stored is None and not tails:
            raise AuditUnavailableError(incomplete or "there is neither database nor journal")
        recent = (one for tail in tails for one in tail)
        found = {one.packet.decision.decision_id: one for one in (*recent, *(stored or ()))}
        ids = sorted(found, reverse=True)
        return audit_pb2.ListDecisionsResponse(
            decisions=[found[one] for one in ids[:size]],
            next_page_token=filters.token(ids[size - 1]) if len(ids) > size else "",
            incomplete=incomplete,
        )

    def changes(self, request: admin_pb2.ListChangesRequest) -> admin_pb2.ListChangesResponse:
        """One page of the changes that operators made, the newest first. Raises as `list_changes` does."""
        return list_changes(request, self._store, self.journals, self._shipped())

    def settings(self, config_hash: str) -> packet_pb2.SettingsInForce | None:
        """The settings with this hash, or None."""
        if self._store is not None:
            with suppress(sa.exc.SQLAlchemyError), self._database() as store, store.connect() as connection:
                found = outcomes.find_settings(connection, config_hash)
                if found is not None:
                    return found
        return self.journals.find_settings(config_hash)

    def packet(self, decision_id: str) -> packet_pb2.DecisionPacket | None:
        """The packet of a decision, or None."""
        try:
            return self.get(decision_id).packet
        except (UnknownDecisionError, AuditUnavailableError):
            return None

    def outcomes(self, decision_id: str) -> list[packet_pb2.Outcome]:
        """What was reported of a decision, the oldest first.

        While the database is away the journals alone can tell, of decisions that all of them reach back to: those since
        it went, and some before.

        Raises:
            AuditUnavailableError: There may be more where we cannot look.
        """
        problems: list[str] = []
        found: dict[str, packet_pb2.Outcome] = {}
        reported = partial(self.journals.naming, decision_id, (Kind.OUTCOME,))
        news = reported(self._shipped(), problems)
        if self._store is not None:
            try:
                with self._database() as store, store.connect() as connection:
                    found = {one.reporter: one for one in outcomes.find_outcomes(connection, decision_id)}
            except sa.exc.SQLAlchemyError as error:
                if not self.journals.reach_back_to(decision_id):
                    raise AuditUnavailableError(f"the database: {_line(error)}") from error
                news = reported({}, problems)  # also what was shipped before it went
        if problems:
            raise AuditUnavailableError("; ".join(problems))
        for entry in news:
            if entry.outcome.decision_id == decision_id:
                found.setdefault(entry.outcome.reporter, entry.outcome)
        return sorted(found.values(), key=lambda outcome: outcome.recorded_at_ns)

    def labelled(
        self, since: dt.datetime | None, until: dt.datetime | None, horizon_seconds: float
    ) -> list[LabelledDecision]:
        """The decisions of a time that have a label; none without a database.

        Raises:
            AuditUnavailableError: The database cannot be read.
        """
        from server.audit.reading.labels import LabelledDecision  # noqa: PLC0415 - the feature engine

        columns = DECISIONS.c
        query = (
            sa.select(
                columns.heard_action, columns.source, columns.score, outcomes.LABELS.c.eligible, columns.decision_id
            )
            .join_from(DECISIONS, outcomes.LABELS, columns.decision_id == outcomes.LABELS.c.decision_id)
            .where(outcomes.LABELS.c.horizon_seconds == horizon_seconds)
        )
        bounds = Bounds(since=since, until=until)
        # Without the ids' bounds all labels would be read.
        query = query.where(*bounds.of_times(), *bounds.of_ids(outcomes.LABELS.c.decision_id))
        with self.connected() as connection:
            return [LabelledDecision(*row) for row in connection.execute(query)]

    @contextmanager
    def connected(self) -> Iterator[sa.Connection]:
        """A connection to the database, for what journals do not hold.

        Raises:
            AuditUnavailableError: The database cannot be read, or there is none.
        """
        if self._store is None:
            raise AuditUnavailableError("this is in the database, and there is none here")
        try:
            with self._database() as store, store.connect() as connection:
                yield connection
        except sa.exc.SQLAlchemyError as error:
            raise AuditUnavailableError(f"the database: {_line(error)}") from error

    def add_labels(self, labels: Iterable[Label], horizon_seconds: float) -> None:
        """Stores labels; one that is there already is left as it is.

        Raises:
            AuditUnavailableError: The database cannot be written, or there is none.
        """
        if self._store is None:
            raise AuditUnavailableError("labels go into the database, and there is none here")
        rows = [
            {
                "decision_id": label.decision_id,
                "horizon_seconds": horizon_seconds,
                "markout_bps": label.markout_bps,
                "eligible": label.eligible,
            }
            for label in labels
        ]
        try:
            with self._database() as store:
                store.add_labels(rows)
        except sa.exc.SQLAlchemyError as error:
            raise AuditUnavailableError(f"the database: {_line(error)}") from error

    def recorded(self, outcome: packet_pb2.Outcome) -> packet_pb2.Outcome | None:
        """The same outcome as it was recorded before; None when there is none of this reporter.

        Raises:
            UnknownDecisionError, AuditUnavailableError: As `get`.
            OutcomeConflictError: The reporter said something else.
        """
        self.get(outcome.decision_id)
        before = next((one for one in self.outcomes(outcome.decision_id) if one.reporter == outcome.reporter), None)
        if before is not None and not outcomes.same_outcome(before, outcome):
            raise OutcomeConflictError(f"{outcome.reporter} recorded another outcome of {outcome.decision_id} before")
        return before

    @contextmanager
    def _database(self) -> Iterator[Store]:
        """The database, unless it was away a moment ago: every attempt may take seconds.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: It is away, or refuses.
        """
        assert self._store is not None
        if self._away is not None and self._monotonic() < self._away_until:
            raise self._away
        try:
            yield self._store
            self._away = None
        except sa.exc.OperationalError as error:
            self._away, self._away_until = error, self._monotonic() + _AWAY_SECONDS
            raise

    def _find_stored(self, decision_id: str, problems: list[str], *, any_day: bool) -> audit_pb2.AuditedDecision | None:
        if self._store is None or "\0" in decision_id:
            return None
        try:
            with self._database() as store:
                stored = store.find(decision_id, any_day=any_day)
        except sa.exc.SQLAlchemyError as error:
            problems.append(f"the database: {_line(error)}")
            return None
        if stored is None:
            return None
        return next(decisions_of((stored,)))

    def _replies(self, shipped: Mapping[str, Head], problems: list[str]) -> _Replies:
        """What the journals say of replies beyond the database. To be read before the decisions that it is about."""
        known = _Replies(Statuses(), {})

        def read(journal: JournalReader) -> None:
            known.settled[journal.journal_id] = journal.settled()
            for row in unshipped_others(journal, shipped, SAY_OF_REPLIES):
                known.statuses.add(entry_of(row.entry))

        list(self.journals.each(read, problems))
        self._add_repeats(known.statuses, known.statuses.ids())
        return known

    def _tails(
        self,
        wanted: audit_pb2.DecisionFilter,
        bounds: Bounds,
        limit: int,
        shipped: Mapping[str, Head],
        replies: _Replies,
        problems: list[str],
    ) -> list[list[audit_pb2.AuditedDecision]]:
        """What each journal holds beyond the database: the newest decisions that match."""

        def read(journal: JournalReader) -> list[audit_pb2.AuditedDecision]:
            may_hold = replies.may_hold(wanted, journal.journal_id, is_asked=bool(shipped))
            rows = newest_unshipped(journal, shipped, wanted, bounds, may_hold)
            found: list[tuple[str, int, Reply, Row, packet_pb2.JournalEntry]] = []
            # The database may have been away for hours: no more is read than the page needs.
            while some := list(itertools.islice(rows, _ENTRIES)):
                self._add_repeats(replies.statuses, [one for _, entry in some for one in keyed_ids(entry)])
                for row, entry in some:
                    ids, reply_to = decision_ids(entry), partial(replies.of, journal.journal_id, row.position)
                    for number, reply in matching(wanted, entry, reply_to):
                        if not bounds.before or ids[number] < bounds.before:
                            found.append((ids[number], number, reply, row, entry))
                found = heapq.nlargest(limit, found, key=operator.itemgetter(0))
                if len(found) == limit and _is_older(some[-1][1], found[-1][0]):
                    break
            return [
                audited(packet_of(entry, number), row, number, reply, "journal", journal.journal_id)
                for _, number, reply, row, entry in found
            ]

        return list(self.journals.each(read, problems))

    def _add_repeats(self, statuses: Statuses, decision_ids: Collection[str]) -> None:
        """What the database knows of decisions that may still be in a journal: what repeats heard elsewhere."""
        if self._store is not None:
            with suppress(sa.exc.SQLAlchemyError), self._database() as store:
                statuses.add_repeats(store.repeats(decision_ids))

    def _shipped(self) -> dict[str, Head]:
        """How far each journal was shipped; nothing when the database cannot say."""
        if self._store is not None:
            with suppress(sa.exc.SQLAlchemyError), self._database() as store:
                return store.journals()
        return {}

    def _stored(
        self,
        wanted: audit_pb2.DecisionFilter,
        bounds: Bounds,
        limit: int,
        statuses: Statuses,
        problems: list[str],
    ) -> list[audit_pb2.AuditedDecision] | None:
        """What the database holds; None when it cannot be read."""
        if self._store is None:
            return None
        try:
            with self._database() as store:
                found = list(matching_as_stored(store, wanted, bounds, limit, statuses))
                if wanted.heard_actions:
                    found += matching_by_news(store, wanted, bounds, limit, statuses)
        except sa.exc.SQLAlchemyError as error:
            problems.append(f"the database: {_line(error)}")
            return None
        return found


@dataclass(frozen=True, slots=True)
class _Replies:
    """What became of replies, as the journals say it beyond the database."""

    statuses: Statuses
    settled: dict[str, int]
    """Up to which position of each journal it is known of every decision."""

    def of(self, journal_id: str, position: int, decision_id: str) -> Reply:
        """What became of the reply to a decision of a journal."""
        if (reply := self.statuses.of(decision_id)) is not None:
            return reply
        return AS_DECIDED if position <= self.settled.get(journal_id, 0) else NOT_SETTLED

    def may_hold(self, wanted: audit_pb2.DecisionFilter, journal_id: str, *, is_asked: bool) -> Callable[[Range], bool]:
        """Whether a filter may let any decision of a range through.

        Args:
            wanted: The filter.
            journal_id: The ranges are of this journal.
            is_asked: Whether the database may know what repeats of their calls heard of decisions here.
        """
        if not wanted.heard_actions:
            return partial(may_hold_decided, wanted)
        settled = self.settled.get(journal_id, 0)
        replies = ((one, self.statuses.of(one)) for one in self.statuses.ids())
        otherwise = sorted(one for one, reply in replies if reply and reply.heard_action in wanted.heard_actions)

        def may_hold(known: Range) -> bool:
            return may_hold_decided(wanted, known) and (
                (is_asked and known.has_keys) or may_hold_heard(wanted, known, settled, otherwise)
            )

        return may_hold


def _newest_by_part(
    wanted: audit_pb2.DecisionFilter,
    bounds: Bounds,
    edges: Sequence[str],
    each: int,
    shipped: Mapping[str, Head],
    journal: JournalReader,
) -> list[dict[str, packet_pb2.DecisionPacket]]:
    """What a journal holds beyond the database: of every part between two of these ids the newest that match."""
    newest: list[dict[str, packet_pb2.DecisionPacket]] = [{} for _ in edges[1:]]

    def may_hold(known: Range) -> bool:
        """As if every caller had heard what was decided: that is what is looked for here."""
        return may_hold_decided(wanted, known) and may_hold_heard(wanted, known, known.last, ())

    for _, entry in newest_unshipped(journal, shipped, wanted, bounds, may_hold):
        ids = decision_ids(entry)
        for number, _ in reversed(matching(wanted, entry, lambda _: AS_DECIDED)):
            part = bisect_right(edges, ids[number]) - 1
            if 0 <= part < len(newest) and len(newest[part]) < each:
                newest[part][ids[number]] = packet_of(entry, number)
    return newest


def _is_older(entry: packet_pb2.JournalEntry, decision_id: str) -> bool:
    """True when no earlier row of an entry's journal can hold an id as great as this one."""
    at = made_at(decision_id)
    newest = max(decision_ids(entry), default="")
    return at is not None and bool(newest) and newest < id_bound(at - DISORDER)


def _line(error: sa.exc.SQLAlchemyError) -> str:
    """One line, without the statement and its parameters."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
