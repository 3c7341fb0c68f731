"""Computed feature sets of guests, run beside the engine of `mf1` from the same events.

Each set has a process of its own (`set_process.py`). The event loop puts events into its socket, which costs
microseconds whatever the guest does, and takes the vectors that are ready. So a guest that sleeps, loops, raises, or
calls into C without giving the interpreter back delays neither `mf1` nor another guest. A thread would not do: a call
that keeps the interpreter stops the event loop with it.

A set that raises, gives values that its own definition excludes, does not return from a call, falls too far behind, or
whose process dies is suspended: its process is killed, what waits for it is dropped, and after a pause it begins again
in a new process with new computers, as a worker that has just started does. The pause doubles up to five minutes. Its
last vectors grow old meanwhile, and servers ask no model of the set.

Events that the engine has refused or not taken in because they were stale are not shown to guests.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import structlog
from redis.exceptions import RedisError

from feature_cache.backoff import Backoff
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker import set_messages
from feature_cache.worker.set_messages import Answer, Batch, Entry, Failed, MessageError, Messages, Progress, Ready

if TYPE_CHECKING:
    from feature_cache.engine.engine import FeatureEngine
    from feature_cache.feature_sets import Registered
    from feature_cache.store.cluster import ClusterFeatureStore
    from feature_cache.store.vectors import FeatureStore

_log = structlog.get_logger(__name__)

Reason = Literal["raised", "impossible", "stuck", "behind", "died"]
"""Why a set was suspended."""
_EXCHANGE_SECONDS: Final = 0.003
"""Between two exchanges with a set's process, at least: what comes meanwhile crosses as one batch, and each instrument
of it gets one vector."""
_MOST_QUEUED: Final = 50_000
"""Events that wait for a set: ten seconds of a busy market, of which its process may need some to start."""
_LONGEST_SILENCE_SECONDS: Final = 5.0
"""For which a process with work may say nothing: one call takes that long. On a machine that is short of processors
even a quick call may take a second, and a suspension costs the set what it has seen."""
_LONGEST_START_SECONDS: Final = 60.0
"""Until a process has imported what it needs."""
_MOST_COUNTED_SECONDS: Final = 0.1
"""Of the time between two exchanges, as silence: a worker that stood still itself cannot blame a set."""
_PAUSE_SECONDS: Final = (1.0, 300.0)
"""Of a suspension: the first, and the longest."""
_SOUND_SECONDS: Final = 600.0
"""After so long without a suspension the next one is short again."""
_END_SECONDS: Final = 5.0
"""For which a process that was killed is waited for when the worker ends."""
_RECEIVE_BYTES: Final = 1 << 18
_Computed = tuple["FeatureEngine", FeatureSnapshot]
"""A vector, and the engine that it stands beside."""


class _Sent(NamedTuple):
    """A batch that has not been answered."""

    number: int
    outlines: dict[int, _Computed]
    """By number of the engine, what a vector after this batch says besides its values."""


class SetProcess:
    """The process of a set, and the worker's end of its socket. Nothing here waits.

    Args:
        feature_set: Id of the set.
        features: How many features it has.
        file: Where sets are found besides those of packages.
        log_level: What it logs at least.
    """

    def __init__(self, feature_set: str, features: int, file: Path | None, log_level: str) -> None:
        self._features = features
        self._messages = Messages()
        self._unsent: deque[memoryview] = deque()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        argv = [sys.executable, "-m", "feature_cache.worker.set_process", str(theirs.fileno()), feature_set, log_level]
        if file is not None:
            argv.append(str(file))
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
                argv, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),)
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left."""
        return self._process.poll() is not None

    def send(self, message: bytes) -> None:
        """Sends a message, and what could not be sent before, as far as the socket takes it."""
        if message:
            self._unsent.append(memoryview(message))
        try:
            while self._unsent:
                first = self._unsent[0]
                sent = self._socket.send(first)
                if sent < len(first):
                    self._unsent[0] = first[sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which `receive` will say
            self._unsent.clear()

    def receive(self) -> Iterator[Answer]:
        """What it has answered.

        Raises:
            EOFError: It has ended, and all that it said was heard.
            MessageError: It is not understood.
        """
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                raise EOFError
            for message in self._messages.take(data):
                yield set_messages.answer_of(message, self._features)

    def kill(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()
        self._socket.close()

    def wait(self) -> None:
        """Waits until a killed process is gone."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)


Launch = Callable[[], SetProcess]
"""Starts a process of a set."""


def launcher(registered: Registered, file: Path | None = None, log_level: str = "info") -> Launch:
    """Starts processes of a set that packages or this file name."""
    feature_set = registered.feature_set
    return lambda: SetProcess(feature_set.id, len(feature_set), file, log_level)


class Guest:
    """One computed set, as the worker sees it.

    Args:
        registered: The set.
        launch: Starts its process.
        clock: Monotonic seconds.
    """

    def __init__(self, registered: Registered, launch: Launch, clock: Callable[[], float] = time.monotonic) -> None:
        self.feature_set: Final = registered.feature_set
        self._launch = launch
        self._clock = clock
        self._backoff = Backoff(*_PAUSE_SECONDS, spread=(1.0, 1.0))
        self._resume_at = 0.0
        self._begun_at = self._exchanged_at = clock()
        self._ended: SetProcess | None = None
        """The process before, which was killed."""
        self.process: SetProcess | None = None
        """The running one; None while the set is suspended, and before the first event."""
        self.events = 0
        """Taken by the guest."""
        self.dropped = 0
        """Events that it was not shown because it was suspended, or that were lost with its process."""
        self.vectors = 0
        """Vectors that it gave."""
        self.seconds = 0.0
        """CPU time that its processes have taken."""
        self.suspensions: Counter[Reason] = Counter()
        """By reason."""
        self._forget()

    def _forget(self) -> None:
        """All that is of one process."""
        self._gathered: list[Entry] = []
        """Events that have not been sent."""
        self._wanted: dict[int, FeatureEngine] = {}
        """By their numbers, the engines whose vectors are to be asked for."""
        self._engines: dict[str, tuple[FeatureEngine, int]] = {}
        """By instrument, with their numbers."""
        self._numbers = itertools.count()
        self._unanswered: deque[_Sent] = deque()
        self._batches = self._sent = self._taken = 0
        self._cpu_seconds = 0.0
        self._is_ready = False
        self._silent_seconds = 0.0

    @property
    def suspended(self) -> bool:
        """True while it gets no events."""
        return self._resume_at > 0.0

    @property
    def waiting(self) -> int:
        """Events that it has not taken yet."""
        return self._sent - self._taken + len(self._gathered)

    @property
    def is_busy(self) -> bool:
        """True while half of the events that may wait for it do: what is history should not be added now."""
        return self.waiting > _MOST_QUEUED // 2

    def start(self) -> None:
        """Starts its process. Nobody waits for it: events that come meanwhile wait for it."""
        self._begun_at = self._exchanged_at = self._clock()
        try:
            self.process = self._launch()
        except OSError as error:
            self._suspend("died", f"its process cannot be started: {error}")

    def offer(self, engine: FeatureEngine, event: bytes | None, *, live: bool) -> None:
        """Gives it an event. Takes microseconds and never raises.

        Args:
            engine: Has taken it in. Another one than before means that the instrument begins again.
            event: As it is in the log; None if there is nothing new but that the instrument is live now.
            live: False while the log is only read again.
        """
        if not self.suspended and self.waiting >= _MOST_QUEUED:
            self._suspend("behind", f"{_MOST_QUEUED} events wait")
        if self.suspended:
            self.dropped += event is not None
            return
        known = self._engines.get(engine.instrument)
        begins = known is None or known[0] is not engine
        if event is not None:
            if begins:
                known = self._engines[engine.instrument] = (engine, next(self._numbers))
            assert known is not None
            self._gathered.append(Entry(known[1], begins, event))
        if live and known is not None and known[0] is engine:
            self._wanted[known[1]] = engine

    def exchange(self) -> list[_Computed]:
        """Sends what has been offered, and returns the newest vector of each instrument that has a new one."""
        if self.suspended and not self._may_resume():
            return []
        if self.process is None:
            self.start()
        ready = self._hear()
        if self.process is not None:
            self.process.send(self._next_batch())
            self._watch()
        return list({snapshot.instrument: (engine, snapshot) for engine, snapshot in ready}.values())

    def close(self) -> None:
        """Ends its process."""
        for process in (self.process, self._ended):
            if process is not None:
                process.kill()
                process.wait()
        self.process = self._ended = None

    def _hear(self) -> list[_Computed]:
        """What its process has said; suspends it if that is no good."""
        if self.process is None:
            return []
        ready: list[_Computed] = []
        try:
            for answer in self.process.receive():
                self._silent_seconds = 0.0
                match answer:
                    case Progress():
                        ready += self._vectors(answer)
                    case Ready(fingerprint) if fingerprint == self.feature_set.fingerprint:
                        self._is_ready = True
                    case Ready():
                        self._suspend("died", "its file has another definition of it by now; start the worker again")
                        return []
                    case Failed(reason, detail):
                        self._suspend("impossible" if reason == "impossible" else "raised", detail)
                        return []
        except EOFError:
            self._suspend("died", "its process has ended")
        except MessageError as error:
            self._suspend("died", f"its process says what is not understood: {error}")
        return [] if self.suspended else ready

    def _vectors(self, progress: Progress) -> list[_Computed]:
        """The vectors of an answer. Raises MessageError if it cannot be one."""
        self.events += progress.taken - self._taken
        self.seconds += progress.cpu_seconds - self._cpu_seconds
        self._taken, self._cpu_seconds = progress.taken, progress.cpu_seconds
        self.vectors += len(progress.vectors)
        outlines: dict[int, dict[int, _Computed]] = {}
        while self._unanswered and self._unanswered[0].number <= progress.answered:
            sent = self._unanswered.popleft()
            outlines[sent.number] = sent.outlines
        found = []
        for batch, number, values in progress.vectors:
            wanted = outlines.get(batch, {}).get(number)
            if wanted is None:
                raise MessageError(f"nobody asked for a vector of engine {number} after batch {batch}")
            found.append((wanted[0], replace(wanted[1], values=values, feature_set=self.feature_set)))
        return found

    def _next_batch(self) -> bytes:
        """All that has been gathered, as a message; empty for nothing."""
        if not self._gathered and not self._wanted:
            return b""
        message = set_messages.packed_batch(Batch(self._gathered, tuple(self._wanted)))
        self._batches += 1
        self._sent += len(self._gathered)
        outlines = {number: (engine, engine.outline()) for number, engine in self._wanted.items()}
        self._unanswered.append(_Sent(self._batches, outlines))
        self._gathered, self._wanted = [], {}
        return message

    def _watch(self) -> None:
        """Suspends it if it has work and says nothing."""
        now = self._clock()
        since, self._exchanged_at = now - self._exchanged_at, now
        if not self._is_ready:
            if now - self._begun_at > _LONGEST_START_SECONDS:
                self._suspend("stuck", f"its process has not begun within {_LONGEST_START_SECONDS:g} s")
        elif not self._unanswered:
            self._silent_seconds = 0.0
        else:
            self._silent_seconds += min(since, _MOST_COUNTED_SECONDS)
            if self._silent_seconds > _LONGEST_SILENCE_SECONDS:
                self._suspend("stuck", f"a call has not returned for {_LONGEST_SILENCE_SECONDS:g} s")

    def _suspend(self, reason: Reason, detail: str) -> None:
        now = self._clock()
        if now - self._begun_at > _SOUND_SECONDS:
            self._backoff.reset()
        pause = self._backoff.next_pause()
        self._resume_at = now + pause
        if self.process is not None:
            self.process.kill()
        self.process, self._ended = None, self.process
        self.dropped += self.waiting
        self._forget()
        self.suspensions[reason] += 1
        _log.error("worker.set_suspended", set=self.feature_set.id, reason=reason, detail=detail, seconds=pause)

    def _may_resume(self) -> bool:
        """Ends the suspension if its time is over and nothing is left of its last process."""
        if self._ended is not None and self._ended.has_ended:
            self._ended = None
        if self._clock() < self._resume_at or self._ended is not None:
            return False
        self._resume_at = 0.0
        _log.info("worker.set_resumed", set=self.feature_set.id)
        return True


class Guests:
    """All computed sets of a worker, and what writes their vectors.

    Args:
        guests: The sets.
    """

    def __init__(self, guests: Sequence[Guest] = ()) -> None:
        self.all = tuple(guests)
        self.written = 0
        """Vectors written."""
        self.failures = 0
        """Writes that failed; their vectors are dropped, since newer ones follow."""

    @property
    def are_busy(self) -> bool:
        """True while history should wait for one of them."""
        return any(guest.is_busy for guest in self.all)

    def start(self) -> None:
        """Starts them, before there are events."""
        for guest in self.all:
            guest.start()

    def take(self, engine: FeatureEngine, event: bytes | None, *, live: bool) -> None:
        """Shows an event to all sets; see `Guest.offer`."""
        for guest in self.all:
            guest.offer(engine, event, live=live)

    async def run(
        self,
        store: FeatureStore | ClusterFeatureStore,
        held: Callable[[], Iterable[FeatureEngine]],
        interval_seconds: float,
    ) -> None:
        """Has them compute, and writes their vectors beside those of `mf1`, for ever; ends only by cancellation.

        Args:
            store: Where the vectors go.
            held: The engines of the instruments that this worker holds now: others' vectors are another worker's.
            interval_seconds: Between two writes, at least.
        """
        reached = True
        while True:
            await asyncio.sleep(max(interval_seconds, _EXCHANGE_SECONDS))
            ready = [guest.exchange() for guest in self.all]
            if not any(ready):
                continue
            mine = set(map(id, held()))
            for of_set in ready:
                snapshots = [snapshot for engine, snapshot in of_set if id(engine) in mine]
                if not snapshots:
                    continue
                try:
                    await store.write(snapshots)
                except (RedisError, OSError) as error:
                    self.failures += 1
                    if reached:
                        _log.warning("worker.sets_not_written", error=repr(error))
                    reached = False
                else:
                    reached = True
                    self.written += len(snapshots)

    def close(self) -> None:
        """Ends their processes."""
        for guest in self.all:
            guest.close()
