"""The process of one computed set: `python -m feature_cache.worker.set_process SOCKET SET LOG_LEVEL [FILE]`.

It is a child of the feature worker, which starts and ends it (see `guests.py`). It takes events from the socket and
answers with vectors. It ends when the worker does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from feature_cache import feature_sets, logs
from feature_cache.feature_set import FeatureSetError
from feature_cache.feature_sets import Computer, ImpossibleValuesError, Registered
from feature_cache.worker.set_messages import (
    Answer,
    Batch,
    Entry,
    Failed,
    Messages,
    Progress,
    Ready,
    Vector,
    batch_of,
    packed,
)
from pretrade.market.v1 import market_pb2 as pb

_log = structlog.get_logger(__name__)

_SHARE: Final = 0.5
"""Of a core that a set may take. A worker often has a quota of a core or two for everything in its container, and what
a set takes of it is no longer there for `mf1`."""
_SLICE_SECONDS: Final = 0.1
"""Of work between two answers at most, so that the worker sees that the set goes on."""
_NICE: Final = 10
"""Where a core is scarce, the worker comes first."""
_RECEIVE_BYTES: Final = 1 << 18
_TRIAL: Final = "TRIAL.TRIAL"
"""The instrument of a computer that is made at the start, and sees nothing: it may import what takes seconds."""
_PR_SET_PDEATHSIG: Final = 1


class Calculation:
    """Batches in, answers out.

    Args:
        registered: The set.
        tell: Gets the answers.
        clock: Monotonic seconds.
        cpu: Seconds of CPU time that the process has used.
        pause: Waits for so many seconds.
    """

    def __init__(
        self,
        registered: Registered,
        tell: Callable[[Answer], None],
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        make = registered.resume or registered.make
        assert make is not None
        self._make = make
        self._registered = registered
        self._tell = tell
        self._clock = clock
        self._cpu = cpu
        self._pause = pause
        self._computers: dict[int, Computer] = {}
        """By number of the engine."""
        self._engines: dict[str, int] = {}
        """The newest of each instrument."""
        self._wanted: dict[int, int] = {}
        """The engines whose vectors are wanted, and the number of the newest batch after which."""
        self._taken = self._batches = self._answered = 0
        self._told_at = clock()
        self._cpu_paused_at = cpu()

    def begin(self) -> None:
        """Makes a first computer; the set is ready then."""
        with suppress(Exception):  # what is wrong with it will be seen with the first event
            self._make(_TRIAL)
        self._tell(Ready(self._registered.feature_set.fingerprint))

    def take(self, batch: Batch) -> None:
        """Takes a batch. Whatever a guest raises comes out of it."""
        for entry in batch.entries:
            self._take(entry)
            self._taken += 1
            if self._clock() - self._told_at > _SLICE_SECONDS:
                self._answer(())
        self._batches += 1
        self._wanted.update(dict.fromkeys(batch.wanted, self._batches))

    def answer(self) -> None:
        """Gives the vectors that are wanted, after all batches that have come.

        Raises:
            ImpossibleValuesError: They are none that the set may have.
        """
        vectors = []
        for engine, batch in self._wanted.items():
            computer = self._computers.get(engine)
            if computer is not None:  # else the instrument has begun again since
                vectors.append(Vector(batch, engine, self._registered.row(computer.values())))
        self._wanted.clear()
        self._answered = self._batches
        self._answer(vectors)

    def _take(self, entry: Entry) -> None:
        event = pb.MarketEvent.FromString(entry.event)
        if entry.begins:
            name = event.instrument
            self._computers.pop(self._engines.get(name, -1), None)
            self._engines[name] = entry.engine
            self._computers[entry.engine] = self._make(name)
        self._computers[entry.engine].on_event(event)

    def _answer(self, vectors: Sequence[Vector]) -> None:
        """Says how far it is, and leaves the core to others for a while."""
        used = self._cpu()
        self._tell(Progress(self._taken, self._answered, used, tuple(vectors)))
        self._pause((used - self._cpu_paused_at) * (1 - _SHARE) / _SHARE)
        self._told_at, self._cpu_paused_at = self._clock(), self._cpu()


def serve(registered: Registered, worker: socket.socket) -> None:
    """Computes until the worker ends, or the set fails."""

    def tell(answer: Answer) -> None:
        worker.sendall(packed(answer))

    messages = Messages()
    calculation = Calculation(registered, tell)
    try:
        calculation.begin()
        while data := worker.recv(_RECEIVE_BYTES):
            for message in messages.take(data):
                calculation.take(batch_of(message))
            calculation.answer()
    except (BrokenPipeError, ConnectionResetError):
        return  # the worker has ended
    except ImpossibleValuesError as error:
        failed = Failed("impossible", str(error))
    except BaseException as error:  # whatever a guest raises is the guest's, SystemExit included
        _log.exception("worker.set_failed", set=registered.feature_set.id)
        failed = Failed("raised", repr(error))
    else:
        return
    with suppress(OSError):
        tell(failed)


def main(arguments: list[str]) -> int:
    """Runs the process; returns its exit code."""
    number, set_id, level, *file = arguments
    _end_with_the_worker()
    os.nice(_NICE)
    logs.configure(level, "worker")
    with socket.socket(fileno=int(number)) as worker:
        try:
            found = feature_sets.load(Path(file[0]) if file else None).by_id(set_id)
        except FeatureSetError as error:
            found = None
            _log.error("worker.set_not_loaded", set=set_id, error=str(error))
        if found is None or found.make is None:
            worker.sendall(packed(Failed("raised", f"{set_id} can no longer be loaded; the worker's log says more")))
            return 1
        serve(found, worker)
    return 0


def _end_with_the_worker() -> None:
    """Has the kernel end this process with the worker, whatever a guest is doing. The worker alone heeds signals."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
