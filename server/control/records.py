"""Changes in the contract's words: what a caller is told, and what the audit keeps."""

from __future__ import annotations

from collections.abc import Mapping

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.model import Change, Control, IsOver
from server.control.subjects import Subject


def describe(
    subjects: Mapping[str, Subject], before: Control, after: Control, change: Change, is_over: IsOver
) -> admin_pb2.Change:
    """What a change does to a state; instant and instance are the caller's to add."""
    subject = subjects[change.subject]
    usual, words = subject.usual, subject.words
    previous, value = (_or(state.value(change.subject, is_over), usual) for state in (before, after))
    setting = before.settings.get(change.subject)
    if change.ends is not None and setting is not None and setting.temporary is not None:
        previous = setting.temporary.value
    message = admin_pb2.Change(
        change_id=change.id,
        subject=change.subject,
        previous=previous,
        value=value,
        previous_version=before.version,
        version=after.version,
        author=change.author,
        reason=change.reason,
    )
    if change.expires_at is not None:
        message.expires_at.FromNanoseconds(int(change.expires_at * 1e9))
    line = f"{change.subject}: {words(previous)} → {words(value)}"
    if change.seconds is not None:
        permanent = after.settings[change.subject].permanent if change.subject in after.settings else None
        line += f" for {change.seconds:g} s, then {words(_or(permanent, usual))}"
    if previous != value or change.seconds is not None:
        message.diff.append(line)
    return message


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
    )


def recorded(change: packet_pb2.ControlChange) -> admin_pb2.Change:
    """A change as it was kept."""
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
    )
    message.changed_at.FromNanoseconds(change.changed_at_ns)
    if change.expires_at_ns:
        message.expires_at.FromNanoseconds(change.expires_at_ns)
    return message


def _or(value: str | None, usual: str) -> str:
    return usual if value is None else value
