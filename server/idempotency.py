"""The promise of `Order.idempotency_key`: the same key gives the same decision, and only one."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from server.errors import KeyReusedError, OverloadedError

if TYPE_CHECKING:
    from pretrade.decision.v1 import decision_pb2 as pb
    from server.record import Decided


class IdempotencySettings(BaseModel):
    """How long and how many keys are remembered, by this server process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    window_seconds: float = Field(default=10.0, gt=0, le=86_400)
    """How long a key is remembered, in seconds."""
    max_keys: int = Field(default=200_000, ge=1, le=10_000_000)
    """Keys remembered at once; an order with a new key beyond it is shed, since the promise could not be kept."""


class _Entry:
    __slots__ = ("decision", "digest", "expires")

    def __init__(self, digest: bytes, decision: asyncio.Future[Decided], expires: float) -> None:
        self.digest = digest
        self.decision = decision
        self.expires = expires


class IdempotencyWindow:
    """Remembers decisions by key for a while, so that a caller's retry gets the first call's decision."""

    def __init__(self, settings: IdempotencySettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._decision_ids: set[str] = set()
        self.repeated = 0
        """Calls answered with an earlier call's decision."""

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
            decision = await decide()
        except BaseException:
            del self._entries[key]
            future.cancel()
            raise
        future.set_result(decision)
        self._decision_ids.add(decision.decision_id)
        return decision

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
