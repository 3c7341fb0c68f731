"""Folders for Unix sockets with short paths: the kernel limits a socket's path to about a hundred bytes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

_LONGEST_FOLDER: Final = 60
"""Bytes. A socket's path has 107 on Linux and 103 on macOS; what is made in the folder adds some 40."""
_SHORT: Final = ("/tmp", "/var/tmp", "/run", "/dev/shm")  # noqa: S108 - what is made there has a random name


def short_directory() -> Path:
    """The folder for temporary files, or another of the system's when its path leaves no room for a socket's.

    Raises:
        OSError: None of them can be written to.
    """
    usual = Path(tempfile.gettempdir())
    for directory in (usual, *map(Path, _SHORT)):
        if len(os.fsencode(directory)) <= _LONGEST_FOLDER and os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise OSError(
        f"{usual} is too long a path for a Unix socket, and none of {', '.join(_SHORT)} can be written to: set TMPDIR"
        f" to a folder whose path has at most {_LONGEST_FOLDER} bytes"
    )
