"""The files of recordings: plain or gzip, read line by line, and merged on their clock."""

from __future__ import annotations

import gzip
import heapq
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

_GZIP: Final = b"\x1f\x8b"
_LINES_PER_REPORT: Final = 1_000


class SessionError(ValueError):
    """A recording that cannot be read; the message names the file and the line."""


class Progress:
    """How much of some files has been read.

    Args:
        files: All of them.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._sizes = {path: path.stat().st_size for path in files}
        self._read: dict[Path, int] = {}

    def reached(self, path: Path, offset: int | None = None) -> None:
        """A file was read up to this byte, as it lies on the disk; None for its end."""
        self._read[path] = self._sizes.get(path, 0) if offset is None else offset

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return sum(self._read.values()) / max(1, sum(self._sizes.values()))


def read_lines(path: Path, progress: Progress | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1.

    The first bytes tell whether it is packed with gzip, not the name.

    Raises:
        SessionError: While iterating, at a file that cannot be read or is damaged.
    """
    number = 0
    try:
        with path.open("rb") as file:
            lines = gzip.GzipFile(fileobj=file) if file.peek(len(_GZIP)).startswith(_GZIP) else file
            for number, line in enumerate(lines, start=1):
                if progress is not None and number % _LINES_PER_REPORT == 0:
                    progress.reached(path, file.tell())
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise SessionError(f"{path}: damaged after line {number}: {error}") from error
    if progress is not None:
        progress.reached(path)


def in_order(sources: Iterable[tuple[int, Iterator[T]]], time_of: Callable[[T], int]) -> Iterator[T]:
    """Merges what is in order each: whatever its files are called, a recording is read in the order of its times.

    A source is begun when its first time is reached: a recording of a year does not open all its files at once.

    Args:
        sources: The time of the first thing of each, and the things.
        time_of: The time of a thing.
    """
    # The number of a source decides between equal times, and that no two things are ever compared.
    heap: list[tuple[int, int, T | None, Iterator[T]]] = [
        (begins, number, None, source) for number, (begins, source) in enumerate(sources)
    ]
    heapq.heapify(heap)
    while heap:
        _, number, thing, source = heapq.heappop(heap)
        if thing is not None:
            yield thing
        bound = heap[0][:2] if heap else (math.inf, 0)
        for following in source:
            time = time_of(following)
            if (time, number) > bound:
                heapq.heappush(heap, (time, number, following, source))
                break
            yield following
