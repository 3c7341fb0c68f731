"""A gRPC caller that does only what it is told: frames over a real socket, without a client library's safeguards."""

from __future__ import annotations

import itertools
import random
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import unquote

import h2.connection
import h2.errors
import h2.events
import h2.settings

DECIDE: Final = "/pretrade.decision.v1.DecisionService/Decide"
DECIDE_BATCH: Final = "/pretrade.decision.v1.DecisionService/DecideBatch"
STREAM: Final = "/pretrade.decision.v1.DecisionService/DecideStream"
_PATIENCE_SECONDS: Final = 10.0


def framed(message: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC frames it; `length` lies about its size."""
    return struct.pack(">BI", compressed, len(message) if length is None else length) + message


@dataclass
class Reply:
    """What came back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    """Of the response and its trailers."""
    body: bytes = b""
    ended: bool = False
    reset: int | None = None
    """Error code of the server's RST_STREAM."""

    @property
    def status(self) -> int | None:
        """gRPC status; None without one."""
        value = self.headers.get("grpc-status")
        return None if value is None else int(value)

    @property
    def message(self) -> str:
        """gRPC message."""
        return unquote(self.headers.get("grpc-message", ""))


class Caller:
    """One HTTP/2 connection.

    Args:
        address: `host:port`.
        window: What the server may send on a stream before it must wait.
        hello: Whether to open the connection as HTTP/2 asks.
    """

    def __init__(self, address: str, window: int = 65_535, hello: bool = True) -> None:
        host, port = address.rsplit(":", 1)
        self._authority = address
        self.socket = socket.create_connection((host, int(port)), timeout=_PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http = h2.connection.H2Connection()
        self.replies: dict[int, Reply] = {}
        self.goaway: tuple[int, bytes] | None = None
        """Error code and debug text of the server's GOAWAY."""
        self.closed = False
        """The server closed the connection."""
        self._pinged = False
        if hello:
            self.http.local_settings = h2.settings.Settings(
                client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            )
            self.http.initiate_connection()
            self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def flush(self) -> None:
        """Sends what was prepared."""
        self.socket.sendall(self.http.data_to_send())

    def begin(self, path: str = DECIDE, extra: Iterable[tuple[str, str]] = (), end: bool = False) -> int:
        """Opens a stream with a gRPC call's headers; returns its number."""
        stream: int = self.http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *extra,
        ]
        self.http.send_headers(stream, headers, end_stream=end)
        self.replies[stream] = Reply()
        return stream

    def send(self, stream: int, data: bytes, end: bool = False) -> None:
        """Sends a stream's data, as fast as the server lets it in."""
        while True:
            room = min(self.http.local_flow_control_window(stream), self.http.max_outbound_frame_size, len(data))
            if room or not data:
                self.http.send_data(stream, data[:room], end_stream=end and room == len(data))
                data = data[room:]
            self.flush()
            if not data:
                return
            self.read(lambda: self.http.local_flow_control_window(stream) > 0 or self.replies[stream].ended)
            if self.replies[stream].ended:
                return

    def call(self, message: bytes, path: str = DECIDE, extra: Iterable[tuple[str, str]] = ()) -> Reply:
        """One unary call with these bytes as its data, already framed; waits for its end."""
        stream = self.begin(path, extra)
        self.send(stream, message, end=True)
        return self.reply(stream)

    def wait_until_read(self) -> None:
        """Waits until the server has read everything that was sent before: it answers a ping in its place."""
        self.http.ping(b"so far??")
        self.flush()
        self._pinged = False
        assert self.read(lambda: self._pinged), "no answer to a ping"

    def reply(self, stream: int) -> Reply:
        """Waits for the end of a stream."""
        self.read(lambda: self.replies[stream].ended)
        return self.replies[stream]

    def read(self, enough: Callable[[], bool], seconds: float = _PATIENCE_SECONDS) -> bool:
        """Reads until it is enough; False when the server has closed or the time is up."""
        until = time.monotonic() + seconds
        while not enough():
            left = until - time.monotonic()
            if left <= 0 or self.closed:
                return False
            self.socket.settimeout(left)
            try:
                wire = self.socket.recv(65_536)
            except TimeoutError:
                return False
            except ConnectionError:
                wire = b""
            if not wire:
                self.closed = True
                for reply in self.replies.values():
                    reply.ended = True
                continue
            for event in self.http.receive_data(wire):
                self._take(event)
            with suppress(ConnectionError):  # the server may close first; what it said before is still to be read
                self.flush()
        return True

    def _take(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = (int(event.error_code or 0), event.additional_data or b"")
            return
        if isinstance(event, h2.events.PingAckReceived):
            self._pinged = True
            return
        reply = self.replies.get(getattr(event, "stream_id", None) or 0)
        if reply is None:
            return
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            reply.headers |= {_text(name): _text(value) for name, value in event.headers}
        elif isinstance(event, h2.events.DataReceived):
            reply.body += event.data
            self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            reply.ended = True
        elif isinstance(event, h2.events.StreamReset):
            reply.ended, reply.reset = True, int(event.error_code or 0)


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def leave_at_any_moment(address: str, frames: Iterator[bytes], chance: random.Random) -> None:
    """400 calls of `Decide` on ten connections whose callers leave at any moment, some with half a message sent."""
    for _ in range(10):
        with Caller(address) as caller:
            for message in itertools.islice(frames, 40):
                stream = caller.begin()
                cut = chance.choice((0, 3, len(message), len(message), len(message)))
                if cut:
                    caller.send(stream, message[:cut], end=cut == len(message))
                if chance.random() < 0.3:
                    caller.read(lambda: False, chance.random() * 0.003)
                if chance.random() < 0.7 and not caller.replies[stream].ended:
                    caller.http.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
                    caller.flush()
