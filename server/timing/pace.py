"""Work that nobody waits for is done in small steps, with long rests between them.

A lower priority is not enough. It counts only among the processes of one session, and where all cores are busy, even a
thread that gets only what others leave takes caches from them, and has them wait for a core when they wake up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_SHARE: Final = 0.1
"""Of the time that something takes, for which it works."""
_LONGEST_REST_SECONDS: Final = 2.0
"""After a step that took unusually long, because the machine stood still or a database did."""
_PATIENCE_SECONDS: Final = 40.0
"""What is not done after this time goes on without rests: it is to be done before it is wanted again."""


class Pace:
    """The steps of one piece of work, in one thread, from now on.

    Args:
        clock: Monotonic seconds.
        sleep: Has the thread wait for so many seconds.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._begun = self._since = clock()

    def rest(self) -> None:
        """A step is over: waits nine times as long as it took."""
        now = self._clock()
        if now - self._begun < _PATIENCE_SECONDS:
            self._sleep(min(_LONGEST_REST_SECONDS, (now - self._since) * (1 / _SHARE - 1)))
        self._since = self._clock()
