"""Computed feature sets of guests, run beside the engine of `mf1` from the same events.

Each set has a thread of its own. The event loop only puts events into its queue, which costs microseconds whatever the
guest does, and takes the vectors that are ready. So a guest that sleeps, loops or raises delays neither `mf1` nor
another guest. What it can take is the interpreter, for at most one of its calls at a time and half of the time.

A set that raises, gives values that its own definition excludes, does not return from a call, or falls too far behind
is suspended: its queue is emptied, and after a pause it begins again with new computers, as a worker that has just
started does. The pause doubles up to five minutes. Its last vectors grow old meanwhile, and servers ask no model of the
set.

Events that the engine has refused or not taken in because they were stale are not shown to guests.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import structlog
from redis.exceptions import RedisError

from feature_cache.backoff import Backoff
from feature_cache.feature_sets import ImpossibleValuesError
from feature_cache.store.codec import FeatureSnapshot

if TYPE_CHECKING:
    from feature_cache.engine.engine import FeatureEngine
    from feature_cache.feature_sets import Computer, Registered
    from feature_cache.store.cluster import ClusterFeatureStore
    from feature_cache.store.vectors import FeatureStore
    from pretrade.market.v1 import market_pb2 as pb

_log = structlog.get_logger(__name__)

Reason = Literal["raised", "impossible", "stuck", "behind"]
"""Why a set was suspended."""
_ROUND_SECONDS: Final = 0.005
"""Between two rounds of a guest, at least: it takes all events that wait, then gives each changed instrument's values
once."""
_SHARE: Final = 0.5
"""Of a guest's time that it may compute: more of it could take `mf1` the interpreter."""
_SWITCH_SECONDS: Final = 0.0005
"""How long a guest may keep the interpreter while the event loop waits for it. Python's own 5 ms are what an event of
`mf1` then waits."""
_MOST_QUEUED: Final = 20_000
"""Events that wait for a guest: some seconds of a busy market."""
_LONGEST_CALL_SECONDS: Final = 5.0
"""A call that takes longer is not waited for. On a machine that is short of processors even a quick call may take a
second, and a suspension costs the guest what it has seen."""
_PAUSE_SECONDS: Final = (1.0, 300.0)
"""Of a suspension: the first, and the longest."""
_SOUND_SECONDS: Final = 600.0
"""After so long without a suspension the next one is short again."""
_TRIAL: Final = "TRIAL.TRIAL"
"""The instrument of a computer that is made when the worker starts, and sees nothing."""
_Ready = tuple["FeatureEngine", FeatureSnapshot]
"""A vector, and the engine that it stands beside."""


class _Task(NamedTuple):
    """One event for a guest."""

    engine: FeatureEngine
    """Of the instrument: another one than before means that the instrument begins again."""
    event: pb.MarketEvent | None
    """None: nothing new, but the instrument's vector may be published from now on."""
    outline: FeatureSnapshot | None
    """What a vector at this event says besides its values; None while the log is only read again."""


