"""Reads and writes recordings of an exchange's connections, in the format of cryptofeed's recorder.

A recording of a venue is several files, plain or gzip, one per connection, whose names begin with the venue:
`VENUE.0.gz` (REST), `VENUE.ws.N.0.gz` (WebSocket). Their lines::

    configuration: {…}                     what was asked of the recorder
    wss://… <-> 1618678132.368463          connected
    wss://… <- 1618678132.83097: {…}       sent
    https://… -> 1618678132.358447: {…}    received in answer to a request
    1618678132.831468: {…}                 received
    wss://… >-< 1618678199.123456789       lost
    wss://… ?? 1618678132.831468: …        received, but not documented by the venue

The last two are ours: with them a replay forgets the books and skips messages where the live feed did. Times are local,
in seconds since the Unix epoch.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog

from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError
from feature_cache.sources import files
from feature_cache.sources.files import Progress, SessionError

Arrow = Literal["<->", "<-", "->", ">-<", "??", ""]

CONNECTED: Final = "<->"
SENT: Final = "<-"
ANSWERED: Final = "->"
LOST: Final = ">-<"
REFUSED: Final = "??"
RECEIVED: Final = ""

_ARROWS: Final[dict[str, Arrow]] = {arrow: arrow for arrow in (CONNECTED, SENT, ANSWERED, LOST, REFUSED)}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that happened on a connection."""

    connection: str
    """Which one: the path of the file, where it was read from one."""
    receive_time_ns: int
    arrow: Arrow
    address: str
    """URL; empty for a message that was received."""
    message: bytes
    number: int = 0
    """In the file, from 1."""


def read_lines(path: Path, progress: Progress | None = None) -> Iterator[Line]:
    """The lines of one file.

    Raises:
        SessionError: While iterating, at a line that is not as described, or at a damaged file.
    """
    for number, text in files.read_lines(path, progress):
        head, _, message = text.rstrip(b"\n").partition(b": ")
        if not head or head == b"configuration":
            continue
        try:
            words = head.decode().split(" ")
            receive_time_ns = wire.epoch_seconds_ns(words[-1], "time")
        except UnicodeDecodeError as error:
            raise SessionError(f"{path}, line {number}: is not a line of the recorder") from error
        except FeedError as error:
            raise SessionError(f"{path}, line {number}: {error}") from error
        if len(words) == 1:
            yield Line(str(path), receive_time_ns, "", "", message, number)
        elif len(words) == 3 and words[1] in _ARROWS:
            yield Line(str(path), receive_time_ns, _ARROWS[words[1]], words[0], message, number)
        else:
            raise SessionError(f"{path}, line {number}: is not a line of the recorder")


class Recorder:
    """Writes lines, one file a connection: `<venue>.<connection>.<start in seconds>.gz`.

    Recording must not stop the live feed: at the first failure to write the recording ends with a log line, and
    `failed` is true.

    Args:
        folder: Where the files go; created when missing.
        venue: Begins every file's name.
        start_time_ns: Tells recordings apart.

    Raises:
        OSError: The folder cannot be created.
    """

    def __init__(self, folder: Path, venue: str, start_time_ns: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._venue = venue
        self._start = start_time_ns // 10**9
        self._files: dict[str, gzip.GzipFile] = {}
        self.lines = 0
        """Lines written."""
        self.failed = False
        """Whether the recording ended because it could not be written."""

    def write(self, line: Line) -> None:
        """Writes one line; never raises."""
        if self.failed:
            return
        seconds, nanoseconds = divmod(line.receive_time_ns, 10**9)
        time = f"{seconds}.{nanoseconds:09}"
        head = f"{line.address} {line.arrow} {time}" if line.arrow else time
        # A message is one line; a line break in it could only stand between tokens, for JSON escapes it in text.
        message = line.message.replace(b"\r", b" ").replace(b"\n", b" ")
        text = head.encode() + (b"\n" if line.arrow in (CONNECTED, LOST) else b": " + message + b"\n")
        try:
            self._file(line.connection).write(text)
        except OSError as error:
            self.failed = True
            _log.error("recorder.ended", error=str(error), lines=self.lines)
        else:
            self.lines += 1

    def close(self) -> None:
        """Ends the files; they can be read from now on. Never raises."""
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:
                self.failed = True
                _log.error("recorder.ended", error=str(error), lines=self.lines)
        self._files.clear()

    def _file(self, connection: str) -> gzip.GzipFile:
        file = self._files.get(connection)
        if file is None:
            path = self._folder / f"{self._venue}.{connection}.{self._start}.gz"
            file = self._files[connection] = gzip.GzipFile(path, "xb", compresslevel=3)
        return file
