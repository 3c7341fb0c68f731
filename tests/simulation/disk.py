"""A disk that knows what was synced.

What a process writes is seen by every process at once, and survives the death of any of them. Only what was synced
survives the loss of power: of everything else each sector of 512 bytes is there or not as chance has it, a file may
have its new length without its new content, and of the changes to a directory's names the first few may have happened.
A sync that fails has made nothing durable, and what it should have synced is not synced by the next one either, unless
its page is written once more.

A disk can be slow, full, or fail; every operation takes its time, and its process may die while it lasts.
"""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import greenlet

from server.machine import Files, Identity, Volume
from simulation.world import World

if TYPE_CHECKING:
    from simulation.machine import SimulatedMachine

SECTOR_BYTES: Final = 512
PAGE_BYTES: Final = 4096
"""What the machine's memory keeps of a file at once, and writes at once."""
_OPERATION_SECONDS: Final = 2e-6


class File:
    """What an inode holds, and how to take back what was not synced."""

    __slots__ = ("changed_ns", "content", "inode", "lost", "missing", "unsynced", "writes")

    def __init__(self, inode: int, changed_ns: int) -> None:
        self.inode = inode
        self.changed_ns = changed_ns
        self.content = bytearray()
        self.writes = 0
        """Changes of its content so far."""
        self.unsynced: list[_Write] = []
        self.lost: list[_Write] = []
        """Writes that a failed sync has given up, and no sync has succeeded since."""
        self.missing: dict[int, bytes] = {}
        """Pages that a failed sync has given up and nobody has written again, and what the disk has in their place: no
        later sync makes them durable."""


@dataclass(slots=True)
class _Write:
    """A change of a file's content."""

    number: int
    """Rises with every change of the file."""
    offset: int
    new: bytes
    old: bytes
    old_size: int
    new_size: int


@dataclass(slots=True)
class Weather:
    """How a disk does now."""

    sync_seconds: tuple[float, float] = (2e-4, 1e-3)
    """Shortest and longest sync."""
    sync_failures: float = 0.0
    """Share of the syncs that fail."""
    fails_write: bool = False
    stuck_until: float = 0.0
    """Nothing is done before this instant."""


@dataclass(slots=True)
class _Directory:
    names: dict[str, File] = field(default_factory=dict)
    durable: dict[str, File] = field(default_factory=dict)
    """As of the last sync of the directory."""
    changes: list[dict[str, File | None]] = field(default_factory=list)
    """Since then: names and what they stand for, None for one that was removed."""


