"""The control state in Redis, one for all servers that use the same key.

The key is a stream of which only the last entry counts. Reading blocks until there is a newer entry, so a change
reaches every server within a round trip. A server also reads the last entry twice a second, because Redis may have lost
it, or a failover may have restored an older one. A Redis that does not answer is noticed within the same time. After a
reconnect a server reads the entry at once.

A script replaces the entry only if it is still the one from which the new state was made. Otherwise the script returns
the entry that it found, and the writer merges. So no writer ever overwrites an entry that it had not read.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from feature_cache.constants import Constant
from feature_cache.store.cluster import Cluster, is_cluster
from feature_cache.store.vectors import connect
from server.control.model import Control

_log = structlog.get_logger(__name__)

_BLOCK_MS: Final = 500
"""How long a read waits for news: as often Redis shows that it is alive."""
_ATTEMPTS: Final = 50
"""Changes that are made at once by others before ours is given up."""

_REPLACE: Final = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local found = last and last[2][2] or ''
if redis.sha1hex(found) ~= ARGV[1] then return found end
redis.call('XADD', KEYS[1], 'MAXLEN', 1, '*', 'state', ARGV[2])
return false
"""
"""Appends the state ARGV[2] and returns nothing, if the last one has the SHA-1 ARGV[1]; otherwise returns the last one.
Without any, the last one is the empty string."""


