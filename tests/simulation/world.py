"""Virtual time: one clock, one queue of events, one source of chance, one trace.

Everything that happens in a simulation is an event of this queue: a turn of a process's event loop, bytes that arrive,
a sync that ends, a fault. Events of one instant happen in the order in which they were scheduled, so a seed determines
the whole history; the trace is a hash over it.

Whatever blocks (a thread that waits for a queue, an event loop in a slow `fsync`) is a greenlet: it gives the floor
back to the queue of events and goes on where it was when its time has come. Only one thing runs at any moment.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
import sys
from asyncio import events
from collections.abc import Callable
from typing import Any, Final

import greenlet

START_SECONDS: Final = 1_000.0
"""The monotonic clock when a simulation begins."""
START_WALL_NS: Final = 1_790_000_000 * 10**9
"""The true wall clock then; a machine's own may be off."""


class ProcessKilled(BaseException):
    """Thrown into what a killed process was doing. Not an `Exception`: nothing in the process may catch it."""


class Timer:
    """Something that is going to happen, unless it is cancelled before."""

    __slots__ = ("arguments", "callback")

    def __init__(self, callback: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
        self.callback = callback
        self.arguments = arguments

    def cancel(self) -> None:
        """Makes it not happen."""
        self.callback, self.arguments = None, ()


class World:
    """The clock and the queue of events of one simulation.

    Args:
        seed: Determines everything.
        keep_trace: Whether to keep the trace's lines, besides their hash.
    """

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.seed: Final = seed
        self.now = START_SECONDS
        self.lines: list[str] | None = [] if keep_trace else None
        """What happened, a line an event, where it is kept."""
        self._hash = hashlib.blake2b(digest_size=16)
        self._queue: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._hub = greenlet.getcurrent()
        self._failure: BaseException | None = None
        self.events = 0
        """Events that have happened."""

    def random(self, name: str) -> random.Random:
        """A source of chance of its own, so that one part's use of it does not change another's."""
        return random.Random(f"{self.seed}/{name}")

    def note(self, *what: object) -> None:
        """Adds a line to the trace."""
        line = f"{self.now:.9f} {' '.join(map(str, what))}"
        self._hash.update(line.encode())
        if self.lines is not None:
            self.lines.append(line)

    @property
    def trace_hash(self) -> str:
        """Of everything that was noted so far."""
        return self._hash.hexdigest()

    def at(self, when: float, callback: Callable[..., object], *arguments: Any) -> Timer:
        """Has something happen at an instant, or now if that has passed."""
        timer = Timer(callback, arguments)
        heapq.heappush(self._queue, (max(when, self.now), next(self._order), timer))
        return timer

    def after(self, seconds: float, callback: Callable[..., object], *arguments: Any) -> Timer:
        """Has something happen in so many seconds."""
        return self.at(self.now + seconds, callback, *arguments)

    def run(self, done: Callable[[], bool], until: float) -> bool:
        """Lets events happen until something is done; False when that is not so at the instant `until`.

        Raises:
            BaseException: Whatever an event raised.
        """
        queue = self._queue
        while not done():
            if not queue or queue[0][0] > until:
                self.now = until
                return False
            when, _, timer = heapq.heappop(queue)
            if timer.callback is None:
                continue
            self.now = when
            self.events += 1
            timer.callback(*timer.arguments)
            if self._failure is not None:
                raise self._failure
        return True

    # What blocks.

    def spawn(self, run: Callable[[], object], owner: object) -> greenlet.greenlet:
        """Something of a process that may block; it does not run yet."""

        def guarded() -> None:
            try:
                run()
            except ProcessKilled:
                pass
            except BaseException as error:  # it must be seen where the simulation runs, not end a greenlet silently
                self._failure = error

        fiber = greenlet.greenlet(guarded, self._hub)
        fiber.owner = owner
        return fiber

    def enter(self, fiber: greenlet.greenlet, loop: events.AbstractEventLoop | None, *values: object) -> None:
        """Goes on with something that may block, until it blocks again; called from an event."""
        assert greenlet.getcurrent() is self._hub, "only an event goes on with a fiber"
        events._set_running_loop(loop)
        if loop is not None:
            # What is left of an async generator is closed in the loop that it ran in, as `run_forever` has it.
            sys.set_asyncgen_hooks(loop._asyncgen_firstiter_hook, loop._asyncgen_finalizer_hook)  # type: ignore[attr-defined]
        try:
            fiber.switch(*values)
        finally:
            events._set_running_loop(None)

    def throw(self, fiber: greenlet.greenlet) -> None:
        """Ends something that blocks, as the death of its process does."""
        if fiber and not fiber.dead:
            fiber.throw(ProcessKilled)

    def block(self) -> Any:
        """Gives the floor back until somebody enters this fiber again; called from within it."""
        return self._hub.switch()

    @property
    def in_hub(self) -> bool:
        """True in an event that belongs to no fiber."""
        return greenlet.getcurrent() is self._hub
