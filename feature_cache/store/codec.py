"""One instrument's vector of one feature set, and its packed form in Redis.

Layout, little-endian, no padding::

    magic "PTF1" | fingerprint u32 | sequence i64 | event_time_ns i64 | book_time_ns i64 | trade_time_ns i64
    | publish_time_ns i64 | transit_ns i64 | bid f64 | ask f64 | state u8 | instrument length u8 | instrument (UTF-8)
    | values f32[features of the set]

The fingerprint says which set the vector is of, and with that how long it is.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import feature_sets
from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.features import MF1

_MAGIC: Final = b"PTF1"
_HEADER: Final = struct.Struct("<4sIqqqqqqddBB")
_HEAD: Final = struct.Struct("<8sq24xqq16xBB")
"""The header without what only `decode` gives, and with magic and fingerprint in one."""


class CodecError(ValueError):
    """The bytes are no vector of the set that is wanted; the message says what is wrong."""


class BookState(enum.IntEnum):
    """What is known of the instrument's book."""

    UNKNOWN = 0
    """No snapshot yet, or a gap, reset or crossed book since: nothing may be decided on it."""
    VALID = 1
    LOCKED = 2
    """Valid, with the best bid at the best ask."""


_STATES: Final = frozenset(map(int, BookState))


@dataclass(frozen=True, slots=True)
class FeatureSnapshot:
    """The features of one instrument at one event.

    All times are nanoseconds since the Unix epoch. `event_time_ns`, `book_time_ns` and `trade_time_ns` are on the
    exchange's clock (0: none yet); `publish_time_ns` is on ours.
    """

    instrument: str
    sequence: int
    """Increases per instrument, also over a restart of the worker; an older one never replaces a newer one."""
    event_time_ns: int
    """Event time of the newest event in the windows."""
    book_time_ns: int
    """Event time of the newest book or quote event."""
    trade_time_ns: int
    """Event time of the newest trade."""
    publish_time_ns: int
    """When the newest event was published to the topic."""
    transit_ns: int
    """How much longer the newest event took from exchange to receipt than the feed's clock offset accounts for, >= 0;
    see `lag.MAX_OFFSET_NS`."""
    bid: float
    """Best bid in quote currency; NaN when missing."""
    ask: float
    """Best ask in quote currency; NaN when missing."""
    state: BookState
    values: NDArray[np.float32]
    """float32[features of the set] in market orientation. Ages are as of `event_time_ns`; the decision server adds the
    age of the snapshot."""
    feature_set: FeatureSet = MF1

    @property
    def mid(self) -> float:
        """(bid + ask) / 2 in quote currency; NaN when a side is missing."""
        return (self.bid + self.ask) / 2


def age_seconds(publish_time_ns: int, transit_ns: int, now_ns: int) -> float:
    """Age of a vector from exchange event time at the wall-clock instant `now_ns`, never negative.

    Time since the newest event was published plus what it lost on its way, so that a replay at any speed and a local
    clock that differs from the exchange's give the true age.
    """
    return max(0, now_ns - publish_time_ns + transit_ns) / 1e9


def encode(snapshot: FeatureSnapshot) -> bytes:
    """Packs a snapshot; `decode` gives it back."""
    name = snapshot.instrument.encode()
    return b"".join(
        (
            _HEADER.pack(
                _MAGIC,
                snapshot.feature_set.fingerprint,
                snapshot.sequence,
                snapshot.event_time_ns,
                snapshot.book_time_ns,
                snapshot.trade_time_ns,
                snapshot.publish_time_ns,
                snapshot.transit_ns,
                snapshot.bid,
                snapshot.ask,
                snapshot.state,
                len(name),
            ),
            name,
            snapshot.values.astype(ROW, copy=False).tobytes(),
        )
    )


class Heads:
    """Reads the heads of the vectors of one set.

    Args:
        feature_set: The only one that is taken.
    """

    def __init__(self, feature_set: FeatureSet) -> None:
        self.prefix: Final = struct.pack("<4sI", _MAGIC, feature_set.fingerprint)
        """What every vector of the set begins with."""
        self._values_bytes = feature_set.row_bytes
        self._fixed_bytes = _HEADER.size + feature_set.row_bytes
        self._feature_set = feature_set

    def read(self, packed: bytes) -> tuple[bytes, int, int, int]:
        """Checks a packed vector as `decode` does, but for its name, and unpacks only what tells instrument and age.

        It takes a sixth of what `decode` takes: a server gets far more vectors than it decides orders.

        Returns:
            Instrument (UTF-8), sequence, `publish_time_ns` and `transit_ns`.

        Raises:
            CodecError: See `decode`; or it is of another set.
        """
        try:
            prefix, sequence, publish_time, transit, state, length = _HEAD.unpack_from(packed)
        except struct.error:
            _fields(packed)  # it is too short
            raise
        if prefix != self.prefix or len(packed) != self._fixed_bytes + length or state not in _STATES:
            _fields(packed, self._feature_set)
        return packed[_HEADER.size : -self._values_bytes], sequence, publish_time, transit


def decode(packed: bytes) -> FeatureSnapshot:
    """Unpacks a snapshot.

    Raises:
        CodecError: Too short or long, another magic, a feature set that is not known here, or an impossible field.
    """
    feature_set, fields = _fields(packed)
    _, _, sequence, event_time, book_time, trade_time, publish_time, transit, bid, ask, state, _ = fields
    try:
        instrument = packed[_HEADER.size : -feature_set.row_bytes].decode()
    except ValueError as error:
        raise CodecError(str(error)) from error
    return FeatureSnapshot(
        instrument=instrument,
        sequence=sequence,
        event_time_ns=event_time,
        book_time_ns=book_time,
        trade_time_ns=trade_time,
        publish_time_ns=publish_time,
        transit_ns=transit,
        bid=bid,
        ask=ask,
        state=BookState(state),
        values=np.frombuffer(packed, dtype=ROW, offset=len(packed) - feature_set.row_bytes),
        feature_set=feature_set,
    )


def _fields(packed: bytes, wanted: FeatureSet | None = None) -> tuple[FeatureSet, tuple[Any, ...]]:
    """The set and the fields of the header.

    Args:
        packed: A vector.
        wanted: The only set that is taken; None takes any that is known.

    Raises:
        CodecError: See `decode`.
    """
    if len(packed) < _HEADER.size:
        raise CodecError(f"{len(packed)} bytes are shorter than the header of {_HEADER.size}")
    fields = _HEADER.unpack_from(packed)
    magic, fingerprint, state, length = fields[0], fields[1], fields[10], fields[11]
    if magic != _MAGIC:
        raise CodecError(f"magic is {magic!r}, not {_MAGIC!r}")
    if wanted is not None and fingerprint != wanted.fingerprint:
        raise CodecError(f"fingerprint {fingerprint:08x} is not {wanted.id}'s {wanted.fingerprint:08x}")
    feature_set = wanted or feature_sets.by_fingerprint(fingerprint)
    if feature_set is None:
        raise CodecError(f"fingerprint {fingerprint:08x} is of no set known here: {feature_sets.names()}")
    expected = _HEADER.size + feature_set.row_bytes + length
    if len(packed) != expected:
        raise CodecError(f"{len(packed)} bytes, expected {expected}")
    if state not in _STATES:
        raise CodecError(f"{state} is not a valid BookState")
    return feature_set, fields
