"""Idempotency by `Order.idempotency_key`: the same key gives the same decision, and only one.

A repeated call gets the answer of the first call, or a safer one. The guards run again for it, because what they check
may have changed. Once a repeat got something safer than TRADE, every later repeat gets that as well. See `DataPlane`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.record import Decided
from server.decision.shared_keys import BusyError, Claim, KeyedOrder, OrphanedError, Remembered, SharedKeys, reused
from server.errors import JournalError, OverloadedError

_ASK_AGAIN_SECONDS: Final = 0.001
_SLACK_SECONDS: Final = 0.1
"""A process that was given no time may still decide so long after its deadline."""
_RECENT: Final = 4_096


class IdempotencySettings(BaseModel):
    """How long and how many keys are remembered."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    window_seconds: float = Field(default=10.0, gt=0, le=86_400)
    """How long a key is remembered after its decision, in seconds. Set it above the longest time after which your
    callers still retry."""
    max_keys: int = Field(default=200_000, ge=1, le=100_000_000)
    """Keys that all processes together remember at once; the default is 20,000 new keys a second over the window. When
    the table is full, an order with a new key is shed. Raise it for more orders a second, or for a longer window. A key
    takes 0.5 KiB of shared memory, which is used only when so many keys are alive."""


class ClaimLostError(Exception):
    """The call took so long that another process may have decided in its place; its deadline passed before that."""


class Kept(NamedTuple):
    """The decision of a key."""

    decided: Decided
    at: Remembered | None
    """Where it is remembered; None for the call that made it."""


class _UnderWay:
    __slots__ = ("digest", "ended")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.ended = asyncio.Event()


class IdempotencyWindow:
    """Remembers decisions by key for a while, so that a caller's retry gets the first call's decision.

    Args:
        clock: Monotonic seconds, the event loop's own.
        table: Where decisions are remembered, for all processes of the server.
        resolve: Finds out whether a dead process had decided the order of a key that it claimed; `LeftKeys.resolve`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        table: SharedKeys,
        resolve: Callable[[OrphanedError], Awaitable[None]] | None = None,
    ) -> None:
        self._resolve = resolve
        self._clock = clock
        self._table = table
        self._under_way: dict[bytes, _UnderWay] = {}
        """Calls of this process that are deciding, by key: their repeats wait for them and not for the table."""
        self._recent: OrderedDict[bytes, tuple[Claim, Decided]] = OrderedDict()
        """The newest decisions of this process, by key: of these it knows what became of the reply."""
        self.repeated = 0
        """Calls answered with an earlier call's decision."""
        self.withdrawn = 0
        """Those of them that were answered with something safer."""
        self.refused = 0
        """Calls shed because no further key could be remembered."""
        self.lost = 0
        """Decisions that came after another process might have decided in their place."""

    async def once(self, order: KeyedOrder, deadline: float, decide: Callable[[], Awaitable[Decided]]) -> Kept:
        """The decision of the first call with this key; makes it with `decide` if this is the first.

        A call that fails or is cancelled leaves the key free again, and a repeat that was waiting for it then decides
        itself. Cancelling is safe: a waiting repeat never cancels the call it waits for.

        Raises:
            KeyReusedError: The key was used for another order.
            OverloadedError: Too many keys are remembered.
            ClaimLostError: The decision must not be sent: it took longer than `deadline`.
            TimeoutError: The first call had not finished by `deadline` (monotonic seconds).
        """
        while True:
            under_way = self._under_way.get(order.key)
            if under_way is not None:
                if under_way.digest != order.digest:
                    raise reused()
                async with asyncio.timeout_at(deadline):
                    await under_way.ended.wait()
                continue
            try:
                # Longer than the call itself: a call that loses a claim has no time left to answer.
                found = self._table.claim(order, deadline + _SLACK_SECONDS)
            except BusyError:
                await self._a_moment(deadline)
                continue
            except OrphanedError as orphan:
                await self._inherit(orphan, deadline)
                continue
            except OverloadedError:
                self.refused += 1
                raise
            if isinstance(found, Remembered):
                self.repeated += 1
                return Kept(self._recall(order, found), found)
            return Kept(await self._decide(order, found, deadline, decide), None)

    async def withdraw(
        self, order: KeyedOrder, at: Remembered, safer: Decided, deadline: float
    ) -> tuple[Decided, Remembered]:
        """Gives every later repeat a safer decision; returns the one that applies if another repeat was first.

        Raises:
            TimeoutError: It could not be done by `deadline`.
        """
        while True:
            with contextlib.suppress(BusyError):
                now = self._table.withdraw(at, safer.remembered)
                return safer if now.decision == safer.remembered else self._recall(order, now), now
            await self._a_moment(deadline)

    def noted(self, at: Remembered) -> None:
        """Notes that the decision which replaces the first one is durable in the audit."""
        with contextlib.suppress(BusyError):  # then the next repeat notes it once more
            self._table.noted(at.claim)

    async def _decide(
        self, order: KeyedOrder, claim: Claim, deadline: float, decide: Callable[[], Awaitable[Decided]]
    ) -> Decided:
        """Makes the decision that was claimed, and remembers it."""
        under_way = self._under_way[order.key] = _UnderWay(order.digest)
        try:
            decided = await decide()
            while True:
                with contextlib.suppress(BusyError):
                    if self._table.decided(claim, decided.remembered):
                        break
                    self.lost += 1
                    raise ClaimLostError
                await self._a_moment(deadline)
        except BaseException:
            with contextlib.suppress(BusyError):  # then it is free when its deadline has passed
                self._table.release(claim)
            raise
        finally:
            del self._under_way[order.key]
            under_way.ended.set()
        self._recent[order.key] = claim, decided
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return decided

    async def _inherit(self, orphan: OrphanedError, deadline: float) -> None:
        """Has what a dead process had claimed decided or free; raises `TimeoutError` when that takes too long."""
        try:
            async with asyncio.timeout_at(deadline):
                if self._resolve is None:
                    self._table.give_up(orphan.claim)
                else:
                    await self._resolve(orphan)
        except (BusyError, JournalError, sqlite3.Error):  # the process that takes the journal over will know
            await self._a_moment(deadline)

    def _recall(self, order: KeyedOrder, found: Remembered) -> Decided:
        """What is remembered, as the object that the first call made where that was here and not long ago."""
        claim, decided = self._recent.get(order.key, (None, None))
        if decided is None or claim != found.claim or found.is_withdrawn:
            return Decided.repeated(found.decision, order.order_ref, is_withdrawn=found.is_withdrawn)
        return decided

    async def _a_moment(self, deadline: float) -> None:
        if self._clock() >= deadline:
            raise TimeoutError
        await asyncio.sleep(_ASK_AGAIN_SECONDS)


def identify(order: pb.Order, caller: str) -> KeyedOrder:
    """The identity of an order's key in the table.

    Args:
        order: It has a key.
        caller: Who asks; empty if the port asks for no credentials.
    """
    strategy = order.strategy
    whose = f"{len(caller)} {len(strategy)} {caller}{strategy}{order.idempotency_key}"
    content = type(order)()
    content.CopyFrom(order)
    content.ClearField("timeout")  # how long the answer may take is no part of what is asked
    content.DiscardUnknownFields()  # nor what this server does not know; the audit packet has none of it either
    return KeyedOrder(_hash(whose.encode()), _hash(content.SerializeToString(deterministic=True)), order.order_ref)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
