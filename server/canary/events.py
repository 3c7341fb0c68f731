"""A turn in the life of a canary, as the audit keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pretrade.audit.v1 import packet_pb2

if TYPE_CHECKING:
    from server.canary.evidence import Evidence
    from server.canary.plan import Canary

TURNS: Final = ("started", "advanced", "weighted", "promoted", "rolled_back", "aborted")
"""What can happen to a canary."""


def event_of(
    evidence: Evidence, event: str, before: Canary, after: Canary, author: str, reason: str
) -> packet_pb2.CanaryEvent:
    """What happened, and the evidence of that moment; id, instant, instance and orders are the caller's to add."""
    return packet_pb2.CanaryEvent(
        canary_id=after.canary_id,
        model_version=after.model_version,
        champion_version=after.champion_version,
        event=event,
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
    )
