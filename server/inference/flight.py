"""One batch under way to a model server: what is sent, and what its rows get when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from fallback.block import Scores
from server.inference.outcome import Outcome
from server.inference.rows import Row, RowBlock, Scored
from server.inference.wire import ScoreBatch

_SLICE_ROWS: Final = 32
"""Shadow rows after which the next ones get their scores in another turn of the event loop. Comparing a row by itself
takes several microseconds, so a whole batch in one turn would hold up every order for milliseconds."""

Report = Callable[[Outcome, float], None]
"""Reports a batch's outcome and its time in seconds."""


class Flight:
    """One batch under way."""

    __slots__ = (
        "abandoned",
        "count",
        "divisible",
        "report",
        "rows",
        "scored",
        "shadow",
        "started",
        "timer",
        "traceparent",
    )

    def __init__(
        self, rows: Sequence[Row | RowBlock], started: float, report: Report, divisible: bool, shadow: bool
    ) -> None:
        self.rows = rows
        self.count = sum(map(len, rows))
        """Of the rows."""
        self.traceparent = rows[0].traceparent if isinstance(rows[0], Row) else ""
        """Of the call."""
        self.started = started
        self.shadow = shadow
        """True when no caller waits for its rows."""
        self.report: Report | None = report
        """None once its parts report in its place."""
        self.divisible = divisible
        """True when it may be split: a part may not."""
        self.abandoned = False
        self.timer: asyncio.TimerHandle | None = None
        self.scored = 0
        """Rows that got a score while somebody waited for it."""

    def payloads(self) -> list[bytes]:
        """Of the rows, in their sequence."""
        payloads: list[bytes] = []
        for row in self.rows:
            if isinstance(row, Row):
                payloads.append(row.payload)
            else:
                payloads += row.payloads
        return payloads

    async def hand_out(self, answer: ScoreBatch, now: float) -> Outcome:
        """Gives each row its score; an unusable one fails its own row only. BAD_ANSWER when none was usable.

        Those that callers wait for get theirs at once, shadow rows a few in each turn of the event loop.
        """
        given = _Given(self, answer, now)
        outcome, index, in_turn = Outcome.BAD_ANSWER, 0, 0
        for rows in self.rows:
            if self.shadow and in_turn >= _SLICE_ROWS:
                await asyncio.sleep(0)
                in_turn = 0
            if self._hand_out(given, rows, index) is Outcome.SUCCESS:
                outcome = Outcome.SUCCESS
            index += len(rows)
            in_turn += len(rows)
        return outcome

    def _hand_out(self, given: _Given, rows: Row | RowBlock, index: int) -> Outcome:
        """Gives a row or a block, the first of whose rows has this place in the batch, what it gets."""
        if isinstance(rows, Row):
            return self._hand_out_rows(given, (rows,), index)
        end = index + len(rows)
        if rows.is_whole() and given.are_usable(index, end):
            self.scored += len(rows)
            rows.put_all(given.to_block(index, rows))
            return Outcome.SUCCESS
        if rows.done():  # nobody waits for them any more: it is the answer that is judged
            return Outcome.SUCCESS if given.has_usable(index, end) else Outcome.BAD_ANSWER
        return self._hand_out_rows(given, rows.apart(), index)

    def _hand_out_rows(self, given: _Given, rows: Sequence[Row], first: int) -> Outcome:
        """Gives these rows, of which the first has this place in the batch, their scores."""
        outcome = Outcome.BAD_ANSWER
        for index, row in enumerate(rows, first):
            if not 0.0 <= given.scores[index] <= 1.0:  # also for NaN
                row.resolve(Outcome.BAD_ANSWER)
                continue
            outcome = Outcome.SUCCESS
            if not row.taker.done():
                row.taker.set_result(given.to_row(index, row.queued_at))
                self.scored += 1
        return outcome


class _Given:
    """What a model server has given the rows of a batch, which is back now, in monotonic seconds."""

    __slots__ = ("_answer", "_count", "_parts", "_seconds", "_started", "_traceparent", "scores")

    def __init__(self, flight: Flight, answer: ScoreBatch, now: float) -> None:
        self.scores: list[float] = answer.scores.tolist()
        """Of the rows, not yet checked."""
        self._answer = answer
        self._parts: list[list[float]] | None = None if answer.of_parts is None else answer.of_parts.tolist()
        # Not the batch itself: its rows know their blocks, and those keep this.
        self._count, self._started, self._traceparent = flight.count, flight.started, flight.traceparent
        self._seconds = now - flight.started

    def are_usable(self, first: int, end: int) -> bool:
        """Whether all of these scores are."""
        scores = self._answer.scores[first:end]
        return bool(scores.min() >= 0.0 and scores.max() <= 1.0)  # both are NaN where a score is

    def has_usable(self, first: int, end: int) -> bool:
        """Whether one of them is."""
        return any(0.0 <= score <= 1.0 for score in self.scores[first:end])

    def to_row(self, index: int, queued_at: float) -> Scored:
        """What the row at this place gets, which is usable."""
        model, queued = self._answer.model, self._started - queued_at
        parts = () if self._parts is None else tuple(self._parts[index])
        return Scored(self.scores[index], model, self._count, index, self._seconds, queued, self._traceparent, parts)

    def to_block(self, first: int, rows: RowBlock) -> Scores:
        """The same for the rows of a block, which begin at this place."""
        end, queued_at = first + len(rows), rows.queued_at
        return Scores(
            self.scores[first:end],
            self._answer.model,
            self._count,
            first,
            None if self._parts is None else self._parts[first:end],
            lambda place: self.to_row(first + place, queued_at),
        )


class Split:
    """A batch that failed as a whole and is sent once more in parts. To the breaker it stays one batch.

    SUCCESS as soon as a part succeeds: the replica is sound and some of the rows are not. Its own failure when every
    part has ended and none did, so a model that is really broken counts as it would without the split.
    """

    __slots__ = ("_open_parts", "_outcome", "_report", "_seconds", "_settled")

    def __init__(self, report: Report, outcome: Outcome, seconds: float, parts: int) -> None:
        self._report = report
        self._outcome = outcome
        self._seconds = seconds
        self._open_parts = parts
        self._settled = False

    def part_ended(self, outcome: Outcome, seconds: float) -> None:
        """Counts one part's outcome."""
        self._open_parts -= 1
        if self._settled:
            return
        if outcome is Outcome.SUCCESS:
            self._settled = True
            self._report(outcome, seconds)
        elif not self._open_parts:
            self._settled = True
            self._report(self._outcome, self._seconds)
