"""The checker: what must hold after every fault, whatever the fault was.

* I1 Every acknowledged call has exactly one audit row, a refused one none, one whose caller heard nothing at most one,
  which says that its reply is unconfirmed, unless that may have crossed the caller's giving up.
* I2 Reply and audit row agree in action, score, source; the hash chain has no gap.
* I3 No reply comes later than the deadline, 5 ms, and what the load generator took to listen.
* I4 Never TRADE from a score outside [0, 1] or below its threshold, from stale features, or without a durable row.
* I5 At most two attempts a decision, on different replicas, within the time allowed.
* I6 Each replica's breaker makes only legal transitions.
* I7 Memory, files and tasks of the event loop are back to where they were, once healed.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from decision_server import DecisionServer
from harness import eventually
from open_loop import Call, Fate

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.columns import REPLIED, unconfirmed_status

_SLACK_SECONDS: Final = 0.005
_LISTENING_SECONDS: Final = 0.01
"""What the load generator takes to read a burst of replies; one that came after the deadline would be an error."""
_CROSSING_SECONDS: Final = 0.1
"""What may lie between a decision and its reply's arrival on a bad day: a sync of the disk, and a caller that dozes."""
_UNCONFIRMED: Final = unconfirmed_status("")
_MODEL_SOURCES: Final = (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_CANARY)
_SCORED_SOURCES: Final = (*_MODEL_SOURCES, pb.SOURCE_CACHED_SCORE)
_UNUSABLE: Final = {pb.DEGRADATION_FEATURES_MISSING, pb.DEGRADATION_FEATURES_STALE, pb.DEGRADATION_BOOK_UNKNOWN}
_UNAUDITED: Final = {pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_AUDIT_UNAVAILABLE}
_LEGAL: Final = {("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("half-open", "closed")}
_MEMORY_GROWTH_BYTES: Final = 48 * 1024 * 1024
"""What a busy server may keep: allocator arenas and caches that fill up once."""
_FILE_GROWTH: Final = 4
_TASK_GROWTH: Final = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server's process holds."""

    memory_bytes: int
    files: int
    tasks: int

    @classmethod
    def of(cls, server: DecisionServer) -> Self:
        """As of now."""
        process = server.process
        tasks = int(server.metric("pretrade_event_loop_tasks"))
        return cls(process.memory_info().rss, process.num_fds(), tasks)

    def grew_from(self, before: Usage) -> str:
        """What is more than `before` by more than is normal; empty when nothing is."""
        grown = {
            "memory_bytes": self.memory_bytes - before.memory_bytes > _MEMORY_GROWTH_BYTES,
            "files": self.files - before.files > _FILE_GROWTH,
            "tasks": self.tasks - before.tasks > _TASK_GROWTH,
        }
        return ", ".join(
            f"{name} {getattr(before, name)} → {getattr(self, name)}" for name, much in grown.items() if much
        )


def check(server: DecisionServer, calls: Sequence[Call], deadline_seconds: float, before: Usage | None = None) -> str:
    """Checks every invariant that can be checked from outside, once the load has ended and the fault is healed.

    Args:
        server: The server, running; its audit is drained first.
        calls: Every call that was made to it, or at least all of those that were logged.
        deadline_seconds: Of each call.
        before: What the server held when it was well; None leaves I7 out.

    Returns:
        What was checked, in a line.

    Raises:
        AssertionError: One does not hold; all violations are named.
    """
    server.drain_audit()
    rows: dict[str, list[tuple[packet_pb2.DecisionPacket, str]]] = defaultdict(list)
    for packet, status in server.audited():
        rows[packet.order.order_ref].append((packet, status))
    violations: list[str] = []
    stalled = stalls(sorted(calls, key=lambda call: call.due))
    for call in calls:
        latest = deadline_seconds + _SLACK_SECONDS + _LISTENING_SECONDS + stalled.get(call.order_ref, 0.0)
        violations += _of_call(call, rows.get(call.order_ref, []), latest)
    for packets in rows.values():
        for packet, status in packets:
            violations += _of_packet(packet, status)
    violations += _of_breakers(server)
    server.verify_chain()
    if before is not None:
        violations += _of_usage(server, before)
    counts = Counter(violation.partition(":")[0] for violation in violations)
    assert not violations, f"{dict(counts)}: {'; '.join(violations[:5])}"
    audited = sum(map(len, rows.values()))
    return f"I1-I{6 if before is None else 7} hold for {len(calls)} calls and {audited} audit rows"


def stalls(calls: Sequence[Call]) -> dict[str, float]:
    """How late, in seconds, calls left that were due while a call was under way: then its caller could not listen."""
    dues = [call.due for call in calls]
    found = {}
    for call in calls:
        during = calls[bisect_left(dues, call.sent) : bisect_right(dues, call.ended)]
        found[call.order_ref] = max((other.sent - other.due for other in during), default=0.0)
    return found


def _of_call(call: Call, rows: Sequence[tuple[packet_pb2.DecisionPacket, str]], latest_seconds: float) -> list[str]:
    """I1 to I3 of one call."""
    ref, found = call.order_ref, []
    if len(rows) > 1:
        found.append(f"I1: {ref} has {len(rows)} rows")
    if call.fate is Fate.REFUSED and rows:
        found.append(f"I1: {ref} was refused with {call.status} and has a row")
    reply = call.decision
    if reply is None:
        return found + of_unheard(call, rows)
    if call.service_seconds > latest_seconds:
        found.append(f"I3: {ref} was answered after {1e3 * call.service_seconds:.1f} ms")
    if reply.budget.used_us > reply.budget.allowed_us:
        found.append(f"I3: {ref} used {reply.budget.used_us} of {reply.budget.allowed_us} µs")
    unaudited = not _UNAUDITED.isdisjoint(reply.reasons)
    if unaudited:
        if reply.action != pb.ACTION_ABSTAIN:
            found.append(f"I4: {ref} was not durable and is {pb.Action.Name(reply.action)}")
        if any(status == REPLIED for _, status in rows):
            found.append(f"I2: {ref} was told that it is not audited, and its row says it was replied")
        return found
    if not rows:
        return [*found, f"I1: {ref} was answered and has no row"]
    packet, status = rows[0]
    decided = packet.decision
    if status != REPLIED:
        found.append(f"I1: {ref} was answered and its row says {status}")
    return found + [
        f"I2: {ref} heard {name} {getattr(reply, name)}, its row has {getattr(decided, name)}"
        for name in ("decision_id", "action", "score", "source", "model_version")
        if getattr(reply, name) != getattr(decided, name)
    ]


def of_unheard(call: Call, rows: Sequence[tuple[packet_pb2.DecisionPacket, str]]) -> list[str]:
    """I1 of a call whose caller heard no decision.

    The one exception nobody can rule out: a reply that left in time and crossed its caller's giving up. It was decided
    no longer before its deadline than the disk and the wire may take.
    """
    found = []
    for packet, status in rows:
        budget = packet.decision.budget
        spare_seconds = (budget.allowed_us - budget.used_us) / 1e6
        crossed = call.status == "DEADLINE_EXCEEDED" and spare_seconds <= _CROSSING_SECONDS
        if not status.startswith(_UNCONFIRMED) and not crossed:
            found.append(
                f"I1: {call.order_ref} heard {call.status or 'nothing'}; its row, decided {1e3 * spare_seconds:.0f} ms "
                f"before the deadline, says {status}"
            )
    return found


def _of_packet(packet: packet_pb2.DecisionPacket, status: str) -> list[str]:
    """I4 and I5 of one audited decision."""
    decision, ref = packet.decision, packet.order.order_ref
    found = []
    if decision.action == pb.ACTION_TRADE:
        if decision.source in _SCORED_SOURCES and not (
            decision.HasField("score") and 0.0 <= decision.score <= 1.0 and decision.score >= decision.threshold
        ):
            found.append(f"I4: {ref} trades on score {decision.score} and threshold {decision.threshold}")
        if decision.source == pb.SOURCE_NONE:
            found.append(f"I4: {ref} trades on nobody's word")
        if not _UNUSABLE.isdisjoint(decision.degradations):
            found.append(f"I4: {ref} trades on unusable features")
    attempts = [attempt.replica for attempt in packet.attempts]
    if len(attempts) > 2 or len(set(attempts)) < len(attempts):
        found.append(f"I5: {ref} had attempts on {attempts}")
    if status == REPLIED and any(attempt.used_us > decision.budget.allowed_us for attempt in packet.attempts):
        found.append(f"I5: {ref} had attempts beyond its time")
    if decision.source in _MODEL_SOURCES and not any(attempt.outcome == "success" for attempt in packet.attempts):
        found.append(f"I5: {ref} has a model's answer without an attempt that succeeded")
    return found


def _of_breakers(server: DecisionServer) -> list[str]:
    """I6, from the server's log."""
    found: list[str] = []
    state: dict[str, str] = {}
    for line in server.log():
        if line["event"] == "started":
            state.clear()  # another process, with breakers of its own
        if line["event"] != "breaker":
            continue
        replica, move = line["replica"], (line["previous"], line["state"])
        if move not in _LEGAL:
            found.append(f"I6: {replica} went from {move[0]} to {move[1]}")
        if move[0] != (was := state.get(replica, "closed")):
            found.append(f"I6: {replica} was {was} and left {move[0]}")
        state[replica] = move[1]
    return found


def _of_usage(server: DecisionServer, before: Usage) -> list[str]:
    """I7, as soon as it holds within the harness's patience."""
    try:
        eventually(lambda: Usage.of(server).grew_from(before), lambda grown: not grown)
    except AssertionError:
        return [f"I7: {Usage.of(server).grew_from(before)}"]
    return []


def breaker_times(server: DecisionServer, replica: str, state: str) -> list[float]:
    """Instants at which a replica's breaker entered a state, in seconds of the system's monotonic clock."""
    ahead = time.time() - time.monotonic()
    return [
        datetime.fromisoformat(line["timestamp"]).timestamp() - ahead
        for line in server.log("breaker")
        if line["replica"] == replica and line["state"] == state
    ]
