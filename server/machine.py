"""What a server process uses of the machine that it runs on: time, randomness, threads, files and the network.

The composition root hands a `Machine` to every part that needs something of it. Production has one, the real one. The
simulation in `tests/simulation/` starts the same composition on a machine whose time, disk and network it controls, so
a part that reads the clock, starts a thread or syncs a file does so through the `Machine`. What asyncio offers (timers,
sockets, subprocesses, `asyncio.to_thread`) needs nothing here, because the simulation replaces the event loop.
"""

from __future__ import annotations

import os
import queue
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import grpc.aio
from prometheus_client import start_http_server

from pretrade.client.file_lock import take_lock

_T = TypeVar("_T")
_REWRITTEN_AT_ONCE: Final = 2**20


class Thread(Protocol):
    """A thread that was started."""

    def join(self, timeout: float | None = None) -> None:
        """Waits until it has ended, for so many seconds at most."""


class Event(Protocol):
    """As `threading.Event`."""

    def set(self) -> None: ...  # noqa: D102
    def wait(self, timeout: float | None = None) -> bool: ...  # noqa: D102


class Queue(Protocol, Generic[_T]):
    """As `queue.SimpleQueue`."""

    def put(self, item: _T) -> None: ...  # noqa: D102
    def get(self, block: bool = True, timeout: float | None = None) -> _T: ...  # noqa: D102
    def get_nowait(self) -> _T: ...  # noqa: D102


class Threads:
    """The threads of this process, and what they wait with."""

    def start(self, run: Callable[[], object], name: str) -> Thread:
        """Runs a function in a thread that does not keep the process alive."""
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def pool(self, name: str) -> Executor:
        """One thread for work that is handed over piece by piece."""
        return ThreadPoolExecutor(1, thread_name_prefix=name)

    def queue(self) -> Queue[Any]:
        """Hands things from thread to thread."""
        return queue.SimpleQueue()

    def event(self) -> Event:
        """Lets threads wait for something that happens once."""
        return threading.Event()

    def sleep(self, seconds: float) -> None:
        """Blocks the thread that calls it."""
        time.sleep(seconds)


class Identity(NamedTuple):
    """Tells a file's content from every other that had the same name."""

    inode: int
    modified_ns: int
    size: int


class Volume(NamedTuple):
    """The file system that holds a directory."""

    total_bytes: int
    """All that it can hold; 0 where it does not say."""
    free_bytes: int
    """What a process without privileges may still write."""


class Files:
    """Small files that are read and replaced whole. Every method blocks and raises `OSError`."""

    def read(self, path: Path) -> tuple[bytes, Identity]:
        """A file's content, and which content that is."""
        with path.open("rb") as file:
            return file.read(), _identity(os.fstat(file.fileno()))

    def identity(self, path: Path) -> Identity:
        """Which content a file has."""
        return _identity(path.stat())

    def write(self, path: Path, content: bytes) -> Identity:
        """Makes or overwrites a file. Its content survives the loss of power; the name of a new file does not yet."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - opened already, with its mode
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            return _identity(os.fstat(descriptor))

    def rewrite(self, path: Path) -> None:
        """Writes a file's content over itself and syncs it; nothing where there is no such file.

        What a sync has failed to write may be nowhere but in memory, where it can be read all the same, and no later
        sync writes it unless it was written again.
        """
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            offset = 0
            while content := os.pread(descriptor, _REWRITTEN_AT_ONCE, offset):
                offset += os.pwrite(descriptor, content, offset)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Gives a file another's name, at once for everybody who opens it. Power lost may undo that."""
        source.replace(target)

    def sync_directory(self, path: Path) -> None:
        """Has the names in a directory survive the loss of power, as they are now."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def volume(self, directory: Path) -> Volume:
        """The file system that holds a directory."""
        found = os.statvfs(directory)
        return Volume(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize)

    def lock(self, path: Path) -> int | None:
        """Takes the lock of a file, made where it is missing.

        Returns:
            What `unlock` takes, or None while another process has the lock. The lock is also released when this process
            dies.
        """
        return take_lock(path)

    def unlock(self, lock: int) -> None:
        """Gives a lock back."""
        os.close(lock)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine; the defaults are the real one."""

    host_name: Callable[[], str] = socket.gethostname
    """What this machine is called."""
    process_name: Callable[[], str] = field(default=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """What tells the process that runs from all others that run now."""
    clock: Callable[[], float] = time.monotonic
    """Monotonic seconds, the event loop's own."""
    wall_clock_ns: Callable[[], int] = time.time_ns
    """Nanoseconds since the Unix epoch. May step."""
    uniform: Callable[[], float] = random.random
    """Uniform in [0, 1)."""
    random_bytes: Callable[[int], bytes] = os.urandom
    """This many random bytes, for secrets."""
    threads: Threads = field(default_factory=Threads)
    files: Files = field(default_factory=Files)
    grpc_server: Callable[..., grpc.aio.Server] = grpc.aio.server
    """Makes a server; it opens its ports itself."""
    grpc_channel: Callable[..., grpc.aio.Channel] = grpc.aio.insecure_channel
    """Makes a channel to an address."""
    dials: bool = True
    """Whether connections that the event loop opens reach that address, too."""
    http_server: Callable[..., Any] = start_http_server
    """Serves metrics on a port, from a thread; returns the server and its thread."""

    def wall_clock(self) -> float:
        """Seconds since the Unix epoch. May step."""
        return self.wall_clock_ns() / 1e9


REAL = Machine()
"""The machine that this runs on."""


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_ino, status.st_mtime_ns, status.st_size)
