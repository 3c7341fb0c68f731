"""What the caller of a decision heard, in words for people."""

from __future__ import annotations

from typing import Final

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.reply_status import CAUSES, REPLIED, UNSETTLED, WITHDRAWN, Cause, reply_of, unconfirmed_status

NO_ACTION: Final = (audit_pb2.HEARD_ACTION_NOTHING, audit_pb2.HEARD_ACTION_UNKNOWN)
"""What a caller may have heard besides an action."""
_WHY: Final[dict[Cause, str]] = {
    "audit_late": "the packet was not durable in time, so that the caller was told ABSTAIN",
    "cancelled": "the caller had gone",
    "deadline": "the reply could not be sent before the deadline, and the call ended DEADLINE_EXCEEDED",
    "failed": "the server failed after it had decided, and the call ended INTERNAL",
    "unsent": "the caller did not read for seconds, or its deadline passed as the reply was sent; it may have heard it",
    "not_durable": "the commit failed, so that the caller was told ABSTAIN; the row turned up on disk after all",
    "killed": "the server was killed before it could say; the caller may have heard the decision",
    "repeated": "the first call did not hear it; it is not confirmed whether a repeat of the call did",
    "withdrawn": "a guard or the audit objected later, which repeats heard; the first call may have heard the decision",
    "superseded": "another process may have decided the call in its place, and the call ended DEADLINE_EXCEEDED",
}
_EXPLAINED: Final = {
    REPLIED: "sent",
    UNSETTLED: "it is not known yet whether the reply was sent",
    **{unconfirmed_status(cause): f"{cause}: {_WHY[cause]}" for cause in CAUSES},
}


def heard(decision: audit_pb2.AuditedDecision) -> str:
    """In a table: `TRADE`, `ABSTAIN (AUDIT_LATE)`, `nothing (cancelled)`, `unknown (killed)`."""
    name = enum_name(audit_pb2.HeardAction, decision.heard_action)
    if decision.reply_status == REPLIED:
        return name
    cause = cause_of(decision)
    if decision.heard_action in NO_ACTION:
        return f"{name.lower()} ({cause})"
    decided = decision.packet.decision.reasons
    new = [reason for reason in decision.heard_reasons if reason not in decided] or decision.heard_reasons
    reasons = ", ".join(enum_name(pb.ReasonCode, reason) for reason in new)
    if decision.reply_status == WITHDRAWN:
        return f"{name} ({cause}: {reasons})"
    return f"{name} ({reasons or cause})"


def headline(decision: audit_pb2.AuditedDecision) -> str:
    """A whole line: `caller heard ABSTAIN (AUDIT_LATE); decided TRADE`, or `caller heard TRADE` if that was decided."""
    decided = f"decided {enum_name(pb.Action, decision.packet.decision.action)}"
    if decision.reply_status == REPLIED:
        return f"caller heard {heard(decision)}"
    if decision.reply_status == UNSETTLED:
        return f"not known yet what the caller heard; {decided}"
    if decision.heard_action == audit_pb2.HEARD_ACTION_UNKNOWN:
        return f"not known what the caller heard ({cause_of(decision)}); {decided}"
    return f"caller heard {heard(decision)}; {decided}"


def headline_of_note(note: packet_pb2.ReplyUnconfirmed) -> str:
    """The same of a decision that is not at hand: `caller heard ABSTAIN (RULES_PASSED, AUDIT_LATE)`."""
    reply = reply_of(note)
    if reply.heard_action == audit_pb2.HEARD_ACTION_UNKNOWN:
        return f"not known what the caller heard ({note.cause})"
    decision = audit_pb2.AuditedDecision(
        reply_status=reply.status, heard_action=reply.heard_action, heard_reasons=reply.heard_reasons
    )
    return f"caller heard {heard(decision)}"


def explained(decision: audit_pb2.AuditedDecision) -> str:
    """What became of the reply, and why."""
    return _EXPLAINED.get(decision.reply_status, decision.reply_status)


def cause_of(decision: audit_pb2.AuditedDecision) -> str:
    """Why the decision is not what its caller heard, or may not be; `replied` if it is."""
    return decision.reply_status.removeprefix(unconfirmed_status(""))
