"""Gives SQLite the simulated disks: a VFS, registered in the very library that Python's `sqlite3` uses.

The journal's own code runs on it unchanged, with SQLite's own pages, log and recovery. While a simulation runs, this
VFS is SQLite's default one; a path names a disk by its first folder.
"""

from __future__ import annotations

import ctypes as c
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import greenlet

from simulation.disk import Disk, File
from simulation.world import ProcessKilled

if TYPE_CHECKING:
    from random import Random

_OK, _BUSY, _CANTOPEN, _NOTFOUND = 0, 5, 14, 12
_IOERR: Final = 10
_SHORT_READ: Final = 522
_IOERR_WRITE: Final = 778
_IOERR_FSYNC: Final = 1034
_FULL: Final = 13
_DELETE_NOENT: Final = 5898
_CREATE: Final = 0x4
_MAIN_JOURNAL, _WAL = 0x800, 0x80000
_SHARED, _RESERVED, _PENDING, _EXCLUSIVE = 1, 2, 3, 4
_SHM_UNLOCK, _SHM_SHARED = 1, 4
_SLOTS: Final = 8
_NAME: Final = b"simulated"


class UnavailableError(Exception):
    """This interpreter's SQLite cannot be given another VFS."""


class _Handle:
    """An open file of SQLite."""

    __slots__ = ("disk", "file", "is_new_log", "level", "owner", "path", "shm")

    def __init__(self, disk: Disk, path: str, file: File, is_new_log: bool) -> None:
        self.disk = disk
        self.path = path
        self.file = file
        self.is_new_log = is_new_log
        self.level = 0
        self.owner: Any = getattr(greenlet.getcurrent(), "owner", None)
        self.shm = False


class _Shm:
    """The memory that the connections to one database share, and its locks."""

    __slots__ = ("exclusive", "regions", "shared", "users")

    def __init__(self) -> None:
        self.regions: list[Any] = []
        self.users: set[_Handle] = set()
        self.exclusive: list[_Handle | None] = [None] * _SLOTS
        self.shared: list[set[_Handle]] = [set() for _ in range(_SLOTS)]


class _File(c.Structure):
    _fields_ = (("methods", c.c_void_p), ("number", c.c_int64))


_FILE = c.POINTER(_File)
_INT = c.POINTER(c.c_int)
_INT64 = c.POINTER(c.c_int64)
_F = c.CFUNCTYPE
_METHODS: Final[dict[str, Any]] = {
    "close": _F(c.c_int, _FILE),
    "read": _F(c.c_int, _FILE, c.c_void_p, c.c_int, c.c_int64),
    "write": _F(c.c_int, _FILE, c.c_void_p, c.c_int, c.c_int64),
    "truncate": _F(c.c_int, _FILE, c.c_int64),
    "sync": _F(c.c_int, _FILE, c.c_int),
    "file_size": _F(c.c_int, _FILE, _INT64),
    "lock": _F(c.c_int, _FILE, c.c_int),
    "unlock": _F(c.c_int, _FILE, c.c_int),
    "check_reserved": _F(c.c_int, _FILE, _INT),
    "file_control": _F(c.c_int, _FILE, c.c_int, c.c_void_p),
    "sector_size": _F(c.c_int, _FILE),
    "characteristics": _F(c.c_int, _FILE),
    "shm_map": _F(c.c_int, _FILE, c.c_int, c.c_int, c.c_int, c.POINTER(c.c_void_p)),
    "shm_lock": _F(c.c_int, _FILE, c.c_int, c.c_int, c.c_int),
    "shm_barrier": _F(None, _FILE),
    "shm_unmap": _F(c.c_int, _FILE, c.c_int),
}
_CALLS: Final[dict[str, Any]] = {
    "open": _F(c.c_int, c.c_void_p, c.c_char_p, _FILE, c.c_int, _INT),
    "delete": _F(c.c_int, c.c_void_p, c.c_char_p, c.c_int),
    "access": _F(c.c_int, c.c_void_p, c.c_char_p, c.c_int, _INT),
    "full_pathname": _F(c.c_int, c.c_void_p, c.c_char_p, c.c_int, c.c_void_p),
    "dl_open": c.c_void_p,
    "dl_error": c.c_void_p,
    "dl_sym": c.c_void_p,
    "dl_close": c.c_void_p,
    "randomness": _F(c.c_int, c.c_void_p, c.c_int, c.c_void_p),
    "sleep": _F(c.c_int, c.c_void_p, c.c_int),
    "current_time": _F(c.c_int, c.c_void_p, c.POINTER(c.c_double)),
    "last_error": _F(c.c_int, c.c_void_p, c.c_int, c.c_void_p),
    "current_time_64": _F(c.c_int, c.c_void_p, _INT64),
}


