"""Several server processes on one port: `python -m server --processes N`.

Each process takes a numbered slot (`slot.py`) with a journal of its own; the kernel spreads connections over them.
There is one slot more than processes::

    SIGHUP       one by one: a new process in the free slot, ready → the oldest drains, and its slot is free
    a death      a new process takes the same slot, after a pause that doubles from one to the next;
                 a process that hangs in its start is killed first
    SIGTERM      all drain; a second one ends all at once

A child drains when its standard input ends (`stopping.py`). It therefore drains as well when the supervisor itself is
killed. A child that has not finished its start exits at once.

With the Envoy edge, each process is an Envoy with a server inside. Envoy itself would end undrained on SIGTERM.
Therefore that signal is blocked in Envoy and the server inside waits for it. A terminal's SIGINT does not reach Envoy's
process group.

When a process ends before all of its rows are shipped, the rest is shipped while its slot is free, so no audit row
waits for the next process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from feature_cache.backoff import Backoff
from server.process.slot import READY

_log = structlog.get_logger(__name__)

_PAUSE_MIN_SECONDS: Final = 0.2
_PAUSE_MAX_SECONDS: Final = 10.0
_SOUND_SECONDS: Final = 10.0
"""A process that was ready for so long did not die of its start."""
_LOAD_SECONDS: Final = 60.0
"""What a new process may take on a busy machine, beyond its patience with replicas and features; one that cannot start
ends by itself, and one that hangs is killed after that."""


class _Child:
    """One server process."""

    def __init__(self, slot: int, process: Process) -> None:
        self.slot = slot
        self.process = process
        self.ready_since: float | None = None
        self.dismissed = False
        """True when its end is wanted."""
        self.ready_or_ended = asyncio.Event()

    async def follow(self) -> None:
        """Reads what it says until it has ended."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            if line.strip() == READY:
                self.ready_since = time.monotonic()
                self.ready_or_ended.set()
        await self.process.wait()
        self.ready_or_ended.set()

    def drain(self) -> None:
        """Tells it to drain and end."""
        self.dismissed = True
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        """Ends it at once."""
        self.dismissed = True
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


@dataclass(frozen=True, slots=True)
class Command:
    """How one server process is started."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    descriptors: tuple[int, ...]
    """Files that it inherits."""
    blocked_signals: frozenset[signal.Signals] = frozenset()
    """Signals that it begins its life with blocked."""
    process_group: int | None = None
    """0 for a group of its own; None for the supervisor's."""


@dataclass(frozen=True, slots=True)
class Group:
    """What the server processes have in common; their supervisor knows no more of them."""

    decision_port: int
    command: Callable[[int, int], Command]
    """How the process of a slot is started, by the slot's number and the times that its process ended by itself."""
    journal: Callable[[int], Path]
    """The journal of a slot."""
    ship: Callable[[Path], Coroutine[None, None, None]]
    """Ships what an ended process left in its journal."""
    left_behind: tuple[tuple[int, Path], ...]
    """Journals that no process takes at the start, numbered as slots: earlier servers left them."""
    patience_seconds: float
    """How long a process waits for replicas and features before it serves degraded."""
    seconds_to_end: float
    """What a process may take from the request to drain until it has ended."""


