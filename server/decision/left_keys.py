"""What a killed process had decided under idempotency keys, and not published in the table of keys any more.

A decision is durable in the journal before it is published. A process that is killed in between leaves a claim in the
table and a row in its journal. A repeat of the call must get that decision and not a second one. Such rows are among
those of which the journal does not say whether their callers heard them. Whoever settles a dead process's journal puts
their decisions into the table first, so of a row that counts as settled, the decision is in the table or need not be.
These are the process that takes the journal over (`Journal`, `Left`), the supervisor that ships what was left, and any
process where a repeat meets the claim before that.

Settling is needed, and reading would not be enough: a commit may be on the disk and not yet in SQLite's index of its
log, where no reader sees it. It appears when nobody has the index open any more. Who settles the journal writes to it,
and so finds that commit or replaces it.

A server of one process loses its table with the process; the next process finds the decisions that may not have been
heard in this way as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from pretrade.audit.v1 import packet_pb2
from server.decision.idempotency import identify
from server.decision.record import remembered_of
from server.decision.shared_keys import BusyError, KeyedOrder, OrphanedError, SharedKeys
from server.errors import JournalInUseError, OverloadedError
from server.journal.journal import settle_what_was_left
from server.machine import REAL, Machine

_log = structlog.get_logger(__name__)

_AGAIN_SECONDS: Final = 0.001
_PATIENCE_SECONDS: Final = 1.0
"""How long a journal that is opened or settled waits for a bucket of the table that a stopped process holds."""


class _Left(NamedTuple):
    order: KeyedOrder
    decision: bytes
    seconds: float
    """For how long the key is to be remembered yet."""


class LeftKeys:
    """Brings decisions of killed processes into the table of keys.

    Args:
        table: The table.
        window_seconds: How long a decision is remembered.
        journal_of: The journal of the process in a slot.
        machine: Whose disk and clocks it uses.
    """

    def __init__(
        self,
        table: SharedKeys,
        window_seconds: float,
        journal_of: Callable[[int], Path],
        machine: Machine = REAL,
    ) -> None:
        self._table = table
        self._window_seconds = window_seconds
        self._journal_of = journal_of
        self._machine = machine
        self._looking = asyncio.Lock()
        self._looked_at: set[int] = set()
        """Dead processes whose decisions are in the table."""

    def take_over(self, packets: Sequence[packet_pb2.DecisionPacket]) -> None:
        """Brings decisions into the table; blocks the thread of a journal that is being opened."""
        patience = round(_PATIENCE_SECONDS / _AGAIN_SECONDS)
        for left in self._left(packets):
            while not self._restored(left) and patience:
                patience -= 1
                self._machine.threads.sleep(_AGAIN_SECONDS)

    def has_taken_over(self) -> None:
        """The journal of this process is open: what was decided by the one before it is in the table, or nowhere."""
        self._table.has_taken_over()

    async def resolve(self, orphan: OrphanedError) -> None:
        """Brings the decisions of a dead process into the table, and gives up its claim where there is none.

        Raises:
            JournalError, sqlite3.Error: Its journal cannot be settled.
            BusyError: Ask again in a moment.
        """
        async with self._looking:
            if orphan.owner not in self._looked_at:
                await self._settle(orphan.slot)
                self._looked_at.add(orphan.owner)
        self._table.give_up(orphan.claim)

    async def _settle(self, slot: int) -> None:
        """Settles the journal of a dead process, unless the next one in its slot has done so."""
        loop = asyncio.get_running_loop()

        def left(packets: Sequence[packet_pb2.DecisionPacket]) -> None:
            # On the loop, for the locks of the table are of processes and not of threads.
            asyncio.run_coroutine_threadsafe(self._restore(packets), loop).result(2 * _PATIENCE_SECONDS)

        try:
            await asyncio.to_thread(settle_what_was_left, self._journal_of(slot), self._machine, left, waits=False)
        except JournalInUseError:
            if not self._table.is_taken_over(slot):
                raise

    async def _restore(self, packets: Sequence[packet_pb2.DecisionPacket]) -> None:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            for left in self._left(packets):
                while not self._restored(left):  # noqa: ASYNC110 - another process holds it, for a moment
                    await asyncio.sleep(_AGAIN_SECONDS)

    def _restored(self, left: _Left) -> bool:
        """Puts a decision into the table; False when another process is just looking at the same bucket."""
        try:
            self._table.restore(*left)
        except BusyError:
            return False
        except OverloadedError:
            _log.warning("idempotency_key_lost", order_ref=left.order.order_ref)
        return True

    def _left(self, packets: Iterable[packet_pb2.DecisionPacket]) -> Iterator[_Left]:
        """Of the decisions with a key that is to be remembered yet, the newest of each key first."""
        for packet in reversed(list(packets)):
            if not packet.order.idempotency_key:
                continue
            age_seconds = self._machine.wall_clock() - packet.decision.decided_at.ToNanoseconds() / 1e9
            if (seconds := self._window_seconds - max(0.0, age_seconds)) > 0.0:
                order = identify(packet.order, packet.caller)
                yield _Left(order, remembered_of(packet.decision, packet.model_expires_at), seconds)
