"""Unique, time-ordered ids (UUID version 7, RFC 9562)."""

from __future__ import annotations

import datetime as dt
import os
import time
import uuid
from collections.abc import Callable
from typing import Final

_VERSION = 0x7 << 76
_VARIANT = 0x2 << 62
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Ids:
    """The source of UUIDv7 strings of one process.

    48 bits of Unix milliseconds, then a 42-bit counter from a random start and 32 random bits drawn once per process,
    so that ids of one process rise within a millisecond and ids of different processes differ.

    Args:
        wall_clock_ns: Nanoseconds since the Unix epoch.
        random_bytes: Gives so many bytes.
    """

    def __init__(
        self, wall_clock_ns: Callable[[], int] = time.time_ns, random_bytes: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._wall_clock_ns = wall_clock_ns
        self._count = int.from_bytes(random_bytes(4), "big")
        self._process = random_bytes(4).hex()

    def __call__(self) -> str:
        """The next one."""
        return self.several(1)[0]

    def several(self, ids: int) -> list[str]:
        """So many, made at one instant."""
        milliseconds = self._wall_clock_ns() // 1_000_000 & 0xFFFF_FFFF_FFFF
        made: list[str] = []
        while len(made) < ids:
            high, low = divmod(self._count & 0x3FF_FFFF_FFFF, 0x1_0000)
            value = milliseconds << 80 | _VERSION | (high >> 14) << 64 | _VARIANT | (high & 0x3FFF) << 48
            digits = f"{value:032x}"
            start, process = f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-", self._process
            numbers = range(low, min(low + ids - len(made), 0x1_0000))
            self._count += len(numbers)
            made += [f"{start}{number:04x}{process}" for number in numbers]
        return made


def made_at(decision_id: str) -> dt.datetime | None:
    """The wall clock's UTC time when an id was made, to the millisecond; None where it is not of version 7."""
    try:
        value = uuid.UUID(decision_id).int
    except ValueError:
        return None
    if value >> 76 & 0xF != _VERSION >> 76:
        return None
    try:
        return _EPOCH + dt.timedelta(milliseconds=value >> 80)
    except OverflowError:
        return None


def id_bound(instant: dt.datetime) -> str:
    """Less than every id made at this millisecond or later, and greater than every id made before."""
    digits = f"{max(0, (instant - _EPOCH) // dt.timedelta(milliseconds=1)):012x}"
    return f"{digits[:8]}-{digits[8:]}"