class Supervisor:
    """Keeps some server processes running.

    Args:
        processes: How many.
        open_group: Takes what they share, and gives it back at the end; may raise `OSError`.
    """

    def __init__(self, processes: int, open_group: Callable[[], AbstractContextManager[Group]]) -> None:
        self._count = processes
        self._open_group = open_group
        self._group: Group
        """There from the start of `run` on."""
        self._running: dict[int, _Child] = {}
        self._restarts: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leftovers: dict[int, asyncio.Task[None]] = {}
        self._taking_again = asyncio.Lock()
        """Held while a process that ended gets its successor, so that a replacement dismisses that and no dead one."""
        self._stop = asyncio.Event()
        self._replace = asyncio.Event()
        """Set by SIGHUP; one that comes during a replacement or at the start is heard after it."""

    async def run(self) -> int:
        """Runs until it is stopped.

        Returns:
            The exit code: 0 when it was stopped, otherwise that of a process that could not be started at first.

        Raises:
            OSError: A port or the journal belongs to another server, or the control state cannot be written.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._replace.set)
        with self._open_group() as group:
            self._group = group
            for slot, journal in group.left_behind:
                self._ship(slot, journal)
            _log.info("supervising", processes=self._count, decision_port=group.decision_port)
            try:
                code = await self._start()
                if code == 0:
                    await self._serve()
            finally:
                await self._end()
        return code

    def _on_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            for child in self._running.values():
                child.kill()
            os._exit(128 + number)
        _log.info("stopping", processes=len(self._running))
        self._stop.set()

    async def _start(self) -> int:
        """Starts the first processes; the exit code of one that ended before it was ready, else 0."""
        children = [await self._spawn(slot) for slot in range(self._count)]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            for child in children:
                started = asyncio.create_task(child.ready_or_ended.wait())
                await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
                started.cancel()
                if self._stop.is_set():
                    return 0
                if child.ready_since is None:
                    return abs(child.process.returncode or 1)
        finally:
            stopped.cancel()
        for child in children:
            self._keep(child)
        return 0

    async def _serve(self) -> None:
        """Replaces all processes on request, until it is stopped."""
        replacements = asyncio.create_task(self._replace_when_told())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((replacements, stopped), return_when=asyncio.FIRST_COMPLETED)
        replacements.cancel()
        stopped.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await replacements

    async def _replace_when_told(self) -> None:
        while True:
            await self._replace.wait()
            self._replace.clear()
            try:
                await self._replace_all()
            except OSError as error:
                _log.error("no new process can be started, the old ones stay", error=str(error))

    async def _spawn(self, slot: int) -> _Child:
        """Starts a process in a free slot."""
        await self._end_leftovers(slot)
        restarts = self._restarts.get(slot, 0)
        command = self._group.command(slot, restarts)
        with _blocked(command.blocked_signals):
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=PIPE,
                stdout=PIPE,
                env=command.environment,
                pass_fds=command.descriptors,
                process_group=command.process_group,
            )
        child = self._running[slot] = _Child(slot, process)
        self._background(child.follow())
        self._background(self._end_if_it_hangs(child))
        return child

    async def _end_if_it_hangs(self, child: _Child) -> None:
        """Kills a process that is not ready in time; what follows is what follows when it ends by itself."""
        within_seconds = self._group.patience_seconds + _LOAD_SECONDS
        try:
            async with asyncio.timeout(within_seconds):
                await child.ready_or_ended.wait()
        except TimeoutError:
            _log.error("a process hangs in its start, killed", slot=child.slot, pid=child.process.pid)
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
            await child.process.wait()
            child.ready_or_ended.set()  # even where a process that it had started holds its output open

    def _keep(self, child: _Child) -> None:
        """Starts a new process in the slot if this one ends by itself."""
        self._background(self._take_again(child))

    async def _take_again(self, child: _Child) -> None:
        backoff = Backoff(_PAUSE_MIN_SECONDS, _PAUSE_MAX_SECONDS, spread=(1.0, 1.0))
        while True:
            await child.process.wait()
            if child.dismissed or self._stop.is_set():
                return
            if child.ready_since is not None and time.monotonic() - child.ready_since >= _SOUND_SECONDS:
                backoff.reset()
            pause = backoff.next_pause()
            self._restarts[child.slot] = self._restarts.get(child.slot, 0) + 1
            _log.error(
                "a process ended by itself, starting it again",
                slot=child.slot,
                pid=child.process.pid,
                code=child.process.returncode,
                restarts=self._restarts[child.slot],
                after_seconds=pause,
            )
            await asyncio.sleep(pause)
            async with self._taking_again:
                if self._stop.is_set() or child.dismissed:
                    return
                try:
                    child = await self._spawn(child.slot)
                except OSError as error:
                    _log.error("no process can be started", slot=child.slot, error=str(error))

    async def _replace_all(self) -> None:
        """Replaces every process by a new one, one at a time, the new one first; gives up when one does not start."""
        _log.info("replacing all processes", processes=len(self._running))
        for slot in sorted(self._running, key=lambda slot: self._running[slot].ready_since or 0.0):
            free = next(index for index in range(self._count + 1) if index not in self._running)
            new = await self._spawn(free)
            await new.ready_or_ended.wait()
            if new.ready_since is None:
                _log.error("the new process does not serve, the old ones stay", slot=free, code=new.process.returncode)
                self._free(free)
                return
            self._keep(new)
            await self._dismiss(slot)
        _log.info("replaced all processes", processes=len(self._running))

    async def _dismiss(self, slot: int) -> None:
        """Drains the process in a slot and frees the slot."""
        async with self._taking_again:
            child = self._running[slot]
            child.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._group.seconds_to_end):
                await child.process.wait()
        if child.process.returncode is None:
            _log.error("a process did not end, killed", slot=child.slot, pid=child.process.pid)
            child.kill()
            await child.process.wait()
        self._free(slot)

    def _free(self, slot: int) -> None:
        self._running.pop(slot)
        self._ship(slot, self._group.journal(slot))

    def _ship(self, slot: int, journal: Path) -> None:
        self._leftovers[slot] = asyncio.create_task(self._group.ship(journal))

    async def _end_leftovers(self, slot: int) -> None:
        task = self._leftovers.pop(slot, None)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def _end(self) -> None:
        """Drains every process, and kills those that do not end."""
        children = list(self._running.values())
        for child in children:
            child.drain()
        ends = [asyncio.create_task(child.process.wait()) for child in children]
        if ends:
            await asyncio.wait(ends, timeout=self._group.seconds_to_end)
        for child in children:
            if child.process.returncode is None:
                _log.error("a process did not end, killed", slot=child.slot, pid=child.process.pid)
                child.kill()
                await child.process.wait()
        for slot in list(self._leftovers):
            await self._end_leftovers(slot)
        for task in list(self._tasks):
            task.cancel()
        _log.info("stopped")

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@contextlib.contextmanager
def _blocked(signals: frozenset[signal.Signals]) -> Iterator[None]:
    """Blocks signals in this thread and in the processes it starts; a signal for us is delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
