"""Converts control changes to the contract's messages: for replies to callers, and for the audit."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import MessageToJson, Parse

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.control.model import TRADING_STATE, Change, Control, IsOver, Restriction, Timed, is_stricter
from server.control.subjects import Subject


def describe(
    subjects: Mapping[str, Subject], before: Control, after: Control, change: Change, is_over: IsOver
) -> admin_pb2.Change:
    """What a change does to a state; instant and instance are the caller's to add."""
    subject = subjects[change.subject]
    default, words = subject.default, subject.words

    def was_over(timed: Timed) -> bool:  # what a change ends was in force until now
        return timed.id != change.ends and is_over(timed)

    def will_be_over(timed: Timed) -> bool:
        return timed.id in (change.id, f"{change.id}.again") or is_over(timed)

    previous = _or(before.value(change.subject, was_over), default)
    value = _or(after.value(change.subject, is_over), default)
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
    if change.subject == TRADING_STATE:
        message.lifts.extend(change.lifts if change.ends is None else (*change.lifts, change.ends))
    if change.expires_at is not None:
        message.expires_at.FromNanoseconds(int(change.expires_at * 1e9))
    if previous != value or change.seconds is not None:
        line = f"{change.subject}: {words(previous)} → {words(value)}"
        if change.seconds is not None:
            line += f" for {change.seconds:g} s, then {words(_or(after.value(change.subject, will_be_over), default))}"
        message.diff.append(line)
    if change.subject == TRADING_STATE:
        message.diff.extend(_about_restrictions(before, after, change, is_over))
    return message


def to_json(change: packet_pb2.ControlChange) -> str:
    """What the audit is to keep, as the control state carries it until some process has recorded it."""
    return MessageToJson(change, indent=None)


def from_json(text: str) -> packet_pb2.ControlChange:
    """What the audit is to keep."""
    return Parse(text, packet_pb2.ControlChange(), ignore_unknown_fields=True)


def _about_restrictions(before: Control, after: Control, change: Change, is_over: IsOver) -> list[str]:
    """Which restrictions of the trading state a change lifts, and which stay that are stricter than it wants."""
    standing = before.trading.restrictions
    lines = [f"lifts {_in_words(standing[one])}" for one in change.lifts if one in standing]
    if change.value is not None and is_stricter(after.trading.state(is_over), change.value):
        stricter = (one for one in after.trading.in_force(is_over) if is_stricter(one.level, change.value or ""))
        lines.extend(f"stays {_in_words(one)}" for one in stricter)
    return lines


def _in_words(restriction: Restriction) -> str:
    return f"{restriction.level} by {restriction.author}: {restriction.reason} (change {restriction.id})"


def _or(value: str | None, default: str) -> str:
    return default if value is None else value
