"""One event in the life of a canary, as the audit stores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog

from pretrade.audit.v1 import packet_pb2
from server.errors import JournalError

if TYPE_CHECKING:
    from server.canary.evidence import Evidence
    from server.canary.plan import Canary
    from server.journal.journal import Journal

_log = structlog.get_logger(__name__)

TURNS: Final = ("started", "advanced", "weighted", "promoted", "rolled_back", "aborted")
"""What can happen to a canary."""


class EventLog:
    """Makes the events of canaries in this process, and writes them to the journal and the log.

    Args:
        journal: Where they are written.
        new_id: Makes a unique, time-ordered id.
        instance_id: This process.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self, journal: Journal, new_id: Callable[[], str], instance_id: str, wall_clock_ns: Callable[[], int]
    ) -> None:
        self._journal = journal
        self._new_id = new_id
        self._instance_id = instance_id
        self.wall_clock_ns: Final = wall_clock_ns
        self.counts: Counter[str] = Counter()
        """Events that this process caused, since its start."""

    def event(
        self, evidence: Evidence, decisions: int, name: str, before: Canary, after: Canary, author: str, reason: str
    ) -> packet_pb2.CanaryEvent:
        """What happened, with the evidence of this moment and the orders that the canary answered here."""
        return packet_pb2.CanaryEvent(
            canary_id=after.canary_id,
            model_version=after.model_version,
            champion_version=after.champion_version,
            event=name,
            previous_weight=before.weight,
            weight=after.weight,
            verdict=evidence.verdict.value,
            reason=reason,
            checks=[
                packet_pb2.CanaryCheckRecord(
                    name=check.name,
                    canary=check.canary if check.samples else None,
                    champion=check.champion if check.samples else None,
                    tolerance=check.tolerance,
                    samples=check.samples,
                    verdict=check.verdict.value,
                )
                for check in evidence.checks.values()
            ],
            author=author,
            event_id=self._new_id(),
            at_ns=self.wall_clock_ns(),
            orders=decisions,
            instance_id=self._instance_id,
        )

    def keep(self, event: packet_pb2.CanaryEvent) -> None:
        """Records what happened; what the journal does not take is in the log."""
        self.counts[event.event] += 1
        log = _log.error if event.event == "rolled_back" else _log.warning
        log(
            "canary",
            turn=event.event,
            canary_id=event.canary_id,
            version=event.model_version,
            weight=event.weight,
            verdict=event.verdict,
            reason=event.reason,
            decisions=event.orders,
            author=event.author,
        )
        try:
            self._journal.append(packet_pb2.JournalEntry(canary_event=event).SerializeToString(), even_if_full=True)
        except JournalError as error:
            _log.error("canary's turn not recorded", event_id=event.event_id, error=str(error))
