"""Records refused attempts: counted, logged and in the audit, without anything that could be a secret."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from feature_cache.token_bucket import TokenBuckets
from pretrade.audit.v1 import packet_pb2
from server.errors import JournalError

_log = structlog.get_logger(__name__)


class Refusals:
    """Counts every refused attempt, and records only a few a second, so that they cannot fill a disk.

    Args:
        record: Makes an entry of the journal durable.
        rates: How many are recorded.
        instance_id: This server process.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        record: Callable[[bytes], Awaitable[object]],
        rates: TokenBuckets,
        instance_id: str,
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._record = record
        self._rates = rates
        self._instance_id = instance_id
        self._wall_clock_ns = wall_clock_ns
        self._recording: set[asyncio.Task[None]] = set()
        self._unrecorded = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        """By plane and reason."""

    def note(self, plane: str, method: str, peer: str, caller: str, reason: str) -> None:
        """Takes note of an attempt.

        Args:
            plane: `decision` or `admin`.
            method: What was called.
            peer: The address it came from.
            caller: Who it was; empty when the credentials were no good.
            reason: Of the error.
        """
        self.counts[plane, reason] += 1
        if not self._rates.take(""):
            self._unrecorded += 1
            return
        unrecorded, self._unrecorded = self._unrecorded, 0
        method = method[:200]
        _log.warning(
            "refused", plane=plane, method=method, peer=peer, caller=caller, reason=reason, unrecorded_before=unrecorded
        )
        refusal = packet_pb2.AccessRefused(
            plane=plane,
            method=method,
            peer=peer,
            caller=caller,
            reason=reason,
            refused_at_ns=self._wall_clock_ns(),
            instance_id=self._instance_id,
            unrecorded_before=unrecorded,
        )
        entry = packet_pb2.JournalEntry(access_refused=refusal).SerializeToString()
        task = asyncio.ensure_future(self._append(entry))
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def _append(self, entry: bytes) -> None:
        try:
            await self._record(entry)
        except JournalError as error:
            _log.error("refusal not in the audit", error=str(error))
