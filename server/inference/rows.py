"""One row on its way to a model server and back: who waits for it, and what becomes of it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

from server.inference.outcome import Outcome
from server.inference.wire import ModelIdentity


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


class Row:
    """One encoded row and its taker."""

    __slots__ = ("deadline", "from_caller", "payload", "queued_at", "taker", "traceparent")

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
