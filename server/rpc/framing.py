"""gRPC's own part of a call over HTTP/2: headers, framed messages, status trailers. Knows no servicer.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import base64
import contextlib
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import quote

import grpc

from server.errors import ProtocolError, UnsupportedEncodingError

PREFIX_BYTES: Final = 5
"""Before each message: whether it is compressed, and its length as 4 bytes, big-endian."""
CONTENT_TYPE: Final = (b"content-type", b"application/grpc")
ENCODINGS: Final = b"identity,gzip,deflate"
ARRIVED: Final = b"x-pretrade-arrived"
"""Header that Envoy adds: when the call's headers arrived, in seconds of the wall clock."""
PEER: Final = b"x-pretrade-peer"
"""Header that Envoy adds where callers are asked who they are: the address of the connection's other end."""
_UNITS: Final = {b"H": 3_600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_WINDOW_BITS: Final = {b"gzip": zlib.MAX_WBITS | 16, b"deflate": zlib.MAX_WBITS}
_UNESCAPED: Final = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

Header = tuple[bytes, bytes]
Metadata = Sequence[tuple[str, str | bytes]]


def framed(message: bytes) -> bytes:
    """A message, uncompressed, behind its prefix."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def message_length(frame: bytes | bytearray) -> int:
    """The length that a prefix announces."""
    return int.from_bytes(frame[1:PREFIX_BYTES], "big")


class CallHeaders(NamedTuple):
    """What a call's headers say."""

    timeout: float | None
    """Seconds; None without one."""
    encoding: bytes
    """How its messages are compressed."""
    arrived: float | None
    """When they arrived, in seconds of the wall clock; None if unknown."""


def call_headers(headers: Sequence[Header]) -> CallHeaders:
    """Reads those headers of a call that mean something to gRPC.

    Raises:
        ProtocolError: The timeout is none.
    """
    timeout: float | None = None
    encoding = b"identity"
    arrived: float | None = None
    for name, value in headers:
        if name == b"grpc-timeout":
            unit = _UNITS.get(value[-1:])
            if unit is None or not value[:-1].isdigit():
                raise ProtocolError(f"grpc-timeout: {value[:32]!r} is not a timeout")
            # More digits than gRPC allows are no harm: the distant future has no end.
            timeout = float(value[:-1]) * unit
        elif name == b"grpc-encoding":
            encoding = value
        elif name == ARRIVED:
            arrived = float(value)
    return CallHeaders(timeout, encoding, arrived)


def decompressed(payload: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """A compressed message's bytes; one more than `max_bytes` at most, however many there would be.

    Raises:
        ProtocolError: It is not what its encoding says.
        UnsupportedEncodingError: The encoding is unknown.
    """
    if encoding == b"identity":
        raise ProtocolError("a compressed message without grpc-encoding")
    bits = _WINDOW_BITS.get(encoding)
    if bits is None:
        raise UnsupportedEncodingError(f"grpc-encoding: {encoding[:32]!r} is not supported")
    unpacking = zlib.decompressobj(bits)
    with contextlib.suppress(zlib.error):
        plain = unpacking.decompress(payload, max_bytes + 1)
        if unpacking.eof or len(plain) > max_bytes:
            return plain
    raise ProtocolError(f"the message is not {encoding.decode()}")


def status_headers(code: grpc.StatusCode, details: str, trailing_metadata: Metadata = ()) -> list[Header]:
    """The trailers of a call that ends with a status other than OK."""
    headers = [(b"grpc-status", str(code.value[0]).encode())]
    if details:
        headers.append((b"grpc-message", quote(details, safe=_UNESCAPED).encode()))
    for name, value in trailing_metadata:
        wire = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        headers.append((name.encode(), wire))
    return headers
