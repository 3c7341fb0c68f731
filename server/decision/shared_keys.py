"""The table of idempotency keys: memory that all processes of a server share.

The supervisor allocates the memory, and every process that it starts inherits it, so a key outlives the process that
decided its order. A server of one process has its own table. A key takes a slot of one bucket. Its states::

    free       never used, or forgotten                  → the process that claims it decides
    claimed    a process decides, until its deadline     → others wait; past that deadline it is free again, unless
                                                           its process has died: then see there
    decided    the decision is here                      → repeats get it
    withdrawn  a repeat got something safer              → so does every later one

Layout. A bucket has 256 slots. The key's hash picks the bucket, and the key takes any free slot of it. With n keys
alive in b buckets, the number of keys in a bucket is Poisson distributed with mean n / b. The table is made so large
that this mean is 192 when as many keys are alive as were asked for; 256 are four and a half standard deviations away.
(Buckets of 32, as many as there were at first, overflowed at three quarters of their load.) Smaller buckets with two
choices would need two locks.

Claims of the dead. A process that is killed may have written its decision to its journal, and not yet here. Each
process holds a lock that tells the others that it lives. Whoever meets a claim of a dead process looks into that
process's journal first (`left_keys.py`); a claim that is nowhere to be found there is free.

Memory. A slot takes 512 bytes, in pages that the kernel provides when they are first written to. A key takes the first
free slot, so the memory in use follows the largest number of keys that were alive at once.

Locks. A bucket is changed under a lock of its own, which the kernel releases when its holder dies. If a process is
stopped while it holds one, the other processes do without the keys of that bucket: they do not block on the lock, but
try again later.

Rejected: Redis, because it adds a round trip to every order with a key, and fails with Redis. Also rejected: sending a
key always to the same process. The kernel cannot do that, because it distributes connections and not calls.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from server.errors import KeyReusedError, OverloadedError

PLACES: Final = 256
"""In one bucket."""
_MEAN_PLACES: Final = 192
"""Of them in use, in the mean, when as many keys are alive as the table was made for."""
_DIGEST_BYTES: Final = 16
MAX_BYTES: Final = 448
"""Of one decision as `Decided.remembered` has it. The longest that can be is shorter; a test holds it against this."""
_COLUMNS: Final = {"tag": "<u8", "expires": "<f8", "claim": "<u8", "owner": "<u8", "state": "<u8", "length": "<u8"}
"""`tag` is a part of the key's hash; `expires` is in monotonic seconds, which all processes of a machine share: until
then a claim holds, or a decision is kept; `claim` tells claims apart; `owner` is the process that made it, as its slot
and its process id; `state` is one of those below."""
_CLAIMED, _DECIDED, _WITHDRAWN, _NOTED = range(4)
_PLACE_BYTES: Final = 8 * len(_COLUMNS) + _DIGEST_BYTES + MAX_BYTES
_HEADER: Final = struct.Struct("<8sQ")
_MAGIC: Final = b"PTKEYS03"
_PAGE: Final = 4_096
"""The header has a page of its own."""
_LIVES: Final = 2**40
"""Beyond all buckets: the lock of a process that lives is so much and its process id."""
_PID_BITS: Final = 32
_TAKERS: Final = struct.Struct("<Q")
"""In the header, for each slot: the process that has taken its journal over, by its process id."""
_MOST_SLOTS: Final = (_PAGE - _HEADER.size) // _TAKERS.size


class KeyedOrder(NamedTuple):
    """What a key is remembered by."""

    key: bytes
    """16 bytes: whose key, and which."""
    digest: bytes
    """16 bytes: what was asked with it."""
    order_ref: str
    """A part of what was asked, and of the decision, that is therefore not kept."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to decide the order of a key; afterwards, the slot of its decision."""

    bucket: int
    place: int
    number: int


class Remembered(NamedTuple):
    """What was decided."""

    claim: Claim
    """Where it is."""
    decision: bytes
    """`Decided.remembered`."""
    is_withdrawn: bool
    """True when a repeat heard something safer than the first call; this is what it heard."""
    is_noted: bool
    """True once that is durable in the audit."""


