"""What a worker and the process of a computed set say to each other, over a socket.

A message is its length, a little-endian u32, and that many bytes. The worker sends batches, which count from 1::

    wanted u32 | engine u32[wanted] | (engine u32 | begins u8 | length u32 | event as it is in the log)*

`wanted` are the engines whose vectors are to be given after this batch. `begins` is 1 if the instrument begins, or
begins again, with this event: it gets a new computer. The process answers with one of::

    READY     u8 = 1 | fingerprint u32
    PROGRESS  u8 = 2 | taken u64 | answered u64 | CPU seconds f64
              | (batch u64 | engine u32 | values f32[features of the set])*
    FAILED    u8 = 3 | reason (16 bytes, padded with NUL) | detail (UTF-8)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from feature_cache.feature_set import ROW

_LENGTH: Final = struct.Struct("<I")
_NUMBER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<I?I")
_READY: Final = struct.Struct("<BI")
_PROGRESS: Final = struct.Struct("<BQQd")
_VECTOR: Final = struct.Struct("<QI")
_FAILED: Final = struct.Struct("<B16s")
_HEADS: Final = {1: _READY, 2: _PROGRESS, 3: _FAILED}
_MOST_BYTES: Final = 1 << 30
"""Of a message. Nobody sends as much."""


class MessageError(ValueError):
    """The bytes are no message."""


class Entry(NamedTuple):
    """One event."""

    engine: int
    """Number of the instrument's engine in the worker."""
    begins: bool
    event: bytes


class Batch(NamedTuple):
    """What has come together."""

    entries: Iterable[Entry]
    wanted: Sequence[int]
    """Engines whose vectors are to be given."""


class Vector(NamedTuple):
    """The values of an instrument."""

    batch: int
    """Number of the batch after which they are wanted."""
    engine: int
    values: NDArray[np.float32]
    """float32[features of the set], NaN where a feature comes from elsewhere."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The process has loaded the set, and has made a computer."""

    fingerprint: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is."""

    taken: int
    """How many events it has taken since it began."""
    answered: int
    """Number of the newest batch whose vectors have been given."""
    cpu_seconds: float
    """That the process has used since it began."""
    vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """It gives up."""

    reason: str
    detail: str


Answer = Ready | Progress | Failed


class Messages:
    """Bytes in, whole messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, data: bytes) -> list[bytes]:
        """Takes what has come; returns the messages that are whole now.

        Raises:
            MessageError: A message would be longer than any that is sent.
        """
        buffer = self._buffer
        buffer += data
        found, at = [], 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > _MOST_BYTES:
                raise MessageError(f"a message of {length} bytes")
            end = at + _LENGTH.size + length
            if end > len(buffer):
                break
            found.append(bytes(buffer[at + _LENGTH.size : end]))
            at = end
        del buffer[:at]
        return found


def packed_batch(batch: Batch) -> bytes:
    """A batch, with its length in front."""
    parts = [b"", struct.pack(f"<I{len(batch.wanted)}I", len(batch.wanted), *batch.wanted)]
    for engine, begins, event in batch.entries:
        parts += (_ENTRY.pack(engine, begins, len(event)), event)
    return _whole(parts)


def batch_of(message: bytes) -> Batch:
    """The batch in a message."""
    (wanted,) = _NUMBER.unpack_from(message)
    return Batch(_entries(message, _NUMBER.size * (1 + wanted)), struct.unpack_from(f"<{wanted}I", message, 4))


def _entries(message: bytes, at: int) -> Iterator[Entry]:
    while at < len(message):
        engine, begins, length = _ENTRY.unpack_from(message, at)
        at += _ENTRY.size
        yield Entry(engine, begins, message[at : at + length])
        at += length


def packed(answer: Answer) -> bytes:
    """An answer, with its length in front."""
    match answer:
        case Ready(fingerprint):
            return _whole([b"", _READY.pack(1, fingerprint)])
        case Progress(taken, answered, cpu_seconds, vectors):
            parts = [b"", _PROGRESS.pack(2, taken, answered, cpu_seconds)]
            for number, engine, values in vectors:
                parts += (_VECTOR.pack(number, engine), values.astype(ROW, copy=False).tobytes())
            return _whole(parts)
        case Failed(reason, detail):
            return _whole([b"", _FAILED.pack(3, reason.encode()), detail.encode(errors="replace")])


def answer_of(message: bytes, features: int) -> Answer:
    """The answer in a message.

    Args:
        message: Without its length.
        features: How many features the set has.

    Raises:
        MessageError: It is no answer.
    """
    kind = message[0] if message else 0
    head = _HEADS.get(kind)
    if head is None or len(message) < head.size:
        raise MessageError(f"{message[:16]!r} is no answer")
    if head is _READY:
        return Ready(head.unpack_from(message)[1])
    if head is _FAILED:
        reason = head.unpack_from(message)[1].rstrip(b"\0").decode(errors="replace")
        return Failed(reason, message[head.size :].decode(errors="replace"))
    _, taken, answered, cpu_seconds = head.unpack_from(message)
    size = _VECTOR.size + features * ROW.itemsize
    if (len(message) - head.size) % size:
        raise MessageError(f"{len(message)} bytes hold no vectors of {features} features")
    vectors = tuple(_vector(message, at, features) for at in range(head.size, len(message), size))
    return Progress(taken, answered, cpu_seconds, vectors)


def _vector(message: bytes, at: int, features: int) -> Vector:
    number, engine = _VECTOR.unpack_from(message, at)
    return Vector(number, engine, np.frombuffer(message, ROW, features, at + _VECTOR.size))


def _whole(parts: list[bytes]) -> bytes:
    parts[0] = _LENGTH.pack(sum(map(len, parts)))
    return b"".join(parts)