class Disk:
    """The disk of one host.

    Args:
        world: Whose time it takes.
        name: The folder under which it is mounted, and its name in the trace.
        capacity: Bytes that fit on it.
        wall_clock_ns: Of its host; dates files.
    """

    def __init__(self, world: World, name: str, capacity: int, wall_clock_ns: Callable[[], int]) -> None:
        self.world = world
        self.name = name
        self.size = self.capacity = capacity
        """What fits on it when others have nothing there, and what does now."""
        self.weather = Weather()
        self._wall_clock_ns = wall_clock_ns
        self._chance = world.random(f"disk/{name}")
        self._directories: dict[str, _Directory] = {}
        self._inodes = 0
        self._used = 0
        self.on_small_file: Callable[[str, bytes], None] = lambda name, content: None
        """Told of every small file that takes another's place."""
        self.on_directory_synced: Callable[[], None] = lambda: None
        """Told when whatever took another's place would survive a loss of power."""
        self.instant = False
        """Whether nothing on it takes time."""
        self.locks: dict[str, object] = {}
        """Who holds the lock of a file."""
        self.syncs = self.failures = 0

    # Time.

    def take(self, seconds: float) -> None:
        """Lets an operation take its time; nothing in the hub, which looks at a disk and takes none."""
        fiber = greenlet.getcurrent()
        owner: SimulatedMachine | None = getattr(fiber, "owner", None)
        if owner is None or self.instant:
            return
        owner.threads.check_alive()
        wait = max(seconds, self.weather.stuck_until - self.world.now)
        if wait > 0:
            owner.threads.sleep(wait)

    # Files by name.

    def find(self, path: str) -> File | None:
        """The file of this name."""
        directory, name = os.path.split(path)
        return self._directory(directory).names.get(name)

    def create(self, path: str) -> File:
        """The file of this name, made where it is missing.

        Raises:
            OSError: The disk is full.
        """
        directory, name = os.path.split(path)
        entries = self._directory(directory)
        if (file := entries.names.get(name)) is None:
            self._check_writable(1)
            self._inodes += 1
            file = File(self._inodes, self._wall_clock_ns())
            self._enter(entries, name, file)
        return file

    def remove(self, path: str) -> bool:
        """Removes a name; False when there is none."""
        directory, name = os.path.split(path)
        entries = self._directory(directory)
        if name not in entries.names:
            return False
        self._used -= len(entries.names[name].content)
        self._enter(entries, name, None)
        return True

    def rename(self, source: str, target: str) -> None:
        """Gives a file another name in the same directory; whatever had that has none any more."""
        directory, name = os.path.split(source)
        entries = self._directory(directory)
        file = entries.names.get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", source)
        target_name = os.path.basename(target)  # noqa: PTH119 - names, not files of this machine
        if (replaced := entries.names.get(target_name)) is not None:
            self._used -= len(replaced.content)
        entries.names[target_name] = file
        del entries.names[name]
        entries.changes.append({target_name: file, name: None})  # at once, or not at all

    def sync_directory(self, path: str) -> None:
        """Makes the names in a directory durable."""
        entries = self._directory(path)
        entries.durable = dict(entries.names)
        entries.changes.clear()

    def names(self) -> Iterator[str]:
        """Every file's path."""
        for directory, entries in self._directories.items():
            for name in entries.names:
                yield f"{directory}/{name}"

    def _directory(self, path: str) -> _Directory:
        return self._directories.setdefault(path, _Directory())

    @staticmethod
    def _enter(entries: _Directory, name: str, file: File | None) -> None:
        if file is None:
            del entries.names[name]
        else:
            entries.names[name] = file
        entries.changes.append({name: file})

    # Contents.

    def write(self, file: File, offset: int, data: bytes) -> None:
        """Writes; seen by everybody at once, durable with the next sync.

        Raises:
            OSError: The disk is full, or fails.
        """
        content = file.content
        size = len(content)
        end = offset + len(data)
        self._check_writable(max(0, end - size))
        file.writes += 1
        file.unsynced.append(_Write(file.writes, offset, data, bytes(content[offset:end]), size, max(size, end)))
        if size < offset:
            content.extend(bytes(offset - size))
        content[offset:end] = data
        self._used += max(0, end - size)
        file.changed_ns = self._wall_clock_ns()

    def truncate(self, file: File, size: int) -> None:
        """Cuts a file off."""
        content = file.content
        old = len(content)
        if size < old:
            file.writes += 1
            file.unsynced.append(_Write(file.writes, size, b"", bytes(content[size:]), old, size))
            del content[size:]
            self._used -= old - size
        file.changed_ns = self._wall_clock_ns()

    def sync(self, file: File) -> None:
        """Makes a file's content durable, which takes a while.

        Raises:
            OSError: It failed. What it should have synced may be lost whatever comes later.
        """
        weather = self.weather
        if not self.instant:
            self.take(self._chance.uniform(*weather.sync_seconds))
        self.syncs += 1
        if not self.instant:
            digest = 0
            for write in file.unsynced:
                digest = zlib.crc32(write.new, digest)
            self.world.note(self.name, "sync", file.inode, len(file.unsynced), digest)
        if self._sync_fails():
            self.failures += 1
            file.lost += file.unsynced
            file.unsynced.clear()
            raise OSError(errno.EIO, "the disk failed to sync")
        if file.lost or file.missing:
            _give_up(file)
        file.unsynced.clear()

    def _sync_fails(self) -> bool:
        share = self.weather.sync_failures
        return share == 1.0 or (share > 0.0 and self._chance.random() < share)

    def _check_writable(self, more: int) -> None:
        if self.weather.fails_write:
            self.failures += 1
            raise OSError(errno.EIO, "the disk failed to write")
        if more and self._used + more > self.capacity:
            self.failures += 1
            raise OSError(errno.ENOSPC, "the disk is full")

    @property
    def used_bytes(self) -> int:
        """What its files fill."""
        return self._used

    @property
    def free_bytes(self) -> int:
        """What still fits."""
        return max(0, self.capacity - self._used)

    # Power.

    def lose_power(self) -> None:
        """Leaves what was synced, and of everything else what chance leaves; nobody has a file open any more."""
        chance = self._chance
        self.locks.clear()
        for entries in self._directories.values():
            names = dict(entries.durable)
            for change in entries.changes[: chance.randint(0, len(entries.changes))]:
                names |= change  # type: ignore[arg-type]  # those that are gone go next
            names = {name: file for name, file in names.items() if file is not None}
            entries.names, entries.durable = names, dict(names)
            entries.changes.clear()
        files = list(dict.fromkeys(file for one in self._directories.values() for file in one.names.values()))
        for file in files:
            _lose(file, chance)
        self._used = sum(len(file.content) for file in files)


