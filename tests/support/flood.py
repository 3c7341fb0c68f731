"""More calls than a client library could make: an open or closed loop of one unary call, in a process of its own.

A call costs this process about 10 µs. `grpc.aio` would spend more on asking than the server on refusing. The frames of
a call are the same bytes every time except for the stream's number, and only the status of a response is read. It still
follows HTTP/2: flow control, the server's limit of streams, settings and pings.

The latency of an open loop's call counts from when it was due, sent late or not.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH

from support.leash import LeashedPopen
from support.wire import DECIDE, framed

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 0x1, 0x4, 0x1
_HUGE_WINDOW: Final = 1 << 30
_TICK_SECONDS: Final = 0.0005
_LAST_WORD_SECONDS: Final = 2.0
"""How long to wait for what is still unanswered at the end."""


@dataclass
class Flood:
    """What to ask, of whom, and how often."""

    address: str
    message: str
    """The request, in hexadecimal."""
    seconds: float
    timeout_ms: int
    """The deadline every call gives the server."""
    rate: float | None = None
    """Calls a second, answered or not; None for a closed loop."""
    callers: int = 64
    """Calls under way in a closed loop."""
    connections: int = 8


@dataclass
class Outcome:
    """What became of the calls."""

    sent: int
    unsent: int
    """Due but not sent, because the server's limits of streams or flow control left no room."""
    statuses: dict[int, int]
    """Replies by gRPC status; -1 for a stream that was reset, -2 for one never answered."""
    in_time: int
    """OK within the deadline, from when the call was due."""
    percentiles_ms: dict[str, float]
    """p50, p99 and highest latency of the calls that were answered OK."""
    refused_ms: dict[str, float]
    """The same of those that were refused."""
    seconds: float
    cpu_seconds: float
    """What this process spent."""
    explained: int
    """RESOURCE_EXHAUSTED with details."""


def run(flood: Flood) -> Outcome:
    """Runs it in another process and waits for its end."""
    return outcome(start(flood))


def start(flood: Flood) -> LeashedPopen:
    """The same, without waiting for it."""
    return LeashedPopen.module("support.flood", [json.dumps(asdict(flood))], stdout=subprocess.PIPE)


