"""What the audit says of itself: calibration of the champions, the age of labels, stranded and deserted journals."""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from pretrade.wire.reading import reading_pb2
from server.audit.reading.calibration import Calibration, ScoredLabel, calibration
from server.audit.reading.query import AuditQuery
from server.audit.reading.stranded import stranded
from server.audit.store.outcomes import newest_decision, scored_labels
from server.audit.store.schema import SHIPMENTS
from server.decision.ids import made_at
from server.errors import AuditUnavailableError, JournalError
from server.timing.pace import Pace

_WINDOW: Final = dt.timedelta(days=1)
"""Before the newest label, from which decisions are taken for a model's calibration."""
_PARTS: Final = 120
"""Of that time: of each as many decisions are taken, so that a busy minute does not stand for the day."""
_EACH: Final = 200
"""Decisions of a part; at a thousand a second these are a fifth of a second of every twelve minutes."""
_DESERTED: Final = dt.timedelta(minutes=15)
"""Who ships a journal says every five minutes that it does."""


class AuditCheck:
    """Looks at the audit; used by one thread.

    Args:
        query: The audit.
        journal: Where a server keeps its journal, or those of its processes.
        horizon_seconds: Of the label that a model version has learnt.
        now: The time, UTC.
    """

    def __init__(
        self,
        query: AuditQuery,
        journal: Path,
        horizon_seconds: Callable[[str], float],
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self._query = query
        self._now = now
        self._journal = journal
        self._horizon_seconds = horizon_seconds
        self._known: dict[tuple[str, str], Calibration | None] = {}
        """By version and the newest label at that time: labels come once a day or so."""

    def check(self, champions: Mapping[str, str]) -> reading_pb2.CheckAuditResponse:
        """The answer about these champions, by the name of the model.

        Raises:
            AuditUnavailableError: The database or a journal cannot be read.
        """
        with self._query.connected() as connection:
            known = SHIPMENTS.c
            rows = connection.execute(
                sa.select(known.journal_id, known.position, known.slot, known.stated_head, known.written_off)
            ).all()
            newest, labelled = (newest_decision(connection, labelled=only) for only in (False, True))
        stranded = self._stranded({row.journal_id: row.position for row in rows})
        response = reading_pb2.CheckAuditResponse(stranded=stranded, deserted=dict(self._deserted(rows)))
        made, seen = (None if one is None else made_at(one) for one in (newest, labelled))
        if labelled is None or made is None or seen is None:
            return response
        response.label_lag_seconds = max(0.0, (made - seen).total_seconds())
        keys = {model: (version, labelled) for model, version in champions.items() if version}
        self._known = {key: one for key, one in self._known.items() if key in keys.values()}
        for model, key in keys.items():
            if key not in self._known:
                horizon = self._horizon_seconds(key[0])
                self._known[key] = calibration(list(self._labels(key[0], horizon, seen)), horizon)
            if (found := self._known[key]) is not None:
                response.calibrations[model].CopyFrom(_message(key[0], found))
        return response

    def _stranded(self, shipped: Mapping[str, int]) -> dict[str, int]:
        try:
            return stranded(self._journal, shipped)
        except (JournalError, sqlite3.Error, OSError) as error:
            raise AuditUnavailableError(f"a journal: {error}") from error

    def _deserted(self, rows: Iterable[Any]) -> Iterator[tuple[str, str]]:
        """Journals that were never closed and that nobody ships: id, and where each was written."""
        limit = (self._now() - _DESERTED).timestamp() * 1e9
        for row in rows:
            if row.stated_head is None or row.written_off:
                continue
            head = packet_pb2.JournalHead.FromString(row.stated_head)
            if head.stated_at_ns < limit and not (head.closed and head.position == row.position):
                yield row.journal_id, row.slot or ""

    def _labels(self, version: str, horizon_seconds: float, until: dt.datetime) -> Iterator[ScoredLabel]:
        end = until + dt.timedelta(milliseconds=1)
        edges = [end - _WINDOW * (_PARTS - number) / _PARTS for number in range(_PARTS + 1)]
        pace = Pace()  # nobody waits for it
        for begin, stop in pairwise(edges):
            pace.rest()
            with self._query.connected() as connection:  # no transaction is open while it rests
                rows = list(scored_labels(connection, version, horizon_seconds, begin, stop, _EACH))
            for row in rows:
                at = made_at(row.decision_id)
                if at is not None:
                    yield ScoredLabel(row.instrument, at.timestamp(), row.score, row.eligible)


def _message(version: str, found: Calibration) -> reading_pb2.Calibration:
    return reading_pb2.Calibration(
        model_version=version,
        decisions=found.decisions,
        independent=found.independent,
        predicted=found.predicted,
        observed=found.observed,
        error=found.error,
        limit=found.limit,
    )
