"""The endpoints of a role that a name leads to: looked up again every few seconds, tried, and let go.

A name such as that of a headless Service in Kubernetes has an address for each server behind it. Each address becomes
an endpoint of the pool, with a connection, breaker, batches and probes of its own.

- A new address is probed and warmed up first, and joins the pool when it has answered.
- An address that the name no longer has gets no new rows. Those that wait there get their scores, and then its
  connection is closed.
- When the lookup fails, or finds nothing, everything stays as it is: a name server that is down says nothing about the
  model servers, and what is dead is found by probes and breakers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from feature_cache.ending import end

if TYPE_CHECKING:
    from server.inference.pool import Pool
    from server.inference.replica import Replica

_log = structlog.get_logger(__name__)

MOST_MEMBERS: Final = 16
"""Endpoints of one role. Each costs a probe a second, and a few hundred rows keep one busy."""
_LOOK_SECONDS: Final = 5.0
"""Between two lookups: a new pod takes longer to start, and one that goes has some seconds for it."""
_AGAIN_SECONDS: Final = 0.5
"""The same while the name has led to nothing yet."""
_IDLE_SECONDS: Final = 0.05
_LEAVE_SECONDS: Final = 10.0
"""What an endpoint that was left may take for the batches that are under way."""

Resolve = Callable[[str], Awaitable[list[str]]]
"""The addresses, `host:port`, of a `host:port`; raises OSError."""


class Members:
    """Keeps a pool in step with the addresses of a name.

    Args:
        pool: The endpoints that get rows.
        target: `host:port`; the host is looked up.
        make: Makes an endpoint, with its name in the pool and its address.
        resolve: Looks the name up; it must not block.
    """

    def __init__(self, pool: Pool, target: str, make: Callable[[str, str], Replica], resolve: Resolve) -> None:
        self._pool = pool
        self._target = target
        self._make = make
        self._resolve = resolve
        self._members: dict[str, _Member] = {}
        """By address."""
        self._left: set[_Member] = set()
        self._problem = ""

    async def run(self) -> None:
        """Looks the name up until cancelled, and lets all endpoints go then."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(_LOOK_SECONDS if self._members else _AGAIN_SECONDS)
        finally:
            await end([member.task for member in (*self._members.values(), *self._left)])

    async def look(self) -> None:
        """Looks the name up once."""
        try:
            found = sorted(await self._resolve(self._target))
        except OSError as error:
            self._tell(str(error))
            return
        if not found:
            self._tell("it has no address")
            return
        for address in [one for one, member in self._members.items() if one not in found or member.task.done()]:
            self._let_go(address)
        problem = ""
        for address in [one for one in found if one not in self._members]:
            problem = self._take(address) or problem
        self._tell(problem)

    def _take(self, address: str) -> str:
        """Begins to try a new address; says why not."""
        taken = {member.name for member in (*self._members.values(), *self._left)}
        name = next((one for one in self._pool.names if one not in taken), None)
        if name is None:
            return f"it has more than {len(self._pool.names)} addresses; some are not used"
        try:
            replica = self._make(name, address)
        except OSError as error:
            return f"{address}: {error}"
        _log.info("new endpoint, tried before it is used", replica=name, endpoint=address)
        self._members[address] = _Member(name, replica, self._pool)
        return ""

    def _let_go(self, address: str) -> None:
        member = self._members.pop(address)
        _log.info("endpoint is gone from its name", replica=member.name, endpoint=address, name=self._target)
        self._left.add(member)
        member.task.add_done_callback(lambda _: self._left.discard(member))
        member.gone.set()

    def _tell(self, problem: str) -> None:
        """Logs what is wrong with the name, once."""
        if problem != self._problem:
            self._problem = problem
            if problem:
                _log.warning("name of endpoints", role=self._pool.name, name=self._target, problem=problem)


class _Member:
    """One address, from the first probe until its last batch has ended."""

    def __init__(self, name: str, replica: Replica, pool: Pool) -> None:
        self.name = name
        self.gone = asyncio.Event()
        """Set when its name does not lead there any more."""
        self._pool = pool
        self.task = asyncio.create_task(self._live(replica), name=f"member-{name}")
        self.task.add_done_callback(_ended)

    async def _live(self, replica: Replica) -> None:
        pool = self._pool
        async with replica:
            pool.candidates = (*pool.candidates, replica)
            try:
                await _either(replica.tried, self.gone)
            finally:
                pool.candidates = tuple(one for one in pool.candidates if one is not replica)
            if self.gone.is_set():
                return
            pool.join(replica)
            _log.info("endpoint has joined", replica=replica.name, endpoint=replica.endpoint)
            try:
                await self.gone.wait()
            finally:
                pool.leave(replica)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    while replica.batcher.queued or replica.batcher.in_flight:  # noqa: ASYNC110  no batch knows to be the last
                        await asyncio.sleep(_IDLE_SECONDS)


async def _either(*events: asyncio.Event) -> None:
    """Waits until one of the events is set."""
    waiting = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(waiting)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("endpoint ended", member=task.get_name(), error=repr(error), exc_info=error)