def outcome(process: LeashedPopen) -> Outcome:
    """Waits for the outcome of one that was started."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    found["statuses"] = {int(code): count for code, count in found["statuses"].items()}
    return Outcome(**found)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _text(text: str) -> bytes:
    raw = text.encode()
    assert len(raw) < 127
    return bytes([len(raw)]) + raw


def _spellings(name: str) -> tuple[bytes, bytes]:
    """A header's name in the two ways in which HTTP/2 spells it out: with Huffman's code (Envoy) and without (gRPC)."""
    short = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(name.encode())
    return bytes([0x80 | len(short)]) + short, _text(name)


_STATUS: Final = _spellings("grpc-status")
_DETAILS: Final = _spellings("grpc-status-details-bin")


def _after(block: bytes, spellings: tuple[bytes, bytes]) -> int:
    """Where the value of a header begins; 0 where there is no such header."""
    for spelling in spellings:
        place = block.find(spelling)
        if place >= 0:
            return place + len(spelling)
    return 0


class Connection:
    """One connection and its calls.

    Args:
        address: `host:port`.
        timeout_ms: The deadline that every call gives the server.
        keeps_answers: Whether to keep what is answered, by stream, in `answers`.
        path: The method.
    """

    def __init__(self, address: str, timeout_ms: int, keeps_answers: bool = False, path: str = DECIDE) -> None:
        host, port = address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = [
            (":path", path),
            (":authority", address),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", f"{timeout_ms}m"),
        ]
        # The first call puts its headers into the connection's table, the others name their place in it.
        self._first_headers = b"\x83\x86" + b"".join(b"\x40" + _text(name) + _text(value) for name, value in headers)
        self._headers = b"\x83\x86" + bytes(0x80 | (61 + len(headers) - i) for i in range(len(headers)))
        self._stream = 1
        self._max_streams = 100
        self._window = 65_535
        self._unread = b""
        self._unsent = b""
        self.due: dict[int, float] = {}
        """Streams under way, and when each call was due."""
        self.answers: dict[int, bytes] = {}
        self._keeps_answers = keeps_answers
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        # No table for the responses' headers, so that a status is always spelt out; and windows that never fill.
        settings = struct.pack(">HIHI", 1, 0, 4, _HUGE_WINDOW)
        self.socket.sendall(
            preface + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _HUGE_WINDOW))
        )
        self.socket.setblocking(False)

    def has_room(self, body: bytes) -> bool:
        """Whether a call with this framed message may be made now."""
        return len(self.due) < self._max_streams and self._window >= len(body) and len(self._unsent) < 65_536

    def call(self, due: float, body: bytes) -> int:
        """Prepares one call; returns its stream."""
        stream = self._stream
        headers = self._first_headers if stream == 1 else self._headers
        self._unsent += _frame(_HEADERS, _END_HEADERS, stream, headers) + _frame(_DATA, _END_STREAM, stream, body)
        self._window -= len(body)
        self.due[stream] = due
        self._stream += 2
        return stream

    def flush(self) -> None:
        """Sends what the socket takes."""
        if self._unsent:
            with contextlib.suppress(BlockingIOError):
                self._unsent = self._unsent[self.socket.send(self._unsent) :]

    def read(self) -> list[tuple[int, int, bool]]:
        """(stream, gRPC status, whether with details) of the calls that have ended."""
        wire = self.socket.recv(262_144)
        if not wire:
            raise ConnectionError("the server closed the connection")
        wire = self._unread + wire
        at, ended = 0, []
        while at + 9 <= len(wire):
            high, low, kind, flags, stream = struct.unpack_from(">HBBBI", wire, at)
            end = at + 9 + (high << 8 | low)
            if end > len(wire):
                break
            if kind == _HEADERS and flags & _END_STREAM:
                block = wire[at + 9 : end]
                place = _after(block, _STATUS)
                assert place, block
                digits = block[place + 1 : place + 1 + block[place]]
                ended.append((stream, int(digits), _after(block, _DETAILS) > 0))
            elif kind == _DATA and self._keeps_answers:
                self.answers[stream] = self.answers.get(stream, b"") + wire[at + 9 : end]
            elif kind == _RST_STREAM:
                ended.append((stream, -1, False))
            elif kind == _WINDOW_UPDATE:
                if stream == 0:
                    self._window += struct.unpack_from(">I", wire, at + 9)[0]
            elif kind == _SETTINGS and not flags & _ACK:
                self._apply(wire[at + 9 : end])
            elif kind == _PING and not flags & _ACK:
                self._unsent += _frame(_PING, _ACK, 0, wire[at + 9 : end])
            elif kind == _GOAWAY:
                raise ConnectionError(f"GOAWAY {wire[at + 9 : end]!r}")
            at = end
        self._unread = wire[at:]
        return ended

    def _apply(self, settings: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", settings):
            if name == 3:
                self._max_streams = value
        self._unsent += _frame(_SETTINGS, _ACK, 0, b"")


@dataclass
class Pace:
    """When the calls of an open loop on the wire are due; `loadtest.generators.open_loop` is that of asyncio."""

    began: float
    """Instant at which the first one is due."""
    calls_per_second: float
    given: int = 0

    @property
    def next_due(self) -> float:
        """When the next one is due."""
        return self.began + self.given / self.calls_per_second

    def overdue(self, now: float) -> Iterator[float]:
        """When each of those was due that are due by now, and were not given before."""
        while (due := self.next_due) <= now:
            self.given += 1
            yield due


@dataclass
class _Run:
    """The loop and its counts."""

    flood: Flood
    statuses: Counter[int] = field(default_factory=Counter)
    ok: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    sent: int = 0
    unsent: int = 0
    explained: int = 0

    def run(self) -> Outcome:
        flood = self.flood
        connections = [Connection(flood.address, flood.timeout_ms) for _ in range(flood.connections)]
        body = framed(bytes.fromhex(flood.message))
        selector = selectors.DefaultSelector()
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        turn = deque(connections)
        started, cpu = time.monotonic(), time.process_time()
        until = started + flood.seconds
        pace = None if flood.rate is None else Pace(started, flood.rate)
        while True:
            now = time.monotonic()
            if now < until:
                if pace is None:
                    while sum(len(connection.due) for connection in connections) < flood.callers:
                        self._call(turn, now, body)
                else:
                    for due in pace.overdue(now):
                        self._call(turn, due, body)
            elif now >= until + _LAST_WORD_SECONDS or not any(connection.due for connection in connections):
                break
            for connection in connections:
                connection.flush()
            for key, _ in selector.select(_TICK_SECONDS):
                self._read(key.data)
        self.statuses[-2] += sum(len(connection.due) for connection in connections)
        return Outcome(
            sent=self.sent,
            unsent=self.unsent,
            statuses={code: count for code, count in self.statuses.items() if count},
            in_time=sum(seconds <= flood.timeout_ms / 1e3 for seconds in self.ok),
            percentiles_ms=_percentiles(self.ok),
            refused_ms=_percentiles(self.refused),
            seconds=flood.seconds,
            cpu_seconds=time.process_time() - cpu,
            explained=self.explained,
        )

    def _call(self, turn: deque[Connection], due: float, body: bytes) -> None:
        for _ in range(len(turn)):
            turn.rotate(1)
            if turn[0].has_room(body):
                turn[0].call(due, body)
                self.sent += 1
                return
        self.unsent += 1

    def _read(self, connection: Connection) -> None:
        now = time.monotonic()
        for stream, status, explained in connection.read():
            due = connection.due.pop(stream, None)
            if due is None:
                continue  # a deadline ends a stream with its status and then resets it
            seconds = now - due
            self.statuses[status] += 1
            self.explained += explained and status == 8
            (self.ok if status == 0 else self.refused).append(seconds)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    places = {"p50": 0.5, "p99": 0.99, "highest": 1.0}
    return {name: round(1e3 * ordered[int((len(ordered) - 1) * q)], 2) for name, q in places.items()}


if __name__ == "__main__":
    print(json.dumps(asdict(_Run(Flood(**json.loads(sys.argv[1]))).run())))
