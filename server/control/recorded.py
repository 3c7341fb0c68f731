"""A control change as the audit keeps it, and back: all of the control state that readers of the audit need."""

from __future__ import annotations

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2


def record(change: admin_pb2.Change) -> packet_pb2.ControlChange:
    """A change as the audit keeps it."""
    return packet_pb2.ControlChange(
        change_id=change.change_id,
        subject=change.subject,
        previous=change.previous,
        value=change.value,
        author=change.author,
        reason=change.reason,
        changed_at_ns=change.changed_at.ToNanoseconds(),
        instance_id=change.instance_id,
        previous_version=change.previous_version,
        version=change.version,
        expires_at_ns=change.expires_at.ToNanoseconds() if change.HasField("expires_at") else 0,
        diff=change.diff,
        lifts=change.lifts,
    )


def recorded(change: packet_pb2.ControlChange) -> admin_pb2.Change:
    """A change as it was recorded."""
    message = admin_pb2.Change(
        change_id=change.change_id,
        subject=change.subject,
        previous=change.previous,
        value=change.value,
        author=change.author,
        reason=change.reason,
        instance_id=change.instance_id,
        previous_version=change.previous_version,
        version=change.version,
        diff=change.diff or [f"{change.subject}: {change.previous} → {change.value}"],
        lifts=change.lifts,
    )
    message.changed_at.FromNanoseconds(change.changed_at_ns)
    if change.expires_at_ns:
        message.expires_at.FromNanoseconds(change.expires_at_ns)
    return message
