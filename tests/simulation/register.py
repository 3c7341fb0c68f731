"""The trading state as a register: what operators were told, and what callers then heard.

A *restriction* is a change to HALTED or REDUCING that was acknowledged. It stands from its acknowledgement until a
change that lifts it, and whatever lifts it was asked for by somebody. A relaxation whose outcome its operator does not
know may have been made or not; one that was refused was not made.

* I8 While a restriction stands, nobody trades against it: not on the server that acknowledged it, from that moment on,
  its repeats of keys and its next processes included; not on any other server, from when it must have heard of it.
* lost: Once everything is healed, every server holds every restriction that stands.
* told: No operator was told the opposite of what happened: a refused change is in force nowhere and was so at no time.
* row: Every change that took effect has a row. It may have two, as when its maker died before it had told the others;
  they have one change id, and the database and `pretrade changes` show one.

An operator may be told that neither Redis nor the disk took a change, so that it ends with the process that has it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from pretrade.admin.v1 import admin_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from simulation.audit import Audit
from simulation.history import Operation

if TYPE_CHECKING:
    from simulation.scene import Scene

STRICTNESS: Final = ("ACTIVE", "REDUCING", "HALTED")
HEARD_WITHIN_SECONDS: Final = 1.5
"""After this a server that could reach Redis all the time has heard of a change."""


def check_register(scene: Scene, audit: Audit, final: dict[str, str]) -> list[str]:
    """Checks the history of the trading state.

    Args:
        scene: Where it happened.
        audit: What it says in the end.
        final: The trading state of each server in the end.
    """
    history = scene.history
    changes = [one for one in history.operations if one.subject == "trading_state"]
    return [
        *_trades(scene, changes),
        *_lost(scene, changes, final),
        *_told(scene, audit),
        *_rows(scene, audit),
    ]


def _restrictions(changes: list[Operation]) -> list[Operation]:
    return [one for one in changes if one.acknowledged and one.value != "ACTIVE"]


def may_lift(relaxation: Operation, restriction: Operation) -> bool:
    """Whether a change may have lifted a restriction.

    It must be less strict, not refused, and must not have ended before the restriction was asked for. Where it names
    what it lifts, it must name this one.
    """
    if relaxation is restriction or relaxation.refused:
        return False
    if STRICTNESS.index(relaxation.value) >= STRICTNESS.index(restriction.value):
        return False
    if relaxation.ended_at is not None and relaxation.acknowledged and relaxation.ended_at < restriction.asked_at:
        return False
    named = _lifts(relaxation)
    return named is None or restriction.change.change_id in named


def _lifts(operation: Operation) -> set[str] | None:
    """Ids of what an acknowledged change says it lifts; None where changes do not say."""
    if operation.change is None or "lifts" not in type(operation.change).DESCRIPTOR.fields_by_name:
        return None
    return set(operation.change.lifts)


def _expired(restriction: Operation, at: float) -> bool:
    """Whether a temporary restriction may be over."""
    request = restriction.request
    if not request.HasField("expires_in"):
        return False
    seconds: float = request.expires_in.ToNanoseconds() / 1e9
    return at >= restriction.asked_at + seconds


def _trades(scene: Scene, changes: list[Operation]) -> list[str]:
    """I8."""
    found = []
    history = scene.history
    for restriction in _restrictions(changes):
        assert restriction.ended_at is not None
        forgotten_at = _forgotten_at(scene, restriction)
        for asked in history.asked:
            decision = asked.decision
            if decision is None or decision.action != pb.ACTION_TRADE:
                continue
            if restriction.value == "REDUCING" and asked.order.reduce_only:
                continue
            since = restriction.ended_at
            if asked.server != restriction.server:
                since += HEARD_WITHIN_SECONDS
                if restriction.change.local or history.was_apart(asked.server, restriction.asked_at, asked.sent_at):
                    continue
            if not since < asked.sent_at < forgotten_at or _expired(restriction, asked.sent_at):
                continue
            assert asked.heard_at is not None
            if any(one.asked_at < asked.heard_at and may_lift(one, restriction) for one in changes):
                continue
            repeat = " by repeating a key" if asked.order.idempotency_key else ""
            found.append(
                f"I8: {asked.ref} trades on {asked.server}{repeat}, {asked.sent_at - since:.2f} s after "
                f"{restriction.reason} made it {restriction.value}"
            )
    return found


def _lost(scene: Scene, changes: list[Operation], final: dict[str, str]) -> list[str]:
    """Restrictions that nobody can have lifted, and that a server does not hold in the end."""
    found = []
    for restriction in _restrictions(changes):
        if any(may_lift(one, restriction) for one in changes) or restriction.request.HasField("expires_in"):
            continue
        if _forgotten_at(scene, restriction) < math.inf:
            continue
        for server, state in final.items():
            if STRICTNESS.index(state) < STRICTNESS.index(restriction.value):
                found.append(
                    f"lost: {server} is {state}, and nobody lifted {restriction.reason}, "
                    f"which made it {restriction.value} on {restriction.server}"
                )
    return found


def _told(scene: Scene, audit: Audit) -> list[str]:
    """Refused changes that were made."""
    found = []
    recorded = {change.reason for change in audit.changes}
    for operation in scene.history.operations:
        if not operation.refused:
            continue
        if operation.reason in recorded:
            found.append(f"told: {operation.reason} was refused ({operation.details}), and has a row")
        where = in_force(scene, operation.reason)
        if where:
            found.append(f"told: {operation.reason} was refused ({operation.details}), and is in {where}")
    return found


def _rows(scene: Scene, audit: Audit) -> list[str]:
    """Changes that took effect, and their rows. Two rows of a change differ at most in what was there before."""
    found = [f"row: {what} and has no row" for what in without_row(scene, audit)]
    rows: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for change in audit.changes:
        rows[change.reason].add((change.change_id, change.subject, change.value, change.author, *change.lifts))
    found += [
        f"row: {operation.reason} has {len(rows[operation.reason])} rows that say different things"
        for operation in scene.history.operations
        if len(rows[operation.reason]) > 1
    ]
    return found


def without_row(scene: Scene, audit: Audit) -> list[str]:
    """Changes that took effect, as far as callers and disks know, and have no row."""
    recorded = {change.reason for change in audit.changes}
    found = []
    for operation in scene.history.operations:
        if operation.reason in recorded:
            continue
        if operation.acknowledged:
            if _forgotten_at(scene, operation) == math.inf:
                found.append(f"{operation.reason} was acknowledged")
        elif not operation.refused and (where := in_force(scene, operation.reason)):
            found.append(f"{operation.reason} took effect ({where})")
    return found


def _forgotten_at(scene: Scene, operation: Operation) -> float:
    """When a change was lost with the only process that had it, as its operator was told; infinity if it was not."""
    assert operation.ended_at is not None
    if not operation.change.unsaved or in_force(scene, operation.reason):
        return math.inf
    lives = scene.history.lives[operation.server]
    return min((life.ended for life in lives if life.began <= operation.ended_at <= life.ended), default=math.inf)


def in_force(scene: Scene, reason: str) -> str:
    """Where a change with this reason was ever kept; empty when nowhere."""
    mark = f'"{reason}"'
    for at, _key, state in scene.redis.history:
        if mark.encode() in state:
            return f"Redis since {at:.2f}"
    for at, where, content in scene.history.control_states:
        if mark in content:
            return f"{where} since {at:.2f}"
    return ""


def state_name(state: admin_pb2.TradingState.ValueType) -> str:
    """A trading state's name."""
    return enum_name(admin_pb2.TradingState, state)
