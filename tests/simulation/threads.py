"""The threads of a simulated process. Each is a fiber of the world; only one runs at a time, and none is preempted.

A thread gives the floor away where a real one would wait: for a queue, an event, a sync of the disk, `sleep`.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import greenlet

from server.machine import Threads
from simulation.world import ProcessKilled, World

if TYPE_CHECKING:
    from simulation.machine import SimulatedMachine


class SimulatedThreads(Threads):
    """Starts threads, and knows them all, so that they die with their process.

    Args:
        world: Whose time they live in.
        owner: The process.
    """

    def __init__(self, world: World, owner: SimulatedMachine) -> None:
        self.world = world
        self.owner = owner
        self._alive: dict[SimulatedThread, None] = {}

    def start(self, run: Callable[[], object], name: str) -> SimulatedThread:
        """Runs a function in a thread; it begins as soon as whoever runs now gives the floor away."""
        thread = SimulatedThread(self, run)
        self._alive[thread] = None
        self.world.after(0.0, thread.begin)
        return thread

    def pool(self, name: str) -> Executor:
        """Runs each piece of work in a thread of its own, one after the other."""
        return _Pool(self)

    def queue(self) -> SimulatedQueue:
        """See `SimulatedQueue`."""
        return SimulatedQueue(self)

    def event(self) -> SimulatedEvent:
        """See `SimulatedEvent`."""
        return SimulatedEvent(self)

    def sleep(self, seconds: float) -> None:
        """Waits; other threads and the event loop go on, unless it is the event loop that waits."""
        waiting = self.waiting()
        self.world.after(seconds, waiting.wake)
        waiting.wait()

    def waiting(self) -> Waiting:
        """For the thread that runs now to wait with."""
        return Waiting(self)

    def check_alive(self) -> None:
        """Ends the thread that runs now, if its process is dead."""
        if self.owner.dead:
            raise ProcessKilled

    def kill(self) -> None:
        """Ends all threads, as the death of their process does."""
        for thread in list(self._alive):
            self.world.throw(thread.fiber)
        self._alive.clear()

    def ended(self, thread: SimulatedThread) -> None:
        """Notes that a thread has ended by itself."""
        self._alive.pop(thread, None)


class Waiting:
    """One wait of one thread, ended by whoever wakes it first."""

    def __init__(self, threads: SimulatedThreads) -> None:
        self._threads = threads
        self._fiber = greenlet.getcurrent()
        self._loop = _running_loop()
        self._value: Any = None
        self.over = False

    def wake(self, value: Any = None) -> None:
        """Ends the wait, from an event."""
        if self.over:
            return
        self.over = True
        if not self._fiber.dead:
            self._threads.world.enter(self._fiber, self._loop, value)

    def wait(self) -> Any:
        """Gives the floor away until woken; what it was woken with."""
        self._threads.check_alive()
        value = self._threads.world.block()
        self._threads.check_alive()
        return value


def _running_loop() -> Any:
    from asyncio import events  # noqa: PLC0415

    return events._get_running_loop()


class SimulatedThread:
    """A thread."""

    def __init__(self, threads: SimulatedThreads, run: Callable[[], object]) -> None:
        self._threads = threads
        self._ended = SimulatedEvent(threads)

        def live() -> None:
            try:
                run()
            finally:
                threads.ended(self)
                self._ended.set()

        self.fiber = threads.world.spawn(live, threads.owner)

    def begin(self) -> None:
        """Its first step, from an event."""
        if self in self._threads._alive and not self._threads.owner.dead:
            self._threads.world.enter(self.fiber, None)

    def join(self, timeout: float | None = None) -> None:
        """Waits until it has ended."""
        self._ended.wait(timeout)


class SimulatedEvent:
    """As `threading.Event`."""

    def __init__(self, threads: SimulatedThreads) -> None:
        self._threads = threads
        self._is_set = False
        self._waiting: deque[Waiting] = deque()

    def set(self) -> None:
        """Wakes all that wait."""
        self._is_set = True
        while self._waiting:
            self._threads.world.after(0.0, self._waiting.popleft().wake)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it is set, or for so long."""
        self._threads.check_alive()
        if not self._is_set:
            waiting = self._threads.waiting()
            self._waiting.append(waiting)
            if timeout is not None:
                self._threads.world.after(timeout, waiting.wake)
            waiting.wait()
        return self._is_set


class SimulatedQueue:
    """As `queue.SimpleQueue`."""

    def __init__(self, threads: SimulatedThreads) -> None:
        self._threads = threads
        self._items: deque[Any] = deque()
        self._waiting: deque[Waiting] = deque()

    def put(self, item: Any) -> None:
        """Adds an item; whoever waits longest gets up a little later."""
        self._items.append(item)
        if self._waiting:
            self._threads.world.after(1e-5, self._waiting.popleft().wake)

    def get_nowait(self) -> Any:
        """The next item; raises `queue.Empty`."""
        self._threads.check_alive()
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item, waited for; raises `queue.Empty` when there is none after so long."""
        self._threads.check_alive()
        until = None if timeout is None else self._threads.world.now + timeout
        while not self._items:
            if not block or (until is not None and self._threads.world.now >= until):
                raise queue.Empty
            waiting = self._threads.waiting()
            self._waiting.append(waiting)
            if until is not None:
                self._threads.world.at(until, waiting.wake)
            waiting.wait()
            if waiting in self._waiting:  # its time was up
                self._waiting.remove(waiting)
        return self._items.popleft()


class _Pool(Executor):
    def __init__(self, threads: SimulatedThreads) -> None:
        self._threads = threads
        self._last: SimulatedThread | None = None

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        before = self._last

        def run() -> None:
            if before is not None:
                before.join()
            try:
                future.set_result(function(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self._last = self._threads.start(run, "pool")
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait and self._last is not None:
            self._last.join()