class _IoMethods(c.Structure):
    _fields_ = [("version", c.c_int), *_METHODS.items()]


class _Vfs(c.Structure):
    _fields_ = [
        ("version", c.c_int),
        ("file_bytes", c.c_int),
        ("max_path", c.c_int),
        ("next", c.c_void_p),
        ("name", c.c_char_p),
        ("data", c.c_void_p),
        *_CALLS.items(),
    ]


class SimulatedSqlite:
    """The VFS. There is one in this process, made when it is first wanted.

    Raises:
        UnavailableError: `sqlite3` is linked in a way that hides its library's functions.
    """

    def __init__(self) -> None:
        self._library = _library()
        self._library.sqlite3_vfs_find.restype = c.c_void_p
        self._library.sqlite3_vfs_register.argtypes = (c.c_void_p, c.c_int)
        self._real = self._library.sqlite3_vfs_find(None)
        self._disks: dict[str, Disk] = {}
        self._handles: dict[int, _Handle] = {}
        self._shared: dict[tuple[str, str], _Shm] = {}
        self._graveyard: list[_Shm] = []
        """Memory that a connection of a killed process may still point to."""
        self._opened = 0
        self._chance: Random | None = None
        self._methods = _IoMethods(2, *(kind(getattr(self, f"_{name}")) for name, kind in _METHODS.items()))
        calls = [None if kind is c.c_void_p else kind(getattr(self, f"_{name}")) for name, kind in _CALLS.items()]
        self._vfs = _Vfs(2, c.sizeof(_File), 512, None, _NAME, None, *calls)

    def begin(self, chance: Random) -> None:
        """Makes this SQLite's VFS, with no disks."""
        self._disks.clear()
        self._handles.clear()
        self._shared.clear()
        self._graveyard.clear()
        self._chance = chance
        self._library.sqlite3_vfs_register(c.addressof(self._vfs), 1)

    def reseed(self, chance: Random) -> None:
        """Has SQLite's own source of chance begin anew: log files begin with some of it."""
        self._chance = chance
        self._library.sqlite3_randomness(0, None)

    def end(self) -> None:
        """Gives SQLite its real one back."""
        self._library.sqlite3_vfs_register(self._real, 1)
        self._disks.clear()

    def mount(self, disk: Disk) -> None:
        """Puts a disk's files under `/<its name>/`."""
        self._disks[disk.name] = disk

    def close_all_of(self, owner: object) -> None:
        """Closes what a process had open, as its death does."""
        for handle in self._handles.values():
            if handle.owner is owner:
                self._let_go(handle)

    def forget_memory(self, disk: Disk) -> None:
        """Clears the shared memory of a disk's databases, as the loss of power does."""
        for key in [key for key in self._shared if key[0] == disk.name]:
            self._graveyard.append(self._shared.pop(key))

    def _let_go(self, handle: _Handle) -> None:
        handle.level = 0
        if handle.shm:
            self._shm_leave(handle)

    # What SQLite calls. None of these may raise.

    def _usable(self, file: Any) -> _Handle | None:
        """The handle, while its process lives and its simulation lasts."""
        handle = self._handles.get(file[0].number)
        return None if handle is None or (handle.owner is not None and handle.owner.dead) else handle

    def _disk_of(self, path: str) -> Disk | None:
        parts = path.split("/", 2)
        return self._disks.get(parts[1]) if len(parts) > 2 else None

    def _open(self, _vfs: int, name: bytes | None, file: Any, flags: int, out: Any) -> int:
        self._opened += 1
        number = self._opened
        file[0].methods = None
        try:
            if name is None:
                return _CANTOPEN  # a temporary file, which the journal never needs
            path = name.decode()
            disk = self._disk_of(path)
            if disk is None:
                return _CANTOPEN
            disk.take(0.0)
            found = disk.find(path)
            if found is None and not flags & _CREATE:
                return _CANTOPEN
            is_new_log = found is None and bool(flags & (_MAIN_JOURNAL | _WAL))
            self._handles[number] = _Handle(disk, path, found or disk.create(path), is_new_log)
        except (OSError, ProcessKilled):
            return _CANTOPEN
        file[0].number = number
        file[0].methods = c.addressof(self._methods)
        if out:
            out[0] = flags
        return _OK

    def _close(self, file: Any) -> int:
        handle = self._handles.pop(file[0].number, None)
        if handle is not None:
            self._let_go(handle)
        return _OK

    def _read(self, file: Any, buffer: int, amount: int, offset: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        content = handle.file.content
        found = bytes(content[offset : offset + amount])
        c.memmove(buffer, found, len(found))
        if len(found) < amount:
            c.memset(buffer + len(found), 0, amount - len(found))
            return _SHORT_READ
        return _OK

    def _write(self, file: Any, buffer: int, amount: int, offset: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        try:
            handle.disk.take(0.0)
            handle.disk.write(handle.file, offset, c.string_at(buffer, amount))
        except OSError as error:
            return _FULL if error.errno == 28 else _IOERR_WRITE
        except ProcessKilled:
            return _IOERR_WRITE
        return _OK

    def _truncate(self, file: Any, size: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        try:
            handle.disk.take(0.0)
        except ProcessKilled:
            return _IOERR
        handle.disk.truncate(handle.file, size)
        return _OK

    def _sync(self, file: Any, _flags: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        try:
            handle.disk.sync(handle.file)
            if handle.is_new_log:
                handle.disk.sync_directory(str(Path(handle.path).parent))
                handle.is_new_log = False
        except (OSError, ProcessKilled):
            return _IOERR_FSYNC
        return _OK

    def _file_size(self, file: Any, out: Any) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        out[0] = len(handle.file.content)
        return _OK

    def _lock(self, file: Any, level: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        if handle.level >= level:
            return _OK
        others = [
            other.level
            for other in self._handles.values()
            if other is not handle and other.file is handle.file and other.level
        ]
        highest = max(others, default=0)
        if level == _SHARED:
            if highest >= _PENDING:
                return _BUSY
        elif highest >= _RESERVED:
            return _BUSY
        elif level == _EXCLUSIVE and others:
            handle.level = _PENDING
            return _BUSY
        handle.level = level
        return _OK

    def _unlock(self, file: Any, level: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        handle.level = level
        return _OK

    def _check_reserved(self, file: Any, out: Any) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        out[0] = int(any(other.file is handle.file and other.level >= _RESERVED for other in self._handles.values()))
        return _OK

    def _file_control(self, _file: Any, _operation: int, _argument: int) -> int:
        return _NOTFOUND

    def _sector_size(self, _file: Any) -> int:
        return 512

    def _characteristics(self, _file: Any) -> int:
        return 0

    def _shm_of(self, handle: _Handle) -> _Shm:
        return self._shared.setdefault((handle.disk.name, handle.path), _Shm())

    def _shm_map(self, file: Any, region: int, size: int, extend: int, out: Any) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        shm = self._shm_of(handle)
        if not shm.users:
            # Nobody was there: what it held counts for nothing.
            self._graveyard.append(shm)
            shm = self._shared[handle.disk.name, handle.path] = _Shm()
        shm.users.add(handle)
        handle.shm = True
        while len(shm.regions) <= region:
            if not extend:
                out[0] = None
                return _OK
            shm.regions.append(c.create_string_buffer(size))
        out[0] = c.addressof(shm.regions[region])
        return _OK

    def _shm_lock(self, file: Any, offset: int, count: int, flags: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        shm = self._shm_of(handle)
        slots = range(offset, offset + count)
        if flags & _SHM_UNLOCK:
            for slot in slots:
                shm.shared[slot].discard(handle)
                if shm.exclusive[slot] is handle:
                    shm.exclusive[slot] = None
            return _OK
        for slot in slots:
            if shm.exclusive[slot] not in (None, handle):
                return _BUSY
            if not flags & _SHM_SHARED and shm.shared[slot] - {handle}:
                return _BUSY
        for slot in slots:
            if flags & _SHM_SHARED:
                shm.shared[slot].add(handle)
            else:
                shm.exclusive[slot] = handle
        return _OK

    def _shm_barrier(self, _file: Any) -> None:
        """Nothing: only one thing runs at a time."""

    def _shm_unmap(self, file: Any, delete: int) -> int:
        if (handle := self._usable(file)) is None:
            return _IOERR
        self._shm_leave(handle)
        if delete:
            self._graveyard.append(self._shared.pop((handle.disk.name, handle.path), _Shm()))
        return _OK

    def _shm_leave(self, handle: _Handle) -> None:
        shm = self._shared.get((handle.disk.name, handle.path))
        handle.shm = False
        if shm is None:
            return
        shm.users.discard(handle)
        for slot in range(_SLOTS):
            shm.shared[slot].discard(handle)
            if shm.exclusive[slot] is handle:
                shm.exclusive[slot] = None

    def _delete(self, _vfs: int, name: bytes, sync: int) -> int:
        path = name.decode()
        disk = self._disk_of(path)
        try:
            if disk is None:
                return _DELETE_NOENT
            disk.take(0.0)
            if not disk.remove(path):
                return _DELETE_NOENT
            if sync:
                disk.sync_directory(str(Path(path).parent))
        except (OSError, ProcessKilled):
            return _IOERR
        return _OK

    def _access(self, _vfs: int, name: bytes, _flags: int, out: Any) -> int:
        path = name.decode()
        disk = self._disk_of(path)
        out[0] = int(disk is not None and disk.find(path) is not None)
        return _OK

    def _full_pathname(self, _vfs: int, name: bytes, _size: int, out: int) -> int:
        c.memmove(out, name + b"\0", len(name) + 1)
        return _OK

    def _randomness(self, _vfs: int, size: int, out: int) -> int:
        assert self._chance is not None
        c.memmove(out, self._chance.randbytes(size), size)
        return size

    def _sleep(self, _vfs: int, microseconds: int) -> int:
        owner = getattr(greenlet.getcurrent(), "owner", None)
        if owner is not None:
            with suppress(ProcessKilled):
                owner.threads.sleep(microseconds / 1e6)
        return microseconds

    def _current_time(self, _vfs: int, out: Any) -> int:
        out[0] = 2460000.5
        return _OK

    def _last_error(self, _vfs: int, _size: int, _out: int) -> int:
        return _OK

    def _current_time_64(self, _vfs: int, out: Any) -> int:
        out[0] = 212_000_000_000_000
        return _OK


_ours: SimulatedSqlite | None = None


def simulated_sqlite() -> SimulatedSqlite:
    """This process's; raises `UnavailableError` where there can be none."""
    global _ours  # noqa: PLW0603 - SQLite has one list of VFSs, too
    if _ours is None:
        _ours = SimulatedSqlite()
    return _ours


def _library() -> Any:
    """The SQLite library of Python's `sqlite3`."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")
            if path[1] and "libsqlite3" in path[2]:
                return c.CDLL(f"/{path[2]}")
    try:
        import _sqlite3  # noqa: PLC0415 - its own file may hold the library

        library = c.CDLL(_sqlite3.__file__)
        library.sqlite3_vfs_find  # noqa: B018 - raises where it is hidden
    except (OSError, AttributeError, TypeError) as error:
        raise UnavailableError(f"SQLite {sqlite3.sqlite_version} is linked statically: {error}") from error
    return library
