"""The promise of `Order.idempotency_key`: the same key gives the same decision, and only one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import KeyReusedError, OverloadedError
from server.record import Decided
from server.shared_keys import BusyError, Claim, SharedKeys

_ASK_AGAIN_SECONDS: Final = 0.001
_SLACK_SECONDS: Final = 0.1
"""A process that was given no time may still decide so long after its deadline."""


class IdempotencySettings(BaseModel):
    """How long and how many keys are remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    window_seconds: float = Field(default=10.0, gt=0, le=86_400)
    """How long a key is remembered, in seconds."""
    max_keys: int = Field(default=200_000, ge=1, le=10_000_000)
    """Keys remembered at once by one process; an order with a new key beyond it is shed, since the promise could not be
    kept."""
    shared_keys: int = Field(default=65_536, ge=1_024, le=16_777_216)
    """The same of all `processes` together, in memory that they share, 1 KiB each."""


class _Entry:
    __slots__ = ("decision", "digest", "expires")

    def __init__(self, digest: bytes, decision: asyncio.Future[Decided], expires: float) -> None:
        self.digest = digest
        self.decision = decision
        self.expires = expires


class IdempotencyWindow:
    """Remembers decisions by key for a while, so that a caller's retry gets the first call's decision.

    Args:
        settings: Bounds.
        clock: Monotonic seconds, the event loop's own.
        shared: What all processes of the server remember; None for a server of one.
    """

    def __init__(
        self, settings: IdempotencySettings, clock: Callable[[], float], shared: SharedKeys | None = None
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._shared = shared
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._decision_ids: set[str] = set()
        self.repeated = 0
        """Calls answered with an earlier call's decision."""

    @property
    def unshared(self) -> int:
        """Decisions with a key that only this process remembers, against the promise; 0 where there is but one."""
        return 0 if self._shared is None else self._shared.unshared

    def __len__(self) -> int:
        return len(self._entries)

    async def once(self, order: pb.Order, deadline: float, decide: Callable[[], Awaitable[Decided]]) -> Decided:
        """The decision of the first call with this key; makes it with `decide` if this is the first.

        A call that fails or is cancelled leaves the key free again, and a repeat that was waiting for it then decides
        itself. Cancelling is safe: a waiting repeat never cancels the call it waits for.

        Raises:
            KeyReusedError: The key was used for another order.
            OverloadedError: Too many keys are remembered.
            TimeoutError: The first call had not finished by `deadline` (monotonic seconds).
        """
        key, digest = order.idempotency_key, _digest(order)
        self._forget_expired()
        while (entry := self._entries.get(key)) is not None:
            if entry.digest != digest:
                raise KeyReusedError(
                    "IDEMPOTENCY_KEY_REUSED", "idempotency_key: already used for another order", "idempotency_key"
                )
            async with asyncio.timeout_at(deadline):
                await asyncio.wait((entry.decision,))
            if not entry.decision.cancelled():
                self.repeated += 1
                return entry.decision.result()
        if len(self._entries) >= self._settings.max_keys:
            raise OverloadedError("TOO_MANY_IDEMPOTENCY_KEYS", f"{self._settings.max_keys} keys are remembered")
        future: asyncio.Future[Decided] = asyncio.get_running_loop().create_future()
        self._entries[key] = _Entry(digest, future, self._clock() + self._settings.window_seconds)
        try:
            if self._shared is None:
                decision = await decide()
            else:
                decision = await self._once_in_all(self._shared, key, digest, deadline, decide)
        except BaseException:
            del self._entries[key]
            future.cancel()
            raise
        future.set_result(decision)
        self._decision_ids.add(decision.decision_id)
        return decision

    async def _once_in_all(
        self,
        shared: SharedKeys,
        key: str,
        digest: bytes,
        deadline: float,
        decide: Callable[[], Awaitable[Decided]],
    ) -> Decided:
        """The decision of whichever process was first."""
        while True:
            with contextlib.suppress(BusyError):
                found = shared.claim(key, digest, deadline + _SLACK_SECONDS)
                break
            await self._a_moment(deadline)
        if not isinstance(found, Claim):
            self.repeated += 1
            return Decided.repeated(found)
        try:
            decision = await decide()
        except BaseException:
            with contextlib.suppress(BusyError):  # then it is free when its deadline has passed
                shared.release(found)
            raise
        while True:
            with contextlib.suppress(BusyError):
                shared.decided(found, decision.wire)
                return decision
            await self._a_moment(deadline)

    async def _a_moment(self, deadline: float) -> None:
        if self._clock() >= deadline:
            raise TimeoutError
        await asyncio.sleep(_ASK_AGAIN_SECONDS)

    def remembers(self, decision_id: str) -> bool:
        """True while repeats get this decision."""
        return decision_id in self._decision_ids

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.expires > now or not entry.decision.done():
                return
            del self._entries[key]
            self._decision_ids.discard(entry.decision.result().decision_id)


def _digest(order: pb.Order) -> bytes:
    """Identity of what is asked: everything but how long the answer may take."""
    content = type(order)()
    content.CopyFrom(order)
    content.ClearField("timeout")
    return hashlib.blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()
