"""Locks on files, which the kernel frees when their holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take_lock(path: Path, *, create: bool = True, shared: bool = False) -> int | None:
    """Takes the lock of a file without waiting for it.

    Args:
        path: The file.
        create: Make the file where it is missing.
        shared: Others may hold a shared lock at the same time. The file is only opened for reading then.

    Returns:
        A descriptor of the file, or None while somebody else has the lock. The lock is free again when every copy of
        the descriptor is closed.

    Raises:
        OSError: The file cannot be opened.
    """
    access = os.O_RDONLY if shared else os.O_RDWR
    descriptor = os.open(path, access | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
