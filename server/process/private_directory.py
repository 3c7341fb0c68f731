"""A folder for sockets and keys that only this user can enter, and that no killed process leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from server.process.short_paths import short_directory

_PREFIX: Final = "pretrade-server-"
_PATH_BYTES: Final = 4096


@contextlib.contextmanager
def private_directory(lock: int) -> Iterator[Path]:
    """A directory for sockets and Envoy's files that only this user can enter, with a path short enough for sockets.

    It holds keys, so it must not stay behind when a supervisor is killed.

    Args:
        lock: The lock's file, where the directory is noted; the next supervisor that has the lock removes it.

    Raises:
        OSError: It cannot be made.
    """
    left = Path(os.fsdecode(os.pread(lock, _PATH_BYTES, 0)))
    if left.name.startswith(_PREFIX):
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=_PREFIX, dir=short_directory(), ignore_cleanup_errors=True) as directory:
        os.ftruncate(lock, 0)
        os.pwrite(lock, os.fsencode(directory), 0)
        yield Path(directory)
