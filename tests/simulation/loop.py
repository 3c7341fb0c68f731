"""The event loop of one simulated process: asyncio's own tasks and futures on virtual time.

A loop is also how a process reaches what asyncio would give it: `create_connection` leads into the simulated network,
`subprocess_exec` starts a simulated child, `run_in_executor` a simulated thread. A turn of the loop takes a little
time, now and then a lot, and all of its callbacks see the same instant. A loop that is stopped (SIGSTOP) lets time pass
and then does everything that has become due; a loop that was killed never does anything again.
"""

from __future__ import annotations

import asyncio
import itertools
from asyncio import base_events, events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

from simulation.world import World

if TYPE_CHECKING:
    from simulation.machine import SimulatedMachine

_TURN_SECONDS: Final = (4e-6, 4e-5)
"""What a turn takes, and each further callback in it the lesser."""


class _Numbered:
    """Sets of tasks and futures have the same order in every run: their hash is a number and not an address."""

    _numbers = itertools.count()
    _number: int

    def __hash__(self) -> int:
        return self._number


class SimulatedTask(_Numbered, asyncio.Task[Any]):
    """A task whose hash does not depend on where it lies in memory."""

    def __new__(cls, *_arguments: object, **_keywords: object) -> SimulatedTask:
        task = super().__new__(cls)
        task._number = next(cls._numbers)
        return task

    __hash__ = _Numbered.__hash__


class SimulatedFuture(_Numbered, asyncio.Future[Any]):
    """The same for futures."""

    def __new__(cls, *_arguments: object, **_keywords: object) -> SimulatedFuture:
        future = super().__new__(cls)
        future._number = next(cls._numbers)
        return future

    __hash__ = _Numbered.__hash__


def number_from_zero() -> None:
    """Begins to count tasks and futures anew; called before each simulation."""
    _Numbered._numbers = itertools.count()


class ProcessLoop(base_events.BaseEventLoop):
    """The event loop of one process.

    Args:
        world: Whose time it lives in.
        machine: What its process runs on.
        name: Of its process, for the trace.
    """

    def __init__(self, world: World, machine: SimulatedMachine, name: str) -> None:
        self._dead = False
        super().__init__()
        self.world = world
        self.machine = machine
        self.name = name
        self._chance = world.random(f"loop/{name}")
        self._due: deque[asyncio.Handle] = deque()
        self._turn_is_set = False
        self._busy_until = 0.0
        self._stopped_now = False
        self._fiber = world.spawn(self._live, machine)
        self.set_exception_handler(self._note_exception)
        self.problems: list[str] = []
        """What asyncio would have logged as an error: a bug of ours."""

    # Time and turns.

    def time(self) -> float:
        """Monotonic seconds."""
        return self.world.now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """In the next turn."""
        handle = asyncio.Handle(callback, args, self, context)
        if not self._dead:
            self._due.append(handle)
            self._set_turn()
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """The same: whoever calls it, nothing else runs meanwhile."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """In so many seconds."""
        return self.call_at(self.world.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """At an instant, or as soon as the loop has its turn after that."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.world.at(when, self._expire, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing: a cancelled timer is passed over when its time comes."""

    def _expire(self, handle: asyncio.TimerHandle) -> None:
        if not (handle._cancelled or self._dead):
            self._due.append(handle)
            self._set_turn()

    def _set_turn(self) -> None:
        if not (self._turn_is_set or self._stopped_now or self._dead):
            self._turn_is_set = True
            self.world.at(self._busy_until, self._turn)

    def _turn(self) -> None:
        """One turn, from the queue of events."""
        self._turn_is_set = False
        if self._dead or self._stopped_now or not self._due:
            return
        self.world.enter(self._fiber, self)

    def _live(self) -> None:
        """The loop's own thread: turn after turn. It blocks where a callback blocks."""
        world = self.world
        while True:
            due, self._due = self._due, deque()
            self._turn_is_set = True  # nobody else starts one while this one lasts
            for handle in due:
                if not handle._cancelled:
                    handle._run()
                    if self._dead:
                        return
            self._turn_is_set = False
            least, most = _TURN_SECONDS
            self._busy_until = max(self._busy_until, world.now + self._chance.uniform(least, most) + least * len(due))
            if self._due:
                self._set_turn()
            world.block()

    def stand_still(self, seconds: float) -> None:
        """Gives the process no core for so long: a stall, a collection of garbage."""
        self._busy_until = max(self._busy_until, self.world.now + seconds)

    def stop_now(self) -> None:
        """SIGSTOP."""
        self._stopped_now = True

    def go_on(self) -> None:
        """SIGCONT."""
        self._stopped_now = False
        if self._due:
            self._set_turn()

    def kill(self) -> None:
        """Ends the loop as SIGKILL does: nothing in it runs ever again, no `finally` either."""
        self._dead = True
        self._due.clear()
        self.world.throw(self._fiber)

    @property
    def dead(self) -> bool:
        """True when it was killed."""
        return self._dead

    # Tasks and futures.

    def create_future(self) -> asyncio.Future[Any]:
        """See `SimulatedFuture`."""
        return SimulatedFuture(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        """See `SimulatedTask`."""
        task = SimulatedTask(coro, loop=self, name=name or "task", context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # those of a killed process are
        return task

    def _note_exception(self, _loop: events.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self._dead:
            self.problems.append(f"{context.get('message')}: {error!r}")

    # What the operating system gives.

    def run_in_executor(  # type: ignore[override]
        self, executor: object, function: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Calls a function in a thread."""
        future = self.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        def run() -> None:
            try:
                result = function(*args)
            except Exception as error:
                self.call_soon(settle, None, error)
            else:
                self.call_soon(settle, result, None)

        self.machine.threads.start(run, "to-thread")
        return future

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str = "", port: int = 0, **_options: object
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Connects to a simulated server."""
        return await self.machine.connect(protocol_factory, host, port)

    async def subprocess_exec(  # type: ignore[override]
        self, protocol_factory: Callable[[], asyncio.SubprocessProtocol], program: str, *args: str, **_options: object
    ) -> tuple[asyncio.SubprocessTransport, asyncio.SubprocessProtocol]:
        """Starts a simulated child."""
        return await self.machine.start_child(protocol_factory, args)

    def is_running(self) -> bool:
        """True until it was killed."""
        return not self._dead

    def set_debug(self, enabled: bool) -> None:
        """Never."""

    def get_debug(self) -> bool:
        """Never."""
        return False

    def __del__(self) -> None:
        """Nothing: it has no files to close."""
