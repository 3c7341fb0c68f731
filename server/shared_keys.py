"""Idempotency keys that all processes of a server share: a table in memory that belongs to no single process.

The supervisor makes the memory, and every process it starts inherits it: a key outlives the process that decided its
order. A key has a place in one of the table's buckets, and is in one of three states::

    free      nobody asked, or the window is over        → the process that claims it decides
    claimed   a process decides, until its deadline      → others wait; past that deadline it is free again
    decided   the decision is here, until the window is over

A bucket is changed under a lock of its own, which the kernel takes from a process that dies. A process that was stopped
while it held one costs the others no more than the keys of that bucket: nobody waits for a lock, but asks again.

Rejected: Redis, for a round trip on every order with a key, and for failing with Redis; the kernel cannot send a key
to a process of our choice, as it picks by connection.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from server.errors import KeyReusedError, OverloadedError

_WAYS: Final = 32
_DIGEST_BYTES: Final = 16
_MAX_BYTES: Final = 960
"""Of one decision; a longer one, which nobody has seen, is known only to the process that made it."""
_COLUMNS: Final = {"key": "<u8", "expires": "<f8", "until": "<f8", "claim": "<u8", "length": "<u8"}
"""`key` is a hash; instants are monotonic seconds, which all processes of a machine share; `claim` names who decides;
`length` is that of the decision, 0 while there is none."""
_ENTRY_BYTES: Final = 8 * len(_COLUMNS) + _DIGEST_BYTES + _MAX_BYTES


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to decide the order of a key."""

    bucket: int
    way: int
    number: int


class BusyError(Exception):
    """Nothing is known yet: another process decides, or is just looking at the same bucket."""


def make_memory(keys: int) -> int:
    """Memory for so many keys, as a file descriptor that processes started with it inherit; Linux only."""
    memory = os.memfd_create("pretrade-idempotency-keys", 0)
    os.ftruncate(memory, -(-keys // _WAYS) * _WAYS * _ENTRY_BYTES)
    return memory


class SharedKeys:
    """The table, as one process sees it.

    Args:
        memory: Made by `make_memory`.
        window_seconds: How long a decision is kept.
        clock: Monotonic seconds.
    """

    def __init__(self, memory: int, window_seconds: float, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._window_seconds = window_seconds
        self._clock = clock
        self._mapped = mmap.mmap(memory, 0)
        entries = len(self._mapped) // _ENTRY_BYTES
        self._buckets = entries // _WAYS
        columns = [
            np.frombuffer(self._mapped, kind, entries, place * 8 * entries).reshape(-1, _WAYS)
            for place, kind in enumerate(_COLUMNS.values())
        ]
        self._key, self._expires, self._until, self._claim, self._length = columns
        self._digests = len(columns) * 8 * entries
        self._decisions = self._digests + _DIGEST_BYTES * entries
        self.unshared = 0
        """Decisions, too long for the table, that only the process knows that made them."""

    def claim(self, key: str, digest: bytes, deadline: float) -> Claim | bytes:
        """What is known of a key; if that is nothing, the right to decide, until `deadline` (monotonic seconds).

        Raises:
            BusyError: Ask again in a moment.
            KeyReusedError: The key was used for another order.
            OverloadedError: There is no room for another key.
        """
        hashed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        bucket = hashed % self._buckets
        with self._locked(bucket):
            now = self._clock()
            live = self._expires[bucket] > now
            known = (live & (self._key[bucket] == hashed)).nonzero()[0]
            if known.size:
                way = int(known[0])
                if self._digest(bucket, way) != digest:
                    raise KeyReusedError(
                        "IDEMPOTENCY_KEY_REUSED", "idempotency_key: already used for another order", "idempotency_key"
                    )
                if length := int(self._length[bucket, way]):
                    place = self._place(bucket, way, self._decisions, _MAX_BYTES)
                    return self._mapped[place : place + length]
                if self._until[bucket, way] > now:
                    raise BusyError
            else:
                way = int(live.argmin())
                if live[way]:
                    raise OverloadedError("TOO_MANY_IDEMPOTENCY_KEYS", "too many keys are remembered")
            claim = Claim(bucket, way, int.from_bytes(os.urandom(8), "little"))
            place = self._place(bucket, way, self._digests, _DIGEST_BYTES)
            self._mapped[place : place + _DIGEST_BYTES] = digest
            self._length[bucket, way] = 0
            self._key[bucket, way] = hashed
            self._claim[bucket, way] = claim.number
            self._until[bucket, way] = deadline
            self._expires[bucket, way] = now + self._window_seconds
            return claim

    def decided(self, claim: Claim, decision: bytes) -> None:
        """Lets all processes know what was decided, unless another one has decided meanwhile.

        Raises:
            BusyError: Ask again in a moment.
        """
        if len(decision) > _MAX_BYTES:
            self.unshared += 1
            return
        with self._locked(claim.bucket):
            if self._claim[claim.bucket, claim.way] == claim.number:
                place = self._place(claim.bucket, claim.way, self._decisions, _MAX_BYTES)
                self._mapped[place : place + len(decision)] = decision
                self._length[claim.bucket, claim.way] = len(decision)

    def release(self, claim: Claim) -> None:
        """Gives a key free, of which there is no decision.

        Raises:
            BusyError: Ask again in a moment.
        """
        with self._locked(claim.bucket):
            if self._claim[claim.bucket, claim.way] == claim.number:
                self._expires[claim.bucket, claim.way] = 0.0

    def _digest(self, bucket: int, way: int) -> bytes:
        place = self._place(bucket, way, self._digests, _DIGEST_BYTES)
        return self._mapped[place : place + _DIGEST_BYTES]

    @staticmethod
    def _place(bucket: int, way: int, start: int, size: int) -> int:
        """Where an entry's bytes begin in a column of such that begins at `start`."""
        return start + (bucket * _WAYS + way) * size

    @contextmanager
    def _locked(self, bucket: int) -> Iterator[None]:
        try:
            fcntl.lockf(self._memory, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, bucket)
        except OSError:
            raise BusyError from None
        try:
            yield
        finally:
            fcntl.lockf(self._memory, fcntl.LOCK_UN, 1, bucket)