class Guest:
    """One computed set in its thread.

    Args:
        registered: The set and how its computers are made.
        clock: Monotonic seconds.
        cpu: Seconds of CPU time of the calling thread.
    """

    def __init__(
        self,
        registered: Registered,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        assert registered.make is not None
        self.feature_set: Final = registered.feature_set
        self._registered = registered
        self._make = registered.resume or registered.make
        self._clock = clock
        self._cpu = cpu
        self._queue: deque[_Task] = deque()
        self._ready: deque[_Ready] = deque(maxlen=_MOST_QUEUED)
        self._wake = threading.Event()
        self._run = 0
        """Counts the threads: one that finds another number here ends."""
        self._thread: threading.Thread | None = None
        self._busy_since: float | None = None
        self._backoff = Backoff(*_PAUSE_SECONDS, spread=(1.0, 1.0))
        self._resume_at = 0.0
        self._resumed_at = clock()
        self._failed: tuple[int, Reason, str] | None = None
        """By a thread, for the event loop: the number of the thread, why, and what it said."""
        self.events = 0
        """Taken by the guest."""
        self.dropped = 0
        """Events that the guest was not shown because it was suspended."""
        self.vectors = 0
        """Vectors that it gave."""
        self.seconds = 0.0
        """CPU time that it has taken."""
        self.suspensions: Counter[Reason] = Counter()
        """By reason."""

    @property
    def suspended(self) -> bool:
        """True while it gets no events."""
        return self._resume_at > 0.0

    @property
    def is_busy(self) -> bool:
        """True while half of the events that may wait for it do: what is history should not be added now."""
        return len(self._queue) > _MOST_QUEUED // 2

    def start(self) -> None:
        """Starts its thread, which makes a computer at once: the first one may import libraries, which takes seconds.

        Nobody waits for it. Events that come meanwhile wait for it, and it is not taken for stuck.
        """
        self._begin()

    def offer(self, task: _Task) -> None:
        """Gives it an event. Called by the event loop, takes microseconds and never raises."""
        self._watch()
        if self.suspended and not self._may_resume():
            self.dropped += 1
            return
        if self._thread is None:
            self._begin()
        if len(self._queue) >= _MOST_QUEUED:
            self._suspend("behind", f"{_MOST_QUEUED} events wait")
            self.dropped += 1
            return
        self._queue.append(task)
        self._wake.set()

    def take_ready(self) -> list[_Ready]:
        """The newest vector of each instrument that has a new one, and the engine that it stands beside."""
        self._watch()
        ready = [self._ready.popleft() for _ in range(len(self._ready))]
        return list({snapshot.instrument: (engine, snapshot) for engine, snapshot in ready}.values())

    def close(self) -> None:
        """Has its thread end after the call that it is in; nobody waits for it."""
        self._run += 1
        self._wake.set()

    def _watch(self) -> None:
        """Suspends it if its thread has given up or does not return from a call."""
        failed, busy = self._failed, self._busy_since
        if failed is not None:
            self._failed = None
            if failed[0] == self._run:
                self._suspend(failed[1], failed[2])
        elif busy is not None and not self.suspended and self._clock() - busy > _LONGEST_CALL_SECONDS:
            self._suspend("stuck", f"a call has not returned for {_LONGEST_CALL_SECONDS:g} s")

    def _suspend(self, reason: Reason, detail: str) -> None:
        now = self._clock()
        if now - self._resumed_at > _SOUND_SECONDS:
            self._backoff.reset()
        pause = self._backoff.next_pause()
        self._resume_at = now + pause
        self._run += 1
        self._wake.set()
        # The thread keeps those that it began with, so that nothing of it comes after this.
        self._queue, self._ready = deque(), deque(maxlen=_MOST_QUEUED)
        self.suspensions[reason] += 1
        _log.error("worker.set_suspended", set=self.feature_set.id, reason=reason, detail=detail, seconds=pause)

    def _may_resume(self) -> bool:
        """Ends the suspension if its time is over and the thread has returned from its last call."""
        if self._clock() < self._resume_at or (self._thread is not None and self._thread.is_alive()):
            return False
        self._resume_at, self._resumed_at = 0.0, self._clock()
        self._thread = None
        _log.info("worker.set_resumed", set=self.feature_set.id)
        return True

    def _begin(self) -> None:
        self._busy_since = None
        self._thread = threading.Thread(
            target=self._keep_computing, args=(self._run, self._queue, self._ready), daemon=True
        )
        self._thread.start()

    def _keep_computing(self, run: int, queue: deque[_Task], ready: deque[_Ready]) -> None:
        """The thread."""
        computers: dict[str, tuple[FeatureEngine, Computer]] = {}
        with suppress(Exception):  # what is wrong with it will be seen with the first event
            self._make(_TRIAL)
        try:
            while run == self._run:
                self._wake.wait()
                self._wake.clear()
                used = self._round(run, queue, computers, ready)
                self.seconds += used
                time.sleep(max(_ROUND_SECONDS, used * (1 - _SHARE) / _SHARE))
        except ImpossibleValuesError as error:
            self._failed = (run, "impossible", str(error))
        except BaseException as error:  # whatever a guest raises is the guest's, SystemExit included
            _log.exception("worker.set_failed", set=self.feature_set.id)
            self._failed = (run, "raised", repr(error))

    def _round(
        self,
        run: int,
        queue: deque[_Task],
        computers: dict[str, tuple[FeatureEngine, Computer]],
        ready: deque[_Ready],
    ) -> float:
        """Takes all events that wait now, and gives the values of the instruments that changed; CPU seconds of that."""
        started = self._cpu()
        changed: dict[str, _Task] = {}
        for _ in range(len(queue)):
            task = queue.popleft()
            name = task.engine.instrument
            known = computers.get(name)
            self._busy_since = self._clock()
            if known is None or known[0] is not task.engine:
                known = computers[name] = (task.engine, self._make(name))
            if task.event is not None:
                known[1].on_event(task.event)
                self.events += 1
            changed[name] = task
            self._busy_since = None
            if run != self._run:
                return self._cpu() - started
            time.sleep(0)  # the event loop may have been waiting for the interpreter
        for name, task in changed.items():
            if task.outline is None:
                continue
            self._busy_since = self._clock()
            row = self._registered.row(computers[name][1].values())
            self._busy_since = None
            if run != self._run:
                break
            ready.append((task.engine, replace(task.outline, values=row, feature_set=self.feature_set)))
            self.vectors += 1
            time.sleep(0)
        return self._cpu() - started


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
        self._switch_seconds: float | None = None
        """What the interpreter had before."""

    @property
    def are_busy(self) -> bool:
        """True while history should wait for one of them."""
        return any(guest.is_busy for guest in self.all)

    def start(self) -> None:
        """Starts them, before there are events."""
        self._switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        for guest in self.all:
            guest.start()

    def take(self, engine: FeatureEngine, event: pb.MarketEvent | None, *, live: bool) -> None:
        """Shows an event to all sets.

        Args:
            engine: Has taken it in.
            event: None if there is nothing new but that the instrument is live now.
            live: False while the log is only read again.
        """
        if not self.all:
            return
        task = _Task(engine, event, engine.outline() if live else None)
        for guest in self.all:
            guest.offer(task)

    async def keep_writing(
        self,
        store: FeatureStore | ClusterFeatureStore,
        held: Callable[[], Iterable[FeatureEngine]],
        interval_seconds: float,
    ) -> None:
        """Writes their vectors for ever, beside those of `mf1`; ends only by cancellation.

        Args:
            store: Where the vectors go.
            held: The engines of the instruments that this worker holds now: others' vectors are another worker's.
            interval_seconds: Between two writes, at least.
        """
        reached = True
        while True:
            await asyncio.sleep(max(interval_seconds, _ROUND_SECONDS))
            ready = [guest.take_ready() for guest in self.all]
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
        """Has all of them end."""
        for guest in self.all:
            guest.close()
        if self._switch_seconds is not None:
            sys.setswitchinterval(self._switch_seconds)
