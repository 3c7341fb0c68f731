"""Files that may be replaced while the server runs: certificates, keys, policies."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

import structlog

_log = structlog.get_logger(__name__)

T = TypeVar("T")
_MAX_BYTES: Final = 1_048_576


class Watched(Generic[T]):
    """A value made from files, and made again when they change.

    Files are read whole and compared by content, so it does not matter whether they are renamed, swapped by a symlink
    or written in place. If files cannot be read or are invalid, the last value stays in force, and they are read again
    later.

    Args:
        name: For the log and the metrics.
        paths: The files, in the order in which `make` gets their contents.
        make: Makes the value; raises `ValueError` when the contents are invalid. Its message must hold no secret.

    Raises:
        OSError: A file cannot be read.
        ValueError: The contents are invalid.
    """

    def __init__(self, name: str, paths: Sequence[Path], make: Callable[..., T]) -> None:
        self.name = name
        self._paths = tuple(paths)
        self._make = make
        contents = self._read()
        self._seen = _digest(contents)
        self.value = make(*contents)
        self.version = 1
        """Grows with every change that came into force."""
        self.failures = 0
        """Invalid changes, since start."""
        self.problem = ""
        """Why the files as they are now are not in force; empty when they are."""

    def look(self) -> bool:
        """Reads the files; True when a new value came into force. Blocks."""
        try:
            contents = self._read()
        except (OSError, ValueError) as error:
            self._failed(f"{type(error).__name__}: {error}")
            return False
        digest = _digest(contents)
        if digest == self._seen:
            self.problem = ""
            return False
        try:
            value = self._make(*contents)
        except (OSError, ValueError) as error:
            self._failed(str(error))
            return False
        self._seen, self.value, self.problem = digest, value, ""
        self.version += 1
        _log.info("replaced", what=self.name, version=self.version)
        return True

    async def watch(self, refresh_seconds: float, changed: Callable[[], None] = lambda: None) -> None:
        """Looks again and again, until cancelled; tells of every change that came into force."""
        while True:
            await asyncio.sleep(refresh_seconds)
            if await asyncio.to_thread(self.look):
                changed()

    def _read(self) -> tuple[bytes, ...]:
        return tuple(_contents(path) for path in self._paths)

    def _failed(self, problem: str) -> None:
        """Counts and logs a problem once, however often it is met."""
        if problem != self.problem:
            self.failures += 1
            self.problem = problem
            _log.error("not replaced, the last one stays in force", what=self.name, problem=problem)


def _contents(path: Path) -> bytes:
    with path.open("rb") as file:
        contents = file.read(_MAX_BYTES + 1)
    if len(contents) > _MAX_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_BYTES} bytes")
    return contents


def _digest(contents: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Compared instead of the contents, which may be secrets."""
    return tuple(hashlib.sha256(one).digest() for one in contents)
