"""Rows on their way to a model server and back: who waits for each, and what becomes of it."""

from __future__ import annotations

import enum
import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fallback.block import Scores
from server.inference.outcome import Outcome
from server.inference.wire import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from server.timing.deadlines import Deadlines


@dataclass(slots=True)
class Scored:
    """A usable score of one row."""

    score: float
    """In [0, 1]."""
    model: ModelIdentity
    batch_rows: int = field(default=1, compare=False)
    """Rows in the batch that was answered: a matrix product rounds by its shape."""
    batch_index: int = field(default=0, compare=False)
    """This row's place in it."""
    batch_seconds: float = field(default=0.0, compare=False)
    """From the batch's leaving to its answer."""
    queued_seconds: float = field(default=math.nan, compare=False)
    """How long it waited for its batch to leave."""
    call_parent: str = field(default="", compare=False)
    """The `traceparent` that the call carried."""
    part_scores: tuple[float, ...] = field(default=(), compare=False)
    """What each part of the model says."""


Result = Scored | Outcome
"""What a row's taker gets: a score, or why there is none."""


class Lane(enum.Enum):
    """The priority of a row that a caller waits for. Shadow rows come after both lanes."""

    LIVE = "live"
    """An order's, on the model that decides."""
    CANARY = "canary"
    """An order's, on a model on trial: given up before a live row is, since the model that decides can still answer."""


class Taker(Protocol):
    """Who takes a row's result: an `asyncio.Future`, or what is used like one."""

    def done(self) -> bool:
        """True when it has a result, or wants none any more."""
        ...

    def set_result(self, result: Result, /) -> object:
        """Called once at most, and only while it is not done."""
        ...


class BlockTaker(Protocol):
    """Who takes the results of the rows of a block: a `fallback.block.Block`, or what is used like one."""

    missing: int
    """Results that are still to come."""

    def is_left(self) -> bool:
        """True when nobody waits for a result any more."""
        ...

    def has_left(self) -> bool:
        """True when nobody waits for the result of at least one row."""
        ...

    def is_gone(self, place: int) -> bool:
        """True when nobody waits for the result of this row."""
        ...

    def put_all(self, scores: Scores) -> None:
        """Takes the scores of all rows, of which none has a result."""
        ...

    def put(self, place: int, result: Scored) -> None:
        """Takes the score of a row."""
        ...

    def put_failure(self, place: int, result: Result) -> None:
        """Takes the result of a row that got no score."""
        ...


class Row:
    """One encoded row and its taker."""

    __slots__ = ("deadline", "from_caller", "payload", "queued_at", "taker", "traceparent")

    def __len__(self) -> int:
        return 1

    def __init__(
        self,
        payload: bytes,
        deadline: float,
        taker: Taker,
        queued_at: float = math.nan,
        traceparent: str = "",
        from_caller: bool = False,
    ) -> None:
        self.payload = payload
        self.deadline = deadline
        """Monotonic seconds; infinite for a shadow row."""
        self.taker = taker
        self.queued_at = queued_at
        """NaN for a shadow row, which waits on purpose."""
        self.traceparent = traceparent
        self.from_caller = from_caller
        """True for a row with a caller's own features, which may be made to fail."""

    def apart(self) -> list[Row]:
        """See `RowBlock`."""
        return [self]

    def resolve(self, result: Result) -> bool:
        """Gives the taker its result; False when it has gone or its time was up."""
        if self.taker.done():
            return False
        self.taker.set_result(result)
        return True

    def is_worth_sending(self, earliest_useful: float) -> bool:
        """True when a caller waits for it and can still get a score in time; resolves it to TIMEOUT if not."""
        if self.deadline < earliest_useful:
            self.resolve(Outcome.TIMEOUT)
            return False
        return not self.taker.done()


