"""The rows that no caller waits for, until they leave in one large block."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.inference.rows import Row, RowBlock


class ShadowQueue:
    """Gathers shadow rows, because a call to a model server costs about as much as the scoring of a thousand rows.

    They are due when as many are here as fit into a block, or when the oldest has waited for the linger time.

    Args:
        bound: Most rows; more are shed.
        linger_seconds: How long the oldest row waits for others.
        release: Called when the rows become due because of their age.
    """

    def __init__(self, bound: int, linger_seconds: float, release: Callable[[], None]) -> None:
        self._bound = bound
        self._linger_seconds = linger_seconds
        self._release = release
        self._waiting: deque[Row | RowBlock] = deque()
        self._rows = 0
        self._old = False
        """True when the oldest row has waited for the linger time."""
        self._timer: asyncio.TimerHandle | None = None
        self.shed = 0
        """Rows dropped because there were too many."""

    def __len__(self) -> int:
        """Rows that wait."""
        return self._rows

    def add(self, rows: Sequence[Row | RowBlock]) -> int:
        """Takes rows, from the first on; how many of them, the others are shed."""
        room, offered = self._bound - self._rows, sum(map(len, rows))
        taken = rows if offered <= room else _apart(rows)[:room]
        self._waiting.extend(taken)
        count = min(offered, room)
        self._rows += count
        self.shed += offered - count
        if count and self._timer is None:
            self._set_timer()
        return count

    def is_due(self, block: int) -> bool:
        """True when a block of so many rows may leave."""
        return self._rows >= block or self._old

    def take(self, block: int) -> list[Row | RowBlock]:
        """The next block, of at most so many rows. Those that stay gather anew."""
        taken: list[Row | RowBlock] = []
        waiting, room = self._waiting, block
        while waiting and room:
            if len(waiting[0]) > room:
                if taken:
                    break
                waiting.extendleft(reversed(waiting.popleft().apart()))  # too many for any block
            taken.append(waiting.popleft())
            room -= len(taken[-1])
        self._rows -= block - room
        self._stop()
        if waiting:
            self._set_timer()
        return taken

    def clear(self) -> list[Row | RowBlock]:
        """Gives up all rows and returns them."""
        rows = list(self._waiting)
        self._waiting.clear()
        self._rows = 0
        self._stop()
        return rows

    def _stop(self) -> None:
        self._old = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._timer is None and not self._old:
            self._timer = asyncio.get_running_loop().call_later(self._linger_seconds, self._grow_old)

    def _grow_old(self) -> None:
        self._timer, self._old = None, True
        self._release()


def _apart(rows: Sequence[Row | RowBlock]) -> list[Row]:
    """Each of them by itself."""
    return [row for one in rows for row in one.apart()]