def _give_up(file: File) -> None:
    """After a sync that succeeded: of what failed ones gave up, only pages that were written again are on the disk."""
    image = bytearray(file.content)
    _take_back(image, _unsynced(file))
    for page, old in file.missing.items():
        image[page * PAGE_BYTES : page * PAGE_BYTES + len(old)] = old[: max(0, len(image) - page * PAGE_BYTES)]
    written = {
        page
        for write in file.unsynced
        for page in range(write.offset // PAGE_BYTES, -(-(write.offset + len(write.new)) // PAGE_BYTES))
    }
    file.lost.clear()
    file.missing.clear()
    for start in range(0, len(file.content), PAGE_BYTES):
        now = bytes(file.content[start : start + PAGE_BYTES])
        old = bytes(image[start : start + len(now)]).ljust(len(now), b"\0")
        if old != now and start // PAGE_BYTES not in written:
            file.missing[start // PAGE_BYTES] = old


def _unsynced(file: File) -> list[_Write]:
    return sorted(file.lost + file.unsynced, key=lambda write: write.number)


def _take_back(content: bytearray, writes: list[_Write]) -> None:
    for write in reversed(writes):
        del content[write.old_size :]
        if len(content) < write.old_size:
            content.extend(bytes(write.old_size - len(content)))
        content[write.offset : write.offset + len(write.old)] = write.old


def _lose(file: File, chance: random.Random) -> None:
    """Leaves of a file what a loss of power leaves."""
    writes = _unsynced(file)
    content = file.content
    _take_back(content, writes)
    for page, old in file.missing.items():
        for start in range(0, len(old), SECTOR_BYTES):
            offset, piece = page * PAGE_BYTES + start, old[start : start + SECTOR_BYTES]
            if chance.random() < 0.5:
                content[offset : offset + len(piece)] = piece[: max(0, len(content) - offset)]
    file.lost.clear()
    file.missing.clear()
    file.unsynced.clear()
    if not writes:
        return
    share = chance.choice((0.0, 0.0, 0.3, 0.7, 1.0))
    for write in writes:
        if write.new_size < write.old_size:
            if chance.random() < share:
                del content[write.new_size :]
            continue
        for start in range(0, len(write.new), SECTOR_BYTES):
            if chance.random() >= share:
                continue
            offset = write.offset + start
            piece = write.new[start : start + SECTOR_BYTES]
            if len(content) < offset:
                content.extend(bytes(offset - len(content)))
            content[offset : offset + len(piece)] = piece


class SimulatedFiles(Files):
    """Small files on a simulated disk, as one process sees them."""

    def __init__(self, disk: Disk, owner: SimulatedMachine) -> None:
        self._disk = disk
        self._owner = owner

    def read(self, path: Path) -> tuple[bytes, Identity]:
        """See `Files`."""
        self._disk.take(_OPERATION_SECONDS)
        file = self._found(path)
        return bytes(file.content), _identity(file)

    def identity(self, path: Path) -> Identity:
        """See `Files`."""
        self._owner.threads.check_alive()  # takes no time worth telling: it is done all the time
        return _identity(self._found(path))

    def write(self, path: Path, content: bytes) -> Identity:
        """See `Files`."""
        disk = self._disk
        disk.take(_OPERATION_SECONDS)
        file = disk.create(str(path))
        disk.truncate(file, 0)
        disk.take(_OPERATION_SECONDS)
        disk.write(file, 0, content)
        disk.world.note(disk.name, "write", path.name, len(content))
        disk.sync(file)
        return _identity(file)

    def rewrite(self, path: Path) -> None:
        """See `Files`."""
        if (file := self._disk.find(str(path))) is not None:
            self._disk.write(file, 0, bytes(file.content))
            self._disk.take(_OPERATION_SECONDS)
            self._disk.sync(file)

    def replace(self, source: Path, target: Path) -> None:
        """See `Files`."""
        self._disk.take(_OPERATION_SECONDS)
        self._disk.rename(str(source), str(target))
        self._disk.world.note(self._disk.name, "replace", target.name)
        self._disk.on_small_file(target.name, bytes(self._found(target).content))

    def sync_directory(self, path: Path) -> None:
        """See `Files`."""
        self._disk.take(self._disk.weather.sync_seconds[0])
        if self._disk.weather.sync_failures == 1.0:
            raise OSError(errno.EIO, "the disk failed to sync")
        self._disk.sync_directory(str(path))
        self._disk.on_directory_synced()

    def volume(self, directory: Path) -> Volume:
        """See `Files`."""
        self._owner.threads.check_alive()
        return Volume(self._disk.size, self._disk.free_bytes)

    def lock(self, path: Path) -> int | None:
        """See `Files`."""
        self._owner.threads.check_alive()
        file = self._disk.create(str(path))
        if str(path) in self._disk.locks:
            return None
        self._disk.locks[str(path)] = self._owner
        return file.inode

    def unlock(self, lock: int) -> None:
        """See `Files`."""
        for path, owner in list(self._disk.locks.items()):
            found = self._disk.find(path)
            if owner is self._owner and found is not None and found.inode == lock:
                del self._disk.locks[path]

    def _found(self, path: Path) -> File:
        file = self._disk.find(str(path))
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return file


def _identity(file: File) -> Identity:
    return Identity(file.inode, file.changed_ns, len(file.content))
