"""One HTTP/2 connection of `http2_client.py`: what is sent, and what becomes of what comes.

Source: RFC 9113; the names are its own.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote

import grpc
import grpc.aio
from hpack import Decoder, HPACKError

MOST_ANSWER_BYTES: Final = 65_536
"""Of an answer's message: bounds what a broken one can cost."""

_SILENT_SECONDS: Final = 1.0
_PING_SECONDS: Final = 0.5
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME: Final = struct.Struct("!HBBBI")
_SETTING: Final = struct.Struct("!HI")
_MESSAGE: Final = struct.Struct("!BI")
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 2, 3, 4, 5
_CANCEL: Final = 8
_DEFAULT_WINDOW: Final = 65_535
_LARGEST_WINDOW: Final = 2**31 - 1
_SMALLEST_FRAME: Final = 16_384
_OUR_WINDOW: Final = 1 << 20
"""What a peer may send before it is told that we have read it; a stream may have all of a longest answer, and more."""
_LAST_STREAM: Final = 2**31 - 1
_MOST_HEADERS: Final = 65_536
"""Bytes of headers of one answer, as they are sent; `hpack` bounds what becomes of them."""
_PING_DATA: Final = b"pretrade"
_PRIORITY_BYTES: Final = 5
_OWED_SECONDS: Final = 0.005
"""How long the answer to a ping may wait for a call that it can go with. TorchServe pings with every answer, to measure
its connection, and a write of its own takes as long as everything else that an answer needs."""
_MOST_OWED: Final = 1_024
"""Bytes of such answers."""
_INDEXED: Final = 0x80
"""A header that the table has is a byte from here on (RFC 7541, 6.1)."""
_MOST_KNOWN: Final = 64
_MOST_UNSENT: Final = 4 << 20
"""Bytes that wait for a peer which does not read."""

_CODES: Final = {str(code.value[0]): code for code in grpc.StatusCode}
_BY_RESET: Final = {
    7: grpc.StatusCode.UNAVAILABLE,  # REFUSED_STREAM
    8: grpc.StatusCode.CANCELLED,
    11: grpc.StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    12: grpc.StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}
"""Every other reset is INTERNAL."""
_BY_HTTP_STATUS: Final = {
    "400": grpc.StatusCode.INTERNAL,
    "401": grpc.StatusCode.UNAUTHENTICATED,
    "403": grpc.StatusCode.PERMISSION_DENIED,
    "404": grpc.StatusCode.UNIMPLEMENTED,
    "429": grpc.StatusCode.UNAVAILABLE,
    "502": grpc.StatusCode.UNAVAILABLE,
    "503": grpc.StatusCode.UNAVAILABLE,
    "504": grpc.StatusCode.UNAVAILABLE,
}
"""Of an answer that is not gRPC's; every other one is UNKNOWN."""
_CUT: Final = "Stream removed"
"""gRPC's words for a call that ended without a status, by which `outcome.classify` knows it."""


