"""Recorded exchange sessions as market events.

A Binance recording is a gzip file whose lines are `<local receive time, ns since the Unix epoch> <message as
received>`. Its name begins with the symbol, `btcusdt_20240808.gz`; files of one symbol continue one another in the
order of their first lines. Recordings in the format of `recorder.py`, of any venue, have names that begin with the
venue. All are merged on their one local clock.

    for event in read_session(session_files([Path("recordings")])):
        engines[event.instrument].on_event(event)
"""

from __future__ import annotations

import gzip
import heapq
import zlib
from collections.abc import Collection, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Final

from feature_cache.feeds.binance import BinanceSpot
from feature_cache.feeds.wire import FeedError
from feature_cache.sources import conversation
from feature_cache.sources.recorder import SessionError
from pretrade.market.v1 import market_pb2 as pb

__all__ = ["VENUE", "SessionError", "instrument_of", "instruments", "read_session", "session_files"]

VENUE: Final = "BINANCE"


def session_files(paths: Iterable[Path]) -> list[Path]:
    """The recordings named by files and folders (a folder means every `*.gz` in it and below it), sorted by name.

    Raises:
        SessionError: A path does not exist, or there is no recording at all.
    """
    files: set[Path] = set()
    paths = list(paths)
    for path in paths:
        if path.is_dir():
            files.update(path.rglob("*.gz"))
        elif path.is_file():
            files.add(path)
        else:
            raise SessionError(f"{path}: no such file or folder")
    if not files:
        raise SessionError(f"no recording (*.gz) in {', '.join(map(str, paths))}")
    return sorted(files, key=lambda path: (path.name, path))


def instrument_of(path: Path) -> str:
    """The instrument whose messages a Binance recording holds: `btcusdt_20240808.gz` → `BTCUSDT.BINANCE`."""
    return f"{path.name.partition('_')[0].partition('.')[0].upper()}.{VENUE}"


def instruments(files: Iterable[Path]) -> list[str]:
    """The instruments that recordings are about, sorted.

    Raises:
        SessionError: There is none, or a file cannot be read.
    """
    by_symbol, by_venue = _grouped(files)
    found = set(by_symbol).union(*(conversation.instruments(paths) for paths in by_venue.values()))
    if not found:
        raise SessionError("the recording is of no instrument")
    return sorted(found)


def read_session(files: Iterable[Path], only: Collection[str] | None = None) -> Iterator[pb.MarketEvent]:
    """The events of several recordings in the order in which they were received; `publish_time_ns` is that time.

    Args:
        files: The recordings.
        only: Instruments; None for all.

    Raises:
        SessionError: While iterating, at a line that is not as described, or at a damaged file.
    """
    by_symbol, by_venue = _grouped(files)
    sources = [
        _read_instrument(instrument, paths)
        for instrument, paths in sorted(by_symbol.items())
        if only is None or instrument in only
    ]
    for venue, paths in sorted(by_venue.items()):
        events = conversation.read_recording(venue, paths)
        sources.append(events if only is None else (event for event in events if event.instrument in only))
    return heapq.merge(*sources, key=attrgetter("receive_time_ns"))


def _grouped(files: Iterable[Path]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Binance's recordings by instrument, the others by venue."""
    by_symbol: dict[str, list[Path]] = {}
    by_venue: dict[str, list[Path]] = {}
    for path in files:
        venue = conversation.venue_of(path)
        if venue is None:
            by_symbol.setdefault(instrument_of(path), []).append(path)
        else:
            by_venue.setdefault(venue, []).append(path)
    return by_symbol, by_venue


def _began(path: Path) -> int:
    """When the first line of a Binance recording was received, nanoseconds since the Unix epoch.

    Names do not tell: the files of each day may have a folder of their own, and the same names in it. 0 for a file
    whose first line cannot be read, which is an error where the file is read.
    """
    try:
        with gzip.open(path) as lines:
            receive_time = lines.readline().partition(b" ")[0]
    except (OSError, EOFError, zlib.error):
        return 0
    return int(receive_time) if receive_time.isdigit() else 0


def _read_instrument(instrument: str, paths: list[Path]) -> Iterator[pb.MarketEvent]:
    feed = BinanceSpot(instrument)
    for path in sorted(paths, key=_began):
        number = 0
        try:
            with gzip.open(path) as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007 — the error below names it
                    receive_time, _, message = line.partition(b" ")
                    if not receive_time.isdigit():
                        raise ValueError
                    event = feed.decode(message, int(receive_time))
                    if event is not None:
                        yield event
        except (OSError, EOFError, zlib.error) as error:
            raise SessionError(f"{path}: damaged after line {number}: {error}") from error
        except FeedError as error:
            named = ", with which the file's name begins" if error.field == "s" else ""
            raise SessionError(f"{path}, line {number}: {error}{named}") from error
        except ValueError as error:
            raise SessionError(f"{path}, line {number}: does not begin with the receive time") from error
