"""Which server a call goes to, and whether it is made again: one policy for blocking and asyncio callers.

Nothing here waits or talks to a network. A caller makes a `Call`, asks it before every attempt how long that may take,
and tells it how the attempt ended:

```
call = policy.begin(deadline_seconds, repeatable=True)
while True:
    seconds = call.attempt()          # to call.server
    ...                               # sleep call.pause, then ask
    call.answered()                   # or call.failed(error), which raises unless the call is to be made again
```

1. A call goes to the first server that is well, in the order in which they were given.
2. CANCELLED and UNAVAILABLE: the same server is asked again after a short pause, and the next one if it fails again.
   The connection to a process that has ended leads to another process of the same server, which knows its idempotency
   keys; another server does not.
3. RESOURCE_EXHAUSTED with a delay: the next server at once; the same after the delay where there is no other, or where
   the refusal is about the caller and not about the server.
4. DEADLINE_EXCEEDED: while another server could still answer, an attempt gets half of the time that is left, and the
   other one gets the rest. Otherwise the deadline has passed; unless an attempt was lost before and it was the server's
   own cap that passed: a process that was killed has claimed the key until then.
5. Nothing is ever asked after the deadline, and an order without idempotency key only after a refusal.
6. A server that fails three attempts in a row is *away*: it is asked last, until its health service says SERVING.
7. While too many attempts fail, none is made again on the same server (`SPARE_FAILURES`): an overloaded server must
   not be asked even more often. A burst of calls that one lost connection has ended is no overload: as many failures
   are spare as twice the calls that were ever under way at once.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import grpc

from pretrade.client.errors import CallError, error_of
from pretrade.client.retries import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    PAUSE_FACTOR,
    REPEATED,
    SPARE_FAILURES,
)

_FAILURES_TO_LEAVE: Final = 3
_PROBE_SECONDS: Final = 1.0
"""Between two looks at the health of a server that is away."""
_SHARE: Final = 0.5
_ABOUT_THE_CALLER: Final = "RATE_LIMITED"
_DRAINING: Final = "DRAINING"
_NO_CHANCE: Final = 0.001
"""Seconds in which no server answers."""


class Server:
    """What one client knows of one server.

    Args:
        address: `HOST:PORT`.
        place: Among the servers of the client.
    """

    __slots__ = ("_failures", "_lock", "_most", "_probe_at", "_spent", "_under_way", "address", "place")

    def __init__(self, address: str, place: int) -> None:
        self.address: Final = address
        self.place: Final = place
        self._lock: Final = threading.Lock()
        self._under_way = 0
        self._most = 0
        self._spent = 0.0
        self._failures = 0
        self._probe_at = -math.inf

    @property
    def is_away(self) -> bool:
        """Whether it failed so often that others are asked first."""
        return self._failures >= _FAILURES_TO_LEAVE

    @property
    def may_be_asked_again(self) -> bool:
        """Whether so few attempts fail that one more is no burden."""
        return self._spent < max(SPARE_FAILURES, 2 * self._most)

    def began(self) -> None:
        """An attempt goes to it."""
        with self._lock:
            self._under_way += 1
            self._most = max(self._most, self._under_way)

    def answered(self) -> None:
        """An attempt was answered, with a decision or with an error that says nothing against the server."""
        with self._lock:
            self._under_way -= 1
            self._failures = 0
            self._spent = max(0.0, self._spent - 0.5)

    def failed(self, *, is_lost: bool) -> None:
        """An attempt failed.

        Args:
            is_lost: Whether that says that the server cannot be reached, and not only that it is busy.
        """
        with self._lock:
            self._under_way -= 1
            self._spent += 1
            if is_lost:
                self._failures += 1

    def abandoned(self) -> None:
        """The caller of an attempt has left."""
        with self._lock:
            self._under_way -= 1

    def refused(self) -> None:
        """Orders of a call that was answered were refused."""
        with self._lock:
            self._spent += 1

    def is_well(self) -> None:
        """Its health service says so."""
        with self._lock:
            self._failures = 0

    def is_due(self, now: float) -> bool:
        """Whether to ask its health service; at most once in a while."""
        with self._lock:
            due = self.is_away and now >= self._probe_at
            if due:
                self._probe_at = now + _PROBE_SECONDS
            return due


class Policy:
    """The servers of one client.

    Args:
        addresses: `HOST:PORT` of each, best first.
        clock: Monotonic seconds.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, addresses: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        if not addresses:
            raise ValueError("connect() needs the address of a server: HOST:PORT")
        self.clock: Final = clock
        self.servers: Final = tuple(Server(address, place) for place, address in enumerate(addresses))

    def begin(self, seconds: float, *, repeatable: bool) -> Call:
        """A call that has to end within so many seconds.

        Args:
            seconds: Until the deadline.
            repeatable: Whether every order of the call has an idempotency key.
        """
        return Call(self, self.clock() + seconds, repeatable=repeatable)

    def best(self, without: Sequence[Server] = (), *, well: bool) -> Server | None:
        """The first server but these that is well, or that is there at all."""
        for server in self.servers:
            if server not in without and not (well and server.is_away):
                return server
        return None

    def due(self) -> Server | None:
        """A server that is away and whose health is to be asked for now."""
        if len(self.servers) == 1:
            return None  # it is asked anyway
        now = self.clock()
        return next((server for server in self.servers if server.is_away and server.is_due(now)), None)


