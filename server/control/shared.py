"""The control state in Redis, one for all servers that name the same key.

The key is a stream, of which only the last entry counts: reading it blocks until there is a newer one, so a change is
everywhere within a round trip, a server without news asks twice a second, and one that Redis no longer answers knows it
by the same time. A script replaces the entry unless it is newer than the state that the new one was made from. A Redis
that lost its data, or went back to an older copy, is therefore given the newest state that any server knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from feature_cache.cluster import Cluster, is_cluster
from feature_cache.store import connect
from server.control.model import Control

_log = structlog.get_logger(__name__)

_BLOCK_MS: Final = 500
"""How long a read waits for news: as often Redis shows that it is alive."""
_ATTEMPTS: Final = 50
"""Changes that are made at once by others before ours is given up."""

_REPLACE: Final = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
if last then
  local version, id, state = tonumber(last[2][2]), last[2][4], last[2][6]
  if version == tonumber(ARGV[3]) and id == ARGV[4] then return nil end
  local base = tonumber(ARGV[1])
  if version > base or (version == base and id > ARGV[2]) then return state end
end
redis.call('XADD', KEYS[1], 'MAXLEN', 1, '*', 'version', ARGV[3], 'change_id', ARGV[4], 'state', ARGV[5])
return nil
"""
"""Appends a state made from the one that ARGV[1] and [2] name, unless there is a newer one, which is then returned."""


class SharedSettings(BaseModel):
    """Where all servers keep the control state that they share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: str = Field(default="pretrade:control", min_length=1, max_length=200)
    """Key in the Redis of `redis_url`; servers that name the same one are steered together."""
    timeout_seconds: float = Field(default=0.3, gt=0, le=10)
    """A Redis that does not answer within this, in seconds, cannot be reached: a change then holds on this server."""
    stale_seconds: float = Field(default=3.0, ge=1, le=600)
    """Not having heard Redis for so long, in seconds, the control state may be out of date: every decision says so."""
    reconnect_seconds: float = Field(default=0.2, gt=0, le=10)
    """Pause between two attempts to reach Redis, in seconds."""


class UnreachableError(Exception):
    """Redis cannot be reached, or holds something else at the key."""


class SharedControl:
    """The control state that all servers share. Used from one event loop.

    Args:
        redis_url: A Redis, or a Redis Cluster.
        settings: See there.
        clock: Monotonic seconds.
    """

    def __init__(self, redis_url: str, settings: SharedSettings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self._redis_url = redis_url
        self._clock = clock
        self._redis: Redis | None = None
        self._last_entry: bytes | str = b"0"
        self.heard_at: float | None = None
        """When Redis last answered; None before the first time."""
        self.problem = ""
        """Why Redis cannot be reached; empty when it can."""
        self.outages = 0
        """Times it could not be reached any more."""

    @property
    def age_seconds(self) -> float | None:
        """Since Redis was last heard."""
        return None if self.heard_at is None else self._clock() - self.heard_at

    @property
    def stale(self) -> bool:
        """True when others may have made changes that are not known here."""
        age = self.age_seconds
        return age is None or age > self.settings.stale_seconds

    async def read(self) -> Control | None:
        """The state; None when Redis holds none.

        Raises:
            UnreachableError: It is not known.
        """
        return await self._answer(self._read, self.settings.timeout_seconds)

    async def wait(self) -> Control | None:
        """The state once there is another one than at the last look, or as it is after half a second.

        Raises:
            UnreachableError: It is not known.
        """
        return await self._answer(self._wait, self.settings.timeout_seconds + _BLOCK_MS / 1e3)

    async def replace(self, known: Control, make: Callable[[Control], Control]) -> Control:
        """Puts what `make` makes of the newest state in its place. `make` may be called again and again.

        Args:
            known: The newest state known here; Redis may hold a newer one, or have lost it.
            make: What it raises is passed on, and nothing changes. What it returns unchanged is written all the same
                where Redis had lost it.

        Returns:
            What Redis holds now.

        Raises:
            UnreachableError: It did not answer. The change may have been made all the same.
        """
        for _ in range(_ATTEMPTS):
            new = make(known)
            found = await self._answer(partial(self._replace, known, new), self.settings.timeout_seconds)
            if found is None:
                return new
            known = found
        raise UnreachableError(f"others make changes all the time: given up after {_ATTEMPTS} attempts")

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._redis is not None:
            redis, self._redis = self._redis, None
            with suppress(RedisError, OSError):
                await redis.aclose()

    async def _answer(
        self, ask: Callable[[Redis], Awaitable[Control | None]], timeout_seconds: float
    ) -> Control | None:
        try:
            async with asyncio.timeout(timeout_seconds):
                if self._redis is None:
                    self._redis = await self._connected()
                found = await ask(self._redis)
        except Exception as error:  # whatever a client raises whose connection dies under it
            if not self.problem:
                self.outages += 1
                _log.warning("control state not shared any more", key=self.settings.key, error=_reason(error))
            self.problem = _reason(error)
            await self.aclose()  # what another call asks meanwhile ends with it, and is as lost
            raise UnreachableError(self.problem) from error
        if self.problem:
            _log.info("control state shared again", key=self.settings.key)
        self.heard_at, self.problem = self._clock(), ""
        return found

    async def _connected(self) -> Redis:
        """A client of the Redis that holds the key."""
        if not is_cluster(self._redis_url):
            return connect(self._redis_url, self.settings.timeout_seconds)
        cluster = Cluster(self._redis_url, self.settings.timeout_seconds)
        try:
            await cluster.discover()
            return cluster.new_client(cluster.owner_of(self.settings.key))
        finally:
            await cluster.aclose()

    async def _read(self, redis: Redis) -> Control | None:
        entries = await redis.xrevrange(self.settings.key, count=1)
        if not entries:
            return None
        entry, fields = entries[0]
        self._last_entry = entry or b"0"
        if not fields or b"state" not in fields:
            raise _NoStateError(f"{self.settings.key} holds something else")
        return Control.model_validate_json(fields[b"state"])

    async def _wait(self, redis: Redis) -> Control | None:
        await redis.xread({self.settings.key: self._last_entry}, block=_BLOCK_MS)
        # Also without news: Redis may have lost its data, or its clock have gone back.
        return await self._read(redis)

    async def _replace(self, known: Control, new: Control, redis: Redis) -> Control | None:
        arguments = (known.version, known.change_id, new.version, new.change_id, new.model_dump_json())
        found = await redis.eval(_REPLACE, 1, self.settings.key, *arguments)
        return None if found is None else Control.model_validate_json(found)


class _NoStateError(Exception):
    """What was found is no control state."""


def _reason(error: Exception) -> str:
    """Why, in a line without what was found."""
    match error:
        case ValidationError():
            return "what Redis holds is no control state that this version knows"
        case TimeoutError():
            return "Redis does not answer"
        case _:
            return str(error) or repr(error)