class RowBlock:
    """The rows of orders that are decided in columns, which come and leave together.

    As long as all of them are wanted and scored, none is an object of its own. Otherwise they go on one by one
    (`apart`). `Deadlines` takes the block for one future.

    Args:
        payloads: One encoded row for each order.
        deadline: Of all of them, in monotonic seconds; infinite for shadow rows.
        block: Takes their results.
        queued_at: When they came; NaN for shadow rows, which wait on purpose.
    """

    __slots__ = ("_block", "_is_over", "deadline", "payloads", "queued_at")

    def __init__(self, payloads: Sequence[bytes], deadline: float, block: BlockTaker, queued_at: float) -> None:
        self.payloads = payloads
        self.deadline = deadline
        self.queued_at = queued_at
        self._block = block
        self._is_over = False
        """Whether they have their results, or go on one by one."""

    def __len__(self) -> int:
        return len(self.payloads)

    def done(self) -> bool:
        """True when nobody waits for a result from here."""
        return self._is_over or self._block.is_left()

    def is_whole(self) -> bool:
        """Whether all orders still wait."""
        block = self._block
        return not (self._is_over or block.missing < len(self.payloads) or block.has_left())

    def apart(self) -> list[Row]:
        """Each of them by itself, as they go on from now; none where nobody waits for any."""
        if self.done():
            return []
        self._is_over = True
        return [
            Row(payload, self.deadline, _OfBlock(self._block, place), self.queued_at)
            for place, payload in enumerate(self.payloads)
        ]

    def set_result(self, result: Outcome) -> None:
        """None of them gets a score, for this reason."""
        for row in self.apart():
            row.resolve(result)

    def resolve(self, result: Outcome) -> bool:
        """The same where somebody waits; whether that was so."""
        if self.done():
            return False
        self.set_result(result)
        return True

    def is_worth_sending(self, earliest_useful: float) -> bool:
        """See `Row`."""
        if self.deadline < earliest_useful:
            self.resolve(Outcome.TIMEOUT)
        return not self.done()

    def put_all(self, scores: Scores) -> None:
        """Gives each order its usable score."""
        self._is_over = True
        self._block.put_all(scores)


class _OfBlock:
    """Takes the result of an order of a block."""

    __slots__ = ("_block", "_has_result", "_place")

    def __init__(self, block: BlockTaker, place: int) -> None:
        self._block = block
        self._place = place
        self._has_result = False

    def done(self) -> bool:
        """True when it has its result, or its caller has gone."""
        return self._has_result or self._block.is_gone(self._place)

    def set_result(self, result: Result) -> None:
        """Gives it to the block."""
        self._has_result = True
        if isinstance(result, Scored):
            self._block.put(self._place, result)
        else:
            self._block.put_failure(self._place, result)


class _Together:
    """Rows that came at one instant. To `Deadlines` they are one future that is due with the first of them."""

    __slots__ = ("_clock", "_deadlines", "_waiting")

    def __init__(self, rows: Sequence[Row], deadlines: Deadlines, clock: Callable[[], float]) -> None:
        self._waiting = rows
        self._deadlines = deadlines
        self._clock = clock
        self._watch()

    def _watch(self) -> None:
        self._deadlines.watch(self, min(row.deadline for row in self._waiting), late=True)

    def done(self) -> bool:
        """True when every row has its result, or nobody wants it any more."""
        return all(row.taker.done() for row in self._waiting)

    def set_result(self, _: bool) -> None:
        """The time of at least one of these rows is up."""
        now = self._clock()
        waiting = [row for row in self._waiting if not row.taker.done()]
        self._waiting = [row for row in waiting if row.deadline > now]
        if self._waiting:
            self._watch()
        for row in waiting:
            if row.deadline <= now:
                row.resolve(Outcome.TIMEOUT)


def watch_together(rows: Sequence[Row], deadlines: Deadlines, clock: Callable[[], float]) -> None:
    """Resolves each of these rows, at least one, to TIMEOUT at its deadline, unless it has its result by then."""
    _Together(rows, deadlines, clock)


class RowQueue:
    """Rows of one lane that wait, those with the earliest deadline first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, int, Row | RowBlock]] = []
        self._came = itertools.count()
        self._rows = 0

    def __len__(self) -> int:
        """Rows."""
        return self._rows

    @property
    def first_deadline(self) -> float:
        """Of the next ones, in monotonic seconds; infinite without any."""
        return self._waiting[0][0] if self._waiting else math.inf

    @property
    def first_rows(self) -> int:
        """How many come next, which leave together if they can; 0 without any."""
        return len(self._waiting[0][2]) if self._waiting else 0

    def push(self, rows: Row | RowBlock) -> None:
        """Adds some."""
        self._rows += len(rows)
        heapq.heappush(self._waiting, (rows.deadline, next(self._came), rows))

    def pop(self) -> Row | RowBlock:
        """Takes the next ones out."""
        _, _, rows = heapq.heappop(self._waiting)
        self._rows -= len(rows)
        return rows

    def pop_last(self) -> Row | RowBlock:
        """Takes those out that have the latest deadline."""
        last = max(self._waiting)
        self._waiting.remove(last)
        heapq.heapify(self._waiting)
        self._rows -= len(last[2])
        return last[2]

    def clear(self) -> list[Row | RowBlock]:
        """Takes all out."""
        waiting, self._waiting, self._rows = [rows for *_, rows in self._waiting], [], 0
        return waiting