class SharedSettings(BaseModel):
    """The control state in Redis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(default="pretrade:control", min_length=1, max_length=200)
    """Key in the Redis of `redis_url`. Servers with the same key share one control state: use another key for servers
    that you steer separately."""
    timeout_seconds: Constant[float] = 0.3
    """A Redis that does not answer within this time, in seconds, counts as unreachable. A change then holds on this
    server."""
    stale_seconds: float = Field(default=3.0, ge=1, le=600)
    """When Redis has not answered for this long, in seconds, every decision says that the control state may be out of
    date."""
    reconnect_seconds: Constant[float] = 0.2
    """Pause between two attempts to reach Redis, in seconds."""


class UnreachableError(Exception):
    """The place where the control state is shared cannot be reached, or holds something else.

    Attributes:
        in_doubt: True when what was to be written may have been written all the same.
    """

    def __init__(self, reason: str, in_doubt: bool = False) -> None:
        super().__init__(reason)
        self.in_doubt = in_doubt


class _Found(NamedTuple):
    """What Redis held at the last look."""

    text: bytes
    """The entry, empty without one."""
    control: Control | None


class SharedControl:
    """The control state that all servers share. Used from one event loop.

    Args:
        redis_url: A Redis, or a Redis Cluster.
        settings: See there.
        clock: Monotonic seconds.
        new_client: Makes a client of a Redis by its URL, which is to connect within so many seconds.
    """

    def __init__(
        self,
        redis_url: str,
        settings: SharedSettings,
        clock: Callable[[], float],
        new_client: Callable[[str, float], Redis] = connect,
    ) -> None:
        self.settings = settings
        self._new_client = new_client
        self._redis_url = redis_url
        self._clock = clock
        self._redis: Redis | None = None
        self._connecting = asyncio.Lock()
        self._last_entry: bytes | str = b"0"
        self._is_new = True
        """Whether nothing was read from this connection yet."""
        self._found: _Found | None = None
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
        found = await self._answer(self._read, self.settings.timeout_seconds)
        return found.control

    async def wait(self) -> Control | None:
        """The state as soon as it differs from the one last read, or the current one after half a second.

        On a new connection it returns at once, because the state may have changed on either side since the last one.

        Raises:
            UnreachableError: It is not known.
        """
        found = await self._answer(self._wait, self.settings.timeout_seconds + _BLOCK_MS / 1e3)
        return found.control

    async def replace(self, make: Callable[[Control], Control]) -> Control:
        """Puts what `make` makes of the state in Redis in its place. Nothing is written when that is the same.

        Args:
            make: May be called again and again, with an empty state when Redis holds none. What it raises is passed on,
                and nothing changes.

        Returns:
            What Redis holds now.

        Raises:
            UnreachableError: It did not answer, or others made changes all the time.
        """
        found = self._found or await self._answer(self._read, self.settings.timeout_seconds)
        for _ in range(_ATTEMPTS):
            before = found.control or Control()
            new = make(before)
            if new == before:
                return new
            write = partial(self._replace, found.text, new)
            found = await self._answer(write, self.settings.timeout_seconds, is_write=True)
            if found.control == new:
                return new
        raise UnreachableError(f"others make changes all the time: given up after {_ATTEMPTS} attempts")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._close(self._redis)

    async def _answer(
        self, ask: Callable[[Redis], Awaitable[_Found]], timeout_seconds: float, is_write: bool = False
    ) -> _Found:
        redis: Redis | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                redis = self._redis or await self._connected()
                found = self._found = await ask(redis)
        except Exception as error:  # whatever a client raises whose connection dies under it
            if not self.problem:
                self.outages += 1
                _log.warning("control state not shared any more", key=self.settings.key, error=_reason(error))
            self.problem = _reason(error)
            in_doubt = is_write and redis is not None and not isinstance(error, _ANSWERS)
            await self._close(redis)  # what another call asks meanwhile ends with it, and is as lost
            raise UnreachableError(self.problem, in_doubt) from error
        finally:
            if redis is not self._redis:
                await self._close(redis)  # another call has closed it, and we may have connected it again
        if self.problem:
            _log.info("control state shared again", key=self.settings.key)
        self.heard_at, self.problem = self._clock(), ""
        return found

    async def _close(self, redis: Redis | None) -> None:
        if redis is not None:
            if self._redis is redis:
                self._redis = None
            with suppress(RedisError, OSError):
                await redis.aclose()

    async def _connected(self) -> Redis:
        """A client of the Redis that holds the key, which has just answered.

        A write that fails on a client that never answered has surely not been made.
        """
        async with self._connecting:
            if self._redis is None:
                redis = await self._client()
                try:
                    await redis.ping()
                except BaseException:
                    await redis.aclose()
                    raise
                self._redis, self._is_new = redis, True
            return self._redis

    async def _client(self) -> Redis:
        if not is_cluster(self._redis_url):
            return self._new_client(self._redis_url, self.settings.timeout_seconds)
        cluster = Cluster(self._redis_url, self.settings.timeout_seconds)
        try:
            await cluster.discover()
            return cluster.new_client(cluster.owner_of(self.settings.key))
        finally:
            await cluster.aclose()

    async def _read(self, redis: Redis) -> _Found:
        self._is_new = False
        return self._taken(await redis.xrevrange(self.settings.key, count=1))

    async def _wait(self, redis: Redis) -> _Found:
        if self._is_new:
            return await self._read(redis)
        news: Any = await redis.xread({self.settings.key: self._last_entry}, block=_BLOCK_MS)
        # Also without news: Redis may have lost its data, or its clock have gone back.
        return self._taken(news[0][1][-1:]) if news else await self._read(redis)

    async def _replace(self, base: bytes, new: Control, redis: Redis) -> _Found:
        text = new.model_dump_json().encode()
        digest = hashlib.sha1(base, usedforsecurity=False).hexdigest()
        found = await redis.eval(_REPLACE, 1, self.settings.key, digest, text)
        return _Found(text, new) if found is None else self._parsed(found)

    def _taken(self, entries: Any) -> _Found:
        if not entries:
            return _Found(b"", None)
        entry, fields = entries[0]
        self._last_entry = entry or b"0"
        if not fields or b"state" not in fields:
            raise _NoStateError(f"{self.settings.key} holds something else")
        return self._parsed(fields[b"state"])

    def _parsed(self, text: bytes) -> _Found:
        if self._found is not None and self._found.text == text:
            return self._found
        return _Found(text, Control.model_validate_json(text) if text else None)


class _NoStateError(Exception):
    """What was found is no control state."""


_ANSWERS: Final = (ResponseError, ValidationError, _NoStateError)
"""Errors with which Redis did answer, and wrote nothing."""


def _reason(error: Exception) -> str:
    """Why, in a line without what was found."""
    match error:
        case ValidationError():
            return "what Redis holds is no control state that this version knows"
        case TimeoutError():
            return "Redis does not answer"
        case _:
            return str(error) or repr(error)