class Kind(enum.IntEnum):
    """Kinds of frames."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class UnusableError(Exception):
    """The call cannot leave now; nothing of it was sent."""


class _ProtocolError(Exception):
    """The peer did what HTTP/2 forbids."""


class _Said(NamedTuple):
    """What headers say of a call; None where they say nothing."""

    code: str | None = None
    message: str | None = None
    http_status: str | None = None
    is_grpc: bool | None = None


class _Stream:
    """One call under way."""

    __slots__ = ("answer", "body", "code", "http_status", "is_grpc", "message")

    def __init__(self, answer: asyncio.Future[bytes]) -> None:
        self.answer = answer
        self.body = bytearray()
        self.http_status = ""
        self.is_grpc = False
        self.code: str | None = None
        self.message = ""


class Connection(asyncio.Protocol):
    """One connection, from its first byte to its last.

    Args:
        clock: Monotonic seconds, the event loop's own.
        ended: Called with it when it has ended, perhaps more than once.

    Attributes:
        settled: Done when the peer's settings have come, or never will.
        leaving: Done when no call may begin any more.
        problem: Why it is not usable.
        is_broken: True when the peer broke the protocol.
    """

    def __init__(self, clock: Callable[[], float], ended: Callable[[Connection], None]) -> None:
        loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = loop.create_future()
        self.leaving: asyncio.Future[None] = loop.create_future()
        self.problem = "not connected"
        self.is_broken = False
        self.usable = False
        self._clock = clock
        self._on_end = ended
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._streams: dict[int, _Stream] = {}
        self._next_stream = 1
        self._decoder = Decoder()
        self._decoder.max_header_list_size = _MOST_HEADERS
        self._known: dict[bytes, _Said] = {}
        """Headers that were decoded since the table was last changed, and leave it as it is."""
        self._block: bytearray | None = None
        """Of headers that go on in further frames."""
        self._block_of = (0, 0)
        """Stream and flags of these headers."""
        self._window = self._their_window = _DEFAULT_WINDOW
        self._largest_frame = _SMALLEST_FRAME
        self._most_streams = _LAST_STREAM
        self._unread = 0
        self._owed = b""
        """Answers to pings, which go with the next call."""
        self._paying: asyncio.TimerHandle | None = None
        self._is_done = False
        """Whether it ends with its last call."""
        self._heard_at = 0.0
        self._pinged_at: float | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._takers: dict[int, Callable[[int, int, bytes], None]] = {
            Kind.DATA: self._take_data,
            Kind.HEADERS: self._take_headers,
            Kind.CONTINUATION: self._take_continuation,
            Kind.RST_STREAM: self._take_reset,
            Kind.SETTINGS: self._take_settings,
            Kind.PUSH_PROMISE: self._refuse_push,
            Kind.PING: self._take_ping,
            Kind.GOAWAY: self._take_goaway,
            Kind.WINDOW_UPDATE: self._take_window,
        }

    @property
    def under_way(self) -> int:
        """Calls that have not ended."""
        return len(self._streams)

    # ---- What the client asks for

    def begin(self, head: bytes, message: bytes) -> tuple[int, asyncio.Future[bytes]]:
        """Sends a call; its stream, and its answer to come.

        Raises:
            UnusableError: It cannot leave now.
        """
        size = _MESSAGE.size + len(message)
        room = min(self._window, self._their_window)
        if not self.usable or self._transport is None or size > room or len(self._streams) >= self._most_streams:
            raise UnusableError
        if self._transport.is_closing() or len(head) > self._largest_frame:
            raise UnusableError
        stream, loop = self._next_stream, asyncio.get_running_loop()
        self._next_stream += 2
        if self._next_stream >= _LAST_STREAM:
            self._leave("all streams are used up")
        self._window -= size
        body = _MESSAGE.pack(0, len(message)) + message
        frames = [self._owed, _frame(Kind.HEADERS, _END_HEADERS, stream, head)]
        self._owed = b""
        for at in range(0, size, self._largest_frame):
            part = body[at : at + self._largest_frame]
            frames.append(_frame(Kind.DATA, _END_STREAM if at + len(part) == size else 0, stream, part))
        self._transport.write(b"".join(frames))
        answer: asyncio.Future[bytes] = loop.create_future()
        self._streams[stream] = _Stream(answer)
        if self._watch is None:
            self._heard_at = self._clock()
            self._watch = loop.call_later(_SILENT_SECONDS, self._look)
        return stream, answer

    def cancel(self, stream: int) -> None:
        """Nobody waits for a call any more."""
        if self._streams.pop(stream, None) is not None:
            self._send(_frame(Kind.RST_STREAM, 0, stream, _CANCEL.to_bytes(4, "big")))
            self._end_if_done()

    def give_up(self, stream: int) -> None:
        """A call has taken too long."""
        found = self._streams.get(stream)
        if found is not None:
            self._fail(found, grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
            self.cancel(stream)

    def end_when_done(self) -> None:
        """Ends when the last call has; no other begins."""
        self._leave(self.problem)
        self._is_done = True
        self._end_if_done()

    def abort(self, problem: str) -> None:
        """Ends at once."""
        self._end(problem)

    # ---- What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)
        settings = _SETTING.pack(_ENABLE_PUSH, 0) + _SETTING.pack(_INITIAL_WINDOW_SIZE, _OUR_WINDOW)
        more = (_OUR_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")
        self._send(_PREFACE + _frame(Kind.SETTINGS, 0, 0, settings) + _frame(Kind.WINDOW_UPDATE, 0, 0, more))

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._end(f"connection lost: {error or 'the server closed it'}")

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._heard_at, self._pinged_at = self._clock(), None
        try:
            self._take(data)
        except (_ProtocolError, HPACKError) as error:
            self.is_broken = True
            self._end(f"HTTP/2: {type(error).__name__.strip('_')}: {error}")

    def _take(self, data: bytes) -> None:
        received, at = self._received, 0
        received += data
        while len(received) - at >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(received, at)
            size = high << 8 | low
            if size > _SMALLEST_FRAME:  # we never allow more
                raise _ProtocolError(f"a frame of {size} bytes")
            begin = at + _FRAME.size
            if len(received) < begin + size:
                break
            at = begin + size
            self._frame(kind, flags, stream & _LAST_STREAM, bytes(received[begin:at]))
            if self._transport is None:
                return
        del received[:at]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if self._block is not None and (kind != Kind.CONTINUATION or stream != self._block_of[0]):
            raise _ProtocolError("headers that do not go on")
        if not self.settled.done() and kind != Kind.SETTINGS:
            raise _ProtocolError("it does not begin with settings")
        taker = self._takers.get(kind)
        if taker is not None:  # HTTP/2 has more kinds, and may get others: they mean nothing here
            taker(flags, stream, payload)

    def _take_data(self, flags: int, stream: int, payload: bytes) -> None:
        if not stream:
            raise _ProtocolError("data of no stream")
        self._unread += len(payload)
        if self._unread >= _OUR_WINDOW // 2:
            self._send(_frame(Kind.WINDOW_UPDATE, 0, 0, self._unread.to_bytes(4, "big")))
            self._unread = 0
        found = self._streams.get(stream)
        if found is None:  # given up, but for streams that were never begun
            self._check_known(stream)
            return
        found.body += _unpadded(flags, payload)
        if len(found.body) > MOST_ANSWER_BYTES + _MESSAGE.size:
            self._fail(found, grpc.StatusCode.RESOURCE_EXHAUSTED, f"Received message larger than max: {_size(found)}")
            self.cancel(stream)
        elif flags & _END_STREAM:
            self._ended(stream)

    def _take_headers(self, flags: int, stream: int, payload: bytes) -> None:
        self._check_known(stream)
        payload = _unpadded(flags, payload)
        self._block, self._block_of = bytearray(), (stream, flags)
        self._add_headers(flags, payload[_PRIORITY_BYTES:] if flags & _PRIORITY else payload)

    def _take_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        self._add_headers(flags, payload)

    def _add_headers(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise _ProtocolError("a continuation of nothing")
        self._block += payload
        if len(self._block) > _MOST_HEADERS:
            raise _ProtocolError("too many headers")
        if not flags & _END_HEADERS:
            return
        block, (stream, first_flags), self._block = bytes(self._block), self._block_of, None
        said = self._said_in(block)  # also what nobody waits for: the table counts
        found = self._streams.get(stream)
        if found is None:
            return
        if said.code is not None:
            found.code = said.code
        if said.message is not None:
            found.message = said.message
        if said.http_status is not None:
            found.http_status = said.http_status
        if said.is_grpc is not None:
            found.is_grpc = said.is_grpc
        if first_flags & _END_STREAM:
            self._ended(stream)

    def _said_in(self, block: bytes) -> _Said:
        """What the headers of a block say. A server that is asked again and again names what the table has."""
        said = self._known.get(block)
        if said is None:
            said = _said_by(self._decoder.decode(block, raw=True))
            if min(block, default=0) < _INDEXED:
                self._known.clear()  # the table may have changed, and the same bytes say something else now
            elif len(self._known) < _MOST_KNOWN:
                self._known[block] = said
        return said

    def _take_reset(self, flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4 or not stream:
            raise _ProtocolError("a reset of a wrong form")
        self._check_known(stream)
        found = self._streams.pop(stream, None)
        if found is not None:
            error = int.from_bytes(payload, "big")
            code = _BY_RESET.get(error, grpc.StatusCode.INTERNAL)
            self._fail(found, code, f"{_CUT} (RST_STREAM with error code {error})")
            self._end_if_done()

    def _take_settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) % _SETTING.size or (flags & _ACK and payload):
            raise _ProtocolError("settings of a wrong form")
        if flags & _ACK:
            return
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _LARGEST_WINDOW:
                    raise _ProtocolError(f"a window of {value}")
                self._their_window = value
            elif name == _MAX_FRAME_SIZE:
                if not _SMALLEST_FRAME <= value < 1 << 24:
                    raise _ProtocolError(f"frames of {value}")
                self._largest_frame = value
            elif name == _MAX_CONCURRENT_STREAMS:
                self._most_streams = value
        self._send(_frame(Kind.SETTINGS, _ACK, 0, b""))
        if not self.settled.done():
            self.usable = True
            self.settled.set_result(None)

    def _take_goaway(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) < 8:
            raise _ProtocolError("a farewell of a wrong form")
        last = int.from_bytes(payload[:4], "big") & _LAST_STREAM
        self._leave(f"GOAWAY: {payload[8:72].decode(errors='replace') or 'no reason given'}")
        for number in [one for one in self._streams if one > last]:
            self._fail(self._streams.pop(number), grpc.StatusCode.UNAVAILABLE, self.problem)

    def _refuse_push(self, flags: int, stream: int, payload: bytes) -> None:
        raise _ProtocolError("a push")

    def _take_ping(self, flags: int, stream: int, payload: bytes) -> None:
        if stream or len(payload) != len(_PING_DATA):
            raise _ProtocolError("a ping of a wrong form")
        if flags & _ACK:
            return
        self._owed += _frame(Kind.PING, _ACK, 0, payload)
        if len(self._owed) > _MOST_OWED:
            self._pay()
        elif self._paying is None:
            self._paying = asyncio.get_running_loop().call_later(_OWED_SECONDS, self._pay)

    def _pay(self) -> None:
        """Sends what is still owed, if no call has taken it along."""
        if self._paying is not None:
            self._paying.cancel()
            self._paying = None
        if self._owed:
            owed, self._owed = self._owed, b""
            self._send(owed)

    def _take_window(self, flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ProtocolError("a window of a wrong form")
        if not stream:  # those of streams come too late: a message leaves whole
            self._window += int.from_bytes(payload, "big") & _LARGEST_WINDOW
            if self._window > _LARGEST_WINDOW:
                raise _ProtocolError("a window that is too large")

    def _check_known(self, stream: int) -> None:
        """An even stream is the server's own, and we allow it none; a later one we have not begun."""
        if not stream % 2 or stream >= self._next_stream:
            raise _ProtocolError(f"stream {stream} does not exist")

    # ---- What becomes of calls, and of the connection

    def _ended(self, stream: int) -> None:
        """All of an answer is there."""
        self._answer(self._streams.pop(stream))
        self._end_if_done()

    def _answer(self, found: _Stream) -> None:
        """Gives a call what its answer says."""
        if found.code is None:
            if found.http_status != "200" or not found.is_grpc:
                code = _BY_HTTP_STATUS.get(found.http_status, grpc.StatusCode.UNKNOWN)
                self._fail(found, code, f"HTTP status {found.http_status or 'missing'}, and no gRPC")
            else:
                self._fail(found, grpc.StatusCode.UNKNOWN, _CUT)
            return
        status = _CODES.get(found.code, grpc.StatusCode.UNKNOWN)
        if status is not grpc.StatusCode.OK:
            self._fail(found, status, found.message)
            return
        body = found.body
        if len(body) < _MESSAGE.size or body[0] or _size(found) != len(body) - _MESSAGE.size:
            self._fail(found, grpc.StatusCode.INTERNAL, f"{_CUT}: {len(body)} bytes are no message")
        elif not found.answer.done():
            found.answer.set_result(bytes(body[_MESSAGE.size :]))

    def _fail(self, found: _Stream, code: grpc.StatusCode, details: str) -> None:
        if not found.answer.done():
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
            found.answer.set_exception(error)

    def _leave(self, problem: str) -> None:
        """No call begins any more."""
        self.usable, self.problem = False, problem
        if not self.leaving.done():
            self.leaving.set_result(None)

    def _end(self, problem: str) -> None:
        """The connection ends now, and every call with it."""
        transport, self._transport = self._transport, None
        if self.usable or not self.leaving.done():
            self._leave(problem)
        if not self.settled.done():
            self.settled.set_result(None)
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        streams, self._streams = self._streams, {}
        for found in streams.values():
            self._fail(found, grpc.StatusCode.UNAVAILABLE, problem)
        if transport is not None:
            transport.abort()
        self._on_end(self)

    def _end_if_done(self) -> None:
        if self._is_done and not self._streams:
            self._end(self.problem)

    def _look(self) -> None:
        """Whether the peer is still there, while calls wait for it."""
        loop, self._watch = asyncio.get_running_loop(), None
        if not self._streams:
            return
        now = self._clock()
        if self._pinged_at is not None:
            self._end(f"nothing came for {now - self._heard_at:.1f} s, not even the answer to a ping")
            return
        silent = now - self._heard_at
        if silent < _SILENT_SECONDS:
            self._watch = loop.call_later(_SILENT_SECONDS - silent, self._look)
            return
        self._pinged_at = now
        self._send(_frame(Kind.PING, 0, 0, _PING_DATA))
        self._watch = loop.call_later(_PING_SECONDS, self._look)

    def _send(self, frames: bytes) -> None:
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(frames)
            if transport.get_write_buffer_size() > _MOST_UNSENT:
                self.is_broken = True
                self._end("HTTP/2: it does not read what it asks for")


def _said_by(headers: Iterable[tuple[bytes, bytes]]) -> _Said:
    said: dict[str, Any] = {}
    for name, value in headers:
        if name == b"grpc-status":
            said["code"] = value.decode("ascii", "replace")
        elif name == b"grpc-message":
            said["message"] = unquote(value.decode("ascii", "replace"), errors="replace")
        elif name == b":status":
            said["http_status"] = value.decode("ascii", "replace")
        elif name == b"content-type":
            said["is_grpc"] = value.startswith(b"application/grpc")
    return _Said(**said)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _ProtocolError("more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def _size(found: _Stream) -> int:
    """What the message of an answer says of its length."""
    size: int = _MESSAGE.unpack_from(found.body)[1]
    return size
