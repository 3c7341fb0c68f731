"""Deadlines of many futures on one timer of the event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any, Final, Protocol, TypeVar

T_contra = TypeVar("T_contra", contravariant=True)
T = TypeVar("T")

_PRUNE_AT: Final = 1024


class Resolvable(Protocol[T_contra]):
    """An `asyncio.Future`, or what is used like one."""

    def done(self) -> bool:
        """True when it needs no result."""
        ...

    def set_result(self, result: T_contra, /) -> object:
        """Called once at most, and only while it is not done."""
        ...


class Deadlines:
    """Resolves futures that are still open when their time is up.

    A decision waits twice, for a score and for the audit, and nearly always gets both long before its deadline. A timer
    of the event loop for each wait costs as much as the rest of the waiting; here a wait costs an entry of a heap, and
    the one timer is set to the earliest deadline of a future that is still open. Futures that are done leave the heap
    when they come to its top and the next one is watched, or when it has doubled since they were last looked for. What
    was decided is not kept until its deadline: it would fill the processor's caches, and the collector of garbage would
    look at it.

    Args:
        clock: Monotonic seconds; must be the event loop's clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: list[tuple[float, int, Resolvable[Any], Any]] = []
        self._order = itertools.count()
        self._prune_at = _PRUNE_AT
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    def __len__(self) -> int:
        """Futures that are held, done ones included."""
        return len(self._open)

    def watch(self, future: Resolvable[T], deadline: float, late: T) -> None:
        """Resolves the future to `late` at `deadline`, unless it is done by then."""
        if len(self._open) >= self._prune_at:
            self._prune()
        waiting = self._open
        while waiting and waiting[0][2].done():
            heapq.heappop(waiting)
        heapq.heappush(waiting, (deadline, next(self._order), future, late))
        if deadline < self._due:
            self._set_timer(deadline)

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = asyncio.get_running_loop().call_at(due, self._expire)

    def _expire(self) -> None:
        self._timer, self._due = None, math.inf
        now, waiting = self._clock(), self._open
        while waiting and (waiting[0][0] <= now or waiting[0][2].done()):
            _, _, future, late = heapq.heappop(waiting)
            if not future.done():
                future.set_result(late)
        if waiting:
            self._set_timer(waiting[0][0])

    def _prune(self) -> None:
        self._open = [entry for entry in self._open if not entry[2].done()]
        heapq.heapify(self._open)
        self._prune_at = max(_PRUNE_AT, 2 * len(self._open))