class Call:
    """One call: at first to one server, and then perhaps again.

    Args:
        policy: The servers.
        deadline: Instant of the policy's clock.
        repeatable: As in `Policy.begin`.
    """

    __slots__ = ("_attempts", "_deadline", "_here", "_left", "_policy", "_repeatable", "earlier", "pause", "server",
                 "wait_for_ready", "was_lost")  # fmt: skip

    def __init__(self, policy: Policy, deadline: float, *, repeatable: bool) -> None:
        self._policy = policy
        self._deadline = deadline
        self._repeatable = repeatable
        self._left: tuple[Server, ...] = ()
        self._here = 0
        self._attempts = 0
        self.earlier: CallError | None = None
        """How the last attempt failed that was not the last one."""
        servers = policy.servers
        self.server: Server = servers[0] if len(servers) == 1 else policy.best(well=True) or servers[0]
        """Where the next attempt goes."""
        self.was_lost = False
        """Whether an attempt was cut off: a process that is gone may hold the keys of its orders for a while."""
        self.pause = 0.0
        """Seconds before the next attempt."""
        self.wait_for_ready = False
        """Whether the next attempt waits for a connection, and does not fail without one."""

    def attempt(self) -> float:
        """Begins an attempt; returns how many seconds it may take."""
        self._attempts += 1
        self.server.began()
        left = self._deadline - self._policy.clock()
        if len(self._policy.servers) > 1 and self._other() is not None:
            left *= _SHARE
        return left if left > _NO_CHANCE else _NO_CHANCE

    def answered(self) -> None:
        """The attempt was answered."""
        self.server.answered()

    def abandoned(self) -> None:
        """The caller has left during the attempt."""
        self.server.abandoned()

    def failed(self, error: grpc.RpcError | CallError) -> None:
        """The attempt failed. Returns if there is to be another one, after `pause`.

        Raises:
            CallError: There is none.
        """
        if isinstance(error, CallError):
            found = error
        else:
            found = error_of(error, self.server.address)
            found.__cause__ = error  # here, since it may be raised after a later attempt has failed otherwise
        is_lost = found.code in REPEATED or found.code is grpc.StatusCode.DEADLINE_EXCEEDED
        if is_lost or found.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            self.server.failed(is_lost=is_lost)
        else:
            self.server.answered()
        if not self._goes_on(found):
            last = self._final(found)
            raise last from last.__cause__
        self.earlier = found
        self.was_lost |= found.code in REPEATED

    def waits(self, delay_seconds: float | None) -> bool:
        """Whether orders of an answered call, which were refused, are to be asked again after this delay."""
        self.server.refused()
        if delay_seconds is None or not self._fits(delay_seconds) or not self.server.may_be_asked_again:
            return False
        self.pause = delay_seconds
        return True

    def _goes_on(self, found: CallError) -> bool:
        """Whether there is another attempt; if so, where and when."""
        self.pause = 0.0
        if not self._fits(0.0):
            return False
        if found.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return self._after_refusal(found)
        if not self._repeatable:
            return False
        if found.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._leaves() or (self.was_lost and self._after_loss(found))
        return found.code in REPEATED and self._after_loss(found)

    def _after_refusal(self, found: CallError) -> bool:
        if found.retry_delay_seconds is None:
            return False
        if found.reason != _ABOUT_THE_CALLER and self._leaves():
            return True
        self.pause = found.retry_delay_seconds
        return self._fits(self.pause) and self.server.may_be_asked_again

    def _after_loss(self, found: CallError) -> bool:
        self._here += 1
        if (self._here > 1 or found.reason == _DRAINING) and self._leaves(well=self._here <= 2):
            return True
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * PAUSE_FACTOR ** (self._here - 1))
        self.pause = pause * random.uniform(0.8, 1.2)  # noqa: S311 - spreads callers, hides nothing
        # With nowhere else to go, the next attempt waits for the connection instead of asking for it again and again.
        self.wait_for_ready = len(self._policy.servers) == 1
        self._left = ()
        return self._fits(self.pause) and self.server.may_be_asked_again

    def _leaves(self, *, well: bool = True) -> bool:
        """Goes to another server, if there is one."""
        other = self._other(well=well)
        if other is None:
            return False
        self._left = (*self._left, self.server)
        self.server, self._here = other, 0
        return True

    def _other(self, *, well: bool = True) -> Server | None:
        return self._policy.best((*self._left, self.server), well=well)

    def _fits(self, seconds: float) -> bool:
        return self._policy.clock() + seconds < self._deadline

    def _final(self, found: CallError) -> CallError:
        """The last word: where the time passed waiting for a connection, why there was none."""
        earlier = self.earlier
        if found.code is grpc.StatusCode.DEADLINE_EXCEEDED and earlier is not None and earlier.code in REPEATED:
            found = earlier
        if self._attempts > 1:
            found.add_note(f"The call was tried {self._attempts} times.")
        return found
