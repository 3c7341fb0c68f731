"""Recorded market data as market events: the one way to open a recording.

What a file is, its content or its name says (`kind_of`):

* raw lines of a venue that `pretrade ingest` knows, see `raw.py`;
* the recorder's format, which `pretrade ingest --record` writes, see `recorder.py`: the name begins with the venue;
* Tardis.dev's CSV files, see `tardis.py`: the first line names their columns;
* LOBSTER's pairs of CSV files, see `lobster.py`: the name is that of LOBSTER.

Files may be plain or gzip, and be called what they like where their content tells what they are. All are merged on
their clock.

    for event in read_session(session_files([Path("recordings")])):
        engines[event.instrument].on_event(event)
"""

from __future__ import annotations

import enum
import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final, Protocol

from feature_cache.feeds import binance_streams
from feature_cache.sources import conversation, lobster, raw, tardis
from feature_cache.sources.files import Progress, SessionError
from pretrade.market.v1 import market_pb2 as pb

__all__ = [
    "Format",
    "Kind",
    "Progress",
    "SessionError",
    "instruments",
    "kind_of",
    "read_session",
    "session_files",
]

_SUFFIXES: Final = (".gz", ".csv", ".jsonl", ".ndjson")
"""Of the files in a folder that are recordings; a file that is named itself may have any."""


class Format(enum.StrEnum):
    """How a recording is written."""

    RAW = "raw"
    RECORDER = "recorder"
    TARDIS = "tardis"
    LOBSTER = "lobster"


@dataclass(frozen=True, order=True)
class Kind:
    """What a file is."""

    format: Format
    venue: str = ""
    """Of which venue; empty where the file itself says so."""


class _Files(Protocol):
    """Files that belong together."""

    def instruments(self) -> set[str]: ...

    def events(self, only: Collection[str] | None, progress: Progress | None) -> Iterator[pb.MarketEvent]: ...


class _Recorded:
    """Files of one venue in the recorder's format."""

    def __init__(self, venue: str, files: list[Path]) -> None:
        self._venue = venue
        self._files = files

    def instruments(self) -> set[str]:
        return conversation.instruments(self._files)

    def events(self, only: Collection[str] | None, progress: Progress | None) -> Iterator[pb.MarketEvent]:
        events = conversation.read_recording(self._venue, self._files, progress)
        return events if only is None else (event for event in events if event.instrument in only)


def session_files(paths: Iterable[Path]) -> list[Path]:
    """The recordings named by files and folders, sorted by name.

    A folder means every `*.gz`, `*.csv`, `*.jsonl` and `*.ndjson` in it and below it.

    Raises:
        SessionError: A path does not exist, or there is no recording at all.
    """
    files: set[Path] = set()
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            files.update(one for one in path.rglob("*") if one.suffix in _SUFFIXES and one.is_file())
        elif path.is_file():
            files.add(path)
        else:
            raise SessionError(f"{path}: no such file or folder")
    if not files:
        wanted = ", ".join(f"*{suffix}" for suffix in _SUFFIXES)
        raise SessionError(f"no recording ({wanted}) in {', '.join(map(str, paths))}")
    return sorted(files, key=lambda path: (path.name, path))


def kind_of(path: Path, told: Kind | None = None) -> Kind:
    """What a file is, as its name or its first lines say; raw lines of Binance spot where they do not.

    Args:
        path: The file.
        told: What is known of it already.

    Raises:
        SessionError: It is told to be in the recorder's format, and is of no venue.
    """
    if told is not None and told.format is Format.RAW:
        return told if told.venue else Kind(Format.RAW, raw.venue_of(path))
    if told is not None and told.format is Format.RECORDER:
        venue = conversation.venue_of(path)
        if venue is None:
            raise SessionError(f"{path}: the name of a recorder's file begins with the venue, as in KRAKEN.ws.0.gz")
        return Kind(Format.RECORDER, venue)
    if told is not None:
        return told
    if tardis.is_tardis(path):
        return Kind(Format.TARDIS)
    if lobster.is_lobster(path):
        return Kind(Format.LOBSTER)
    venue = conversation.venue_of(path)
    return Kind(Format.RECORDER, venue) if venue is not None else Kind(Format.RAW, raw.venue_of(path))


def instruments(files: Iterable[Path], told: Kind | None = None) -> list[str]:
    """The instruments that recordings are about, sorted.

    Args:
        files: The recordings.
        told: What they are; None for what they say themselves.

    Raises:
        SessionError: There is none, or a file cannot be read.
    """
    found = set[str]().union(*(group.instruments() for group in _grouped(files, told)))
    if not found:
        raise SessionError("the recording is of no instrument")
    return sorted(found)


def read_session(
    files: Iterable[Path],
    only: Collection[str] | None = None,
    told: Kind | None = None,
    progress: Progress | None = None,
) -> Iterator[pb.MarketEvent]:
    """The events of several recordings in the order in which they were received; `publish_time_ns` is that time.

    Args:
        files: The recordings, in any order.
        only: Instruments; None for all.
        told: What they are; None for what they say themselves.
        progress: Hears how far the reading is.

    Raises:
        SessionError: While iterating, at a line that is not as described, or at a damaged file.
    """
    sources = [group.events(only, progress) for group in _grouped(files, told)]
    return heapq.merge(*sources, key=attrgetter("receive_time_ns"))


def _grouped(files: Iterable[Path], told: Kind | None) -> list[_Files]:
    """Files that belong together, in an order that does not depend on that of the files."""
    groups: dict[tuple[Kind, str], list[Path]] = defaultdict(list)
    for path in files:
        kind = kind_of(path, told)
        is_of_one_symbol = kind.format is Format.RAW and kind.venue in binance_streams.VENUES
        groups[kind, raw.symbol_of(path, kind.venue) if is_of_one_symbol else ""].append(path)
    return [_files(kind, name, paths) for (kind, name), paths in sorted(groups.items(), key=lambda one: one[0])]


def _files(kind: Kind, name: str, files: list[Path]) -> _Files:
    if kind.format is Format.RECORDER:
        return _Recorded(kind.venue, files)
    if kind.format is Format.TARDIS:
        return tardis.TardisFiles(files)
    if kind.format is Format.LOBSTER:
        return lobster.LobsterFiles(files)
    return raw.RawFiles(kind.venue, name, files)