class BusyError(Exception):
    """Nothing is known yet: another process decides, or is just looking at the same bucket."""


class OrphanedError(Exception):
    """A process that is dead has claimed the key; only its journal knows whether it had decided."""

    def __init__(self, claim: Claim, owner: int) -> None:
        super().__init__()
        self.claim = claim
        self.owner = owner
        """The process, of which there is no other with this number."""

    @property
    def slot(self) -> int:
        """The slot that the process had, and so its journal."""
        return self.owner >> _PID_BITS


def reused() -> KeyReusedError:
    """The error of a call whose key was used for another order."""
    return KeyReusedError(
        "IDEMPOTENCY_KEY_REUSED", "idempotency_key: already used for another order", "idempotency_key"
    )


def make_memory(keys: int) -> int:
    """Memory for so many keys at once, as a file descriptor that processes started with it inherit."""
    buckets = -(-keys // _MEAN_PLACES)
    size = _PAGE + buckets * PLACES * _PLACE_BYTES
    if sys.platform == "linux":
        memory = os.memfd_create("pretrade-idempotency-keys", 0)
    else:
        with tempfile.TemporaryFile() as file:
            memory = os.dup(file.fileno())
    os.ftruncate(memory, size)
    os.pwrite(memory, _HEADER.pack(_MAGIC, buckets), 0)
    return memory


class SharedKeys:
    """The table, as one process sees it.

    Args:
        memory: Made by `make_memory`.
        window_seconds: How long a decision is remembered.
        clock: Monotonic seconds.
        new_number: Numbers of 64 bits, none of them twice among all processes.
        slot: That of this process.

    Raises:
        ValueError: The memory was made by a version of this module that lays it out otherwise.
    """

    def __init__(
        self,
        memory: int,
        window_seconds: float,
        clock: Callable[[], float],
        new_number: Callable[[], int] = lambda: int.from_bytes(os.urandom(8), "little"),
        slot: int = 0,
    ) -> None:
        self._memory = memory
        self._window_seconds = window_seconds
        self._clock = clock
        self._new_number = new_number
        self._mapped = mmap.mmap(memory, 0)
        magic, self._buckets = _HEADER.unpack_from(self._mapped)
        if magic != _MAGIC:
            raise ValueError("the memory of the idempotency keys is of another version; restart the server")
        places = self._buckets * PLACES
        columns = [
            np.frombuffer(self._mapped, kind, places, _PAGE + number * 8 * places).reshape(-1, PLACES)
            for number, kind in enumerate(_COLUMNS.values())
        ]
        self._tag, self._expires, self._claim, self._owner, self._state, self._length = columns
        self._digests = _PAGE + len(columns) * 8 * places
        self._decisions = self._digests + _DIGEST_BYTES * places
        self._pid = os.getpid()
        self._me = slot << _PID_BITS | self._pid
        fcntl.lockf(memory, fcntl.LOCK_EX, 1, _LIVES + self._pid)

    def claim(self, order: KeyedOrder, deadline: float) -> Claim | Remembered:
        """What is known of a key; if that is nothing, the right to decide, until `deadline` (monotonic seconds).

        Raises:
            BusyError: Ask again in a moment.
            OrphanedError: A process that is dead has claimed it; ask again when it was restored or given up.
            KeyReusedError: The key was used for another order.
            OverloadedError: There is no room for another key.
        """
        bucket, tag = self._where(order)
        with self._locked(bucket):
            now = self._clock()
            for place in self._places_of(bucket, tag):
                if self._expires[bucket, place] > now:
                    return self._known(bucket, place, order.digest)
                if self._is_left(bucket, place, now) and self._is_dead(bucket, place):
                    raise OrphanedError(self._claim_at(bucket, place), int(self._owner[bucket, place]))
            claim = self._take(bucket, tag, order.digest, now)
            self._state[bucket, claim.place] = _CLAIMED
            self._expires[bucket, claim.place] = deadline
            return claim

    def restore(self, order: KeyedOrder, decision: bytes, seconds: float) -> None:
        """Remembers, for so many seconds, what a dead process had decided, unless something newer is known of the key.

        Raises:
            BusyError: Ask again in a moment.
            OverloadedError: There is no room for another key.
        """
        bucket, tag = self._where(order)
        with self._locked(bucket):
            now = self._clock()
            for place in self._places_of(bucket, tag):
                lives = self._expires[bucket, place] > now
                if (lives or self._is_left(bucket, place, now)) and self._is_orphaned(bucket, place):
                    self._expires[bucket, place] = 0.0
                elif lives:
                    return
            claim = self._take(bucket, tag, order.digest, now)
            self._write(claim, decision, _DECIDED)
            self._expires[bucket, claim.place] = now + seconds

    def has_taken_over(self) -> None:
        """This process writes the journal of its slot now, and what the process before it had decided is here."""
        slot = self._me >> _PID_BITS
        if slot < _MOST_SLOTS:
            _TAKERS.pack_into(self._mapped, _HEADER.size + slot * _TAKERS.size, self._pid)

    def is_taken_over(self, slot: int) -> bool:
        """Whether what dead processes in a slot had decided is here, since a process that lives has taken it over."""
        if slot >= _MOST_SLOTS:
            return False
        (pid,) = _TAKERS.unpack_from(self._mapped, _HEADER.size + slot * _TAKERS.size)
        return bool(pid) and self._lives(pid)

    def give_up(self, claim: Claim) -> None:
        """Gives a key free that a dead process had claimed and not decided.

        Raises:
            BusyError: Ask again in a moment.
        """
        with self._locked(claim.bucket):
            if self._claim[claim.bucket, claim.place] == claim.number and self._is_orphaned(claim.bucket, claim.place):
                self._expires[claim.bucket, claim.place] = 0.0

    def decided(self, claim: Claim, decision: bytes) -> bool:
        """Publishes what was decided to all processes, and remembers it for the window.

        Returns:
            False when the claim was lost: another process may have decided since. What was decided under it must not be
            sent.

        Raises:
            BusyError: Ask again in a moment.
        """
        with self._locked(claim.bucket):
            if not self._is_held(claim, _CLAIMED):
                return False
            self._write(claim, decision, _DECIDED)
            self._expires[claim.bucket, claim.place] = self._clock() + self._window_seconds
            return True

    def release(self, claim: Claim) -> None:
        """Gives a key free, of which there is no decision.

        Raises:
            BusyError: Ask again in a moment.
        """
        with self._locked(claim.bucket):
            if self._is_held(claim, _CLAIMED):
                self._expires[claim.bucket, claim.place] = 0.0

    def withdraw(self, remembered: Remembered, decision: bytes) -> Remembered:
        """Gives every later repeat a safer decision, unless that has happened already.

        Returns:
            What repeats get: this decision, or that of the process that was first.

        Raises:
            BusyError: Ask again in a moment.
        """
        claim = remembered.claim
        with self._locked(claim.bucket):
            if self._is_held(claim, _WITHDRAWN) or self._is_held(claim, _NOTED):
                return self._read(claim)
            if self._is_held(claim, _DECIDED):
                self._write(claim, decision, _WITHDRAWN)
            return Remembered(claim, decision, is_withdrawn=True, is_noted=False)

    def noted(self, claim: Claim) -> None:
        """A withdrawn decision is durable in the audit.

        Raises:
            BusyError: Ask again in a moment.
        """
        with self._locked(claim.bucket):
            if self._is_held(claim, _WITHDRAWN):
                self._state[claim.bucket, claim.place] = _NOTED

    def _known(self, bucket: int, place: int, digest: bytes) -> Remembered:
        """The contents of a key's slot."""
        claim = self._claim_at(bucket, place)
        at = self._at(claim, self._digests, _DIGEST_BYTES)
        if self._mapped[at : at + _DIGEST_BYTES] != digest:
            raise reused()
        if self._state[bucket, place] != _CLAIMED:
            return self._read(claim)
        if self._is_dead(bucket, place):
            raise OrphanedError(claim, int(self._owner[bucket, place]))
        raise BusyError

    def _where(self, order: KeyedOrder) -> tuple[int, int]:
        """A key's bucket, and its tag there."""
        return int.from_bytes(order.key[:8], "little") % self._buckets, int.from_bytes(order.key[8:], "little")

    def _places_of(self, bucket: int, tag: int) -> list[int]:
        """The slots that the key has or had."""
        places: list[int] = (self._tag[bucket] == tag).nonzero()[0].tolist()
        return places

    def _take(self, bucket: int, tag: int, digest: bytes, now: float) -> Claim:
        """Gives the key a free slot, whose state and time the caller sets.

        Raises:
            OverloadedError: There is none.
        """
        free = self._expires[bucket] <= now
        place = int(free.argmax())
        if self._is_left(bucket, place, now):
            # Its process may be dead, and its journal may know more: another slot is better.
            expires = self._expires[bucket]
            is_left = (self._state[bucket] == _CLAIMED) & (expires > now - self._window_seconds) & (expires != 0.0)
            if (free & ~is_left).any():
                place = int((free & ~is_left).argmax())
        if self._expires[bucket, place] > now:
            raise OverloadedError("TOO_MANY_IDEMPOTENCY_KEYS", "too many keys are remembered")
        claim = Claim(bucket, place, self._new_number())
        at = self._at(claim, self._digests, _DIGEST_BYTES)
        self._mapped[at : at + _DIGEST_BYTES] = digest
        self._tag[bucket, place] = tag
        self._claim[bucket, place] = claim.number
        self._owner[bucket, place] = self._me
        return claim

    def _claim_at(self, bucket: int, place: int) -> Claim:
        return Claim(bucket, place, int(self._claim[bucket, place]))

    def _is_left(self, bucket: int, place: int, now: float) -> bool:
        """True of a claim whose time is up and that nobody gave up: its process was killed, or stands still."""
        return bool(
            self._state[bucket, place] == _CLAIMED
            and now - self._window_seconds < self._expires[bucket, place] <= now
            and self._expires[bucket, place]
        )

    def _is_orphaned(self, bucket: int, place: int) -> bool:
        """True of a claim of a dead process."""
        return bool(self._state[bucket, place] == _CLAIMED) and self._is_dead(bucket, place)

    def _is_dead(self, bucket: int, place: int) -> bool:
        """True when the process that made a slot's claim has died: the kernel has released its lock."""
        return not self._lives(int(self._owner[bucket, place]) & (2**_PID_BITS - 1))

    def _lives(self, pid: int) -> bool:
        if pid == self._pid:
            return True
        try:
            fcntl.lockf(self._memory, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _LIVES + pid)
        except OSError:
            return True
        fcntl.lockf(self._memory, fcntl.LOCK_UN, 1, _LIVES + pid)
        return False

    def _read(self, claim: Claim) -> Remembered:
        at = self._at(claim, self._decisions, MAX_BYTES)
        decision = self._mapped[at : at + int(self._length[claim.bucket, claim.place])]
        state = self._state[claim.bucket, claim.place]
        return Remembered(claim, decision, bool(state >= _WITHDRAWN), bool(state == _NOTED))

    def _write(self, claim: Claim, decision: bytes, state: int) -> None:
        assert len(decision) <= MAX_BYTES, f"a decision of {len(decision)} bytes"
        at = self._at(claim, self._decisions, MAX_BYTES)
        self._mapped[at : at + len(decision)] = decision
        self._length[claim.bucket, claim.place] = len(decision)
        self._state[claim.bucket, claim.place] = state

    def _is_held(self, claim: Claim, state: int) -> bool:
        """True while the claim is in this state and no other key has its slot."""
        return bool(
            self._claim[claim.bucket, claim.place] == claim.number
            and self._state[claim.bucket, claim.place] == state
            and self._expires[claim.bucket, claim.place] > self._clock()
        )

    @staticmethod
    def _at(claim: Claim, start: int, size: int) -> int:
        """Offset of a slot's bytes in the column that begins at `start`."""
        return start + (claim.bucket * PLACES + claim.place) * size

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
