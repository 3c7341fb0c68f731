"""The checker: what must hold after every fault, whatever the fault was, for orders asked for in every way.

* I1 Every acknowledged order has exactly one audit row, which says that it was replied; a refused one has none; one
  whose caller heard nothing has at most one, which says that its reply is unconfirmed. Only where the caller gave up by
  itself may the reply have crossed that: then the row may say replied when it was decided shortly before or after. A
  server that is killed cannot say what became of its last replies: their rows say so, also of those that were heard.
  Nor can one on grpc.aio of a reply that was written as its deadline passed; these are few.
* I2 Reply and audit row are the same but for the budget, to which the reply adds the audit's stage; the hash chain has
  no gap.
* I3 No reply took longer than it was allowed by its own budget. And none comes later than the deadline, 5 ms, and what
  the load generator took to listen: that is asserted only where the machine's time is measured, and told elsewhere.
* I4 Never TRADE from a score outside [0, 1] or below its threshold, from features that are stale, missing or of an
  unknown age, whoever brought them, or without a durable row.
* I5 At most two attempts a decision, on different replicas, within the time allowed.
* I6 Each replica's breaker makes only legal transitions.
* I7 Memory in use, files and tasks of the event loop are back to where they were, once healed.
* I8 After an acknowledged HALTED (REDUCING) nothing is told to trade (but what only reduces an exposure) before
  somebody asked for a change that relaxes it, which was acknowledged and is in the audit.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

from fallback.order import MODEL_SOURCES
from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.reply_status import REPLIED, unconfirmed_status
from support.decision_server import DecisionServer
from support.harness import eventually
from support.open_loop import NO_RESULT, Call, Fate

Row = tuple[packet_pb2.DecisionPacket, str]
"""An audited decision and its reply status."""

_SLACK_SECONDS: Final = 0.005
_LISTENING_SECONDS: Final = 0.01
"""What the load generator takes to read a burst of replies; one that came after the deadline would be an error."""
_CROSSING_SHARE: Final = 0.1
"""Of the deadline: what may lie between a decision and its caller's giving up when the reply was sent all the same. In
that time it is made durable, handed to the transport, and not yet read by a caller that gives up at that moment; or a
caller that left is not yet known to have left."""
_UNCONFIRMED: Final = unconfirmed_status("")
_KILLED: Final = unconfirmed_status("killed")
_UNSENT: Final = unconfirmed_status("unsent")
_IN_DOUBT_SHARE: Final = 0.05
"""Of the answers: so many may be of a server that stood still until their deadline when it had written them."""
_STOOD_STILL_SECONDS: Final = 0.05
"""A generator that sends an order so late did not get a core: nor, mostly, did the server."""
_MAY_BE_MISSED: Final = 0.01
"""Of the calls: so many may meet that at the very end of their time."""
_SCORED_SOURCES: Final = (*MODEL_SOURCES, pb.SOURCE_CACHED_SCORE)
_UNUSABLE: Final = {pb.DEGRADATION_FEATURES_MISSING, pb.DEGRADATION_FEATURES_STALE, pb.DEGRADATION_BOOK_UNKNOWN}
_UNAUDITED: Final = {pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_AUDIT_UNAVAILABLE}
_LEGAL: Final = {("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("half-open", "closed")}
_BOOK_AGE: Final = features.INDEX["book_age_ms"]
_STRICTNESS: Final = ("ACTIVE", "REDUCING", "HALTED")
_MEMORY_GROWTH_BYTES: Final = 48 * 1024 * 1024
"""What a busy server may keep: arenas of Python's allocator and caches that fill up once."""
_FILE_GROWTH: Final = 4
_TASK_GROWTH: Final = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server's process holds."""

    memory_bytes: int
    """In physical memory, without what Envoy's allocator holds free: that was needed at some time within the last five
    minutes, and goes back to the system when it was not needed again."""
    files: int
    tasks: int

    @classmethod
    def of(cls, server: DecisionServer) -> Self:
        """As of now."""
        process = server.process
        tasks = int(server.metric("pretrade_event_loop_tasks"))
        return cls(process.memory_info().rss - server.free_in_allocator(), process.num_fds(), tasks)

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


@dataclass(frozen=True, slots=True)
class Steered:
    """A trading state that an operator asked for, and what he heard."""

    state: str
    """ACTIVE, REDUCING or HALTED."""
    sent: float
    """Seconds of the system's monotonic clock."""
    acknowledged: float = math.nan
    """NaN: he did not hear that it is in force."""
    change_id: str = ""


@dataclass
class Evidence:
    """What is known of a server and its callers from outside."""

    calls: Sequence[Call] = ()
    rows: Sequence[Row] = ()
    changes: Sequence[packet_pb2.ControlChange] = ()
    """Audited, in the order of the journal."""
    steered: Sequence[Steered] = ()
    log: Sequence[dict[str, Any]] = field(default_factory=list)
    """The server's, a dictionary a line."""
    max_feature_age_seconds: float = 1.0

    def violations(self) -> list[str]:
        """Every violation of I1 to I6 and I8 but for late answers and the hash chain; each begins with its number."""
        by_order: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_order[row[0].order.order_ref].append(row)
        found: list[str] = []
        for call in self.calls:
            found += _of_call(call, by_order.get(call.order_ref, []))
        for packet, status in self.rows:
            found += _of_packet(packet, status, self.max_feature_age_seconds)
        found += self._in_doubt(by_order)
        return found + _of_breakers(self.log) + self._of_trading_states(by_order)

    def _in_doubt(self, by_order: dict[str, list[Row]]) -> list[str]:
        """I1, of answers that the audit does not claim."""
        answered = [call.order_ref for call in self.calls if call.decision is not None]
        doubted = [ref for ref in answered if any(status == _UNSENT for _, status in by_order.get(ref, []))]
        if len(doubted) <= _IN_DOUBT_SHARE * len(answered):
            return []
        return [f"I1: {len(doubted)} of {len(answered)} were answered and their rows say {_UNSENT}: {doubted[:5]}"]

    def late(self) -> list[str]:
        """The answers that came later than I3 allows."""
        stalled = stalls(sorted(self.calls, key=lambda call: call.due))
        return [
            f"I3: {call.order_ref} was answered after {1e3 * call.service_seconds:.1f} ms"
            for call in self.calls
            if call.decision is not None
            and call.service_seconds
            > call.deadline_seconds + _SLACK_SECONDS + _LISTENING_SECONDS + stalled[call.order_ref]
        ]

    def _of_trading_states(self, by_order: dict[str, list[Row]]) -> list[str]:
        """I8."""
        found = []
        for step in self.steered:
            if step.state == "ACTIVE":
                continue
            until = min((one.sent for one in self.steered if self._relaxes(one, step)), default=math.inf)
            for call in self.calls:
                during = step.acknowledged < call.sent and not call.ended >= until
                if during and call.decision is not None and call.decision.action == pb.ACTION_TRADE:
                    rows = by_order.get(call.order_ref, [])
                    if step.state == "HALTED" or not any(packet.order.reduce_only for packet, _ in rows):
                        found.append(f"I8: {call.order_ref} heard TRADE after {step.state} was acknowledged")
            for packet, status in self.rows:
                arrived, decided = packet.arrived_monotonic_ns / 1e9, packet.decided_monotonic_ns / 1e9
                if (
                    step.acknowledged < arrived
                    and decided < until
                    and packet.decision.action == pb.ACTION_TRADE
                    and status == REPLIED
                    and (step.state == "HALTED" or not packet.order.reduce_only)
                ):
                    found.append(f"I8: {packet.order.order_ref} has TRADE after {step.state} was acknowledged")
        return found

    def _relaxes(self, step: Steered, restriction: Steered) -> bool:
        """Whether a step ended a restriction: less strict, later, acknowledged and in the audit."""
        return (
            _STRICTNESS.index(step.state) < _STRICTNESS.index(restriction.state)
            and step.sent > restriction.sent
            and not math.isnan(step.acknowledged)
            and any(
                (change.change_id, change.subject, change.value) == (step.change_id, "trading_state", step.state)
                for change in self.changes
            )
        )


def check(
    server: DecisionServer,
    calls: Sequence[Call],
    before: Usage | None = None,
    steered: Sequence[Steered] = (),
    *,
    timed: bool = False,
) -> str:
    """Checks every invariant that can be checked from outside, once the load has ended and the fault is healed.

    Args:
        server: The server, running; its audit is drained first.
        calls: Every order that it was asked for, or at least all of those that were logged.
        before: What the server held when it was well; None leaves I7 out.
        steered: What operators asked for.
        timed: Whether the machine has nothing else to do, so that a late answer is the server's.

    Returns:
        What was checked, in a line.

    Raises:
        AssertionError: One does not hold; all violations are named.
    """
    server.drain_audit()
    rows = list(server.audited())
    evidence = Evidence(calls, rows, list(server.audited_changes()), steered, server.log())
    violations, late = evidence.violations(), evidence.late()
    if timed:
        violations += late
    server.verify_chain()
    if before is not None:
        violations += _of_usage(server, before)
    counts = Counter(violation.partition(":")[0] for violation in violations)
    assert not violations, f"{dict(counts)}: {'; '.join(violations[:5])}"
    checked = f"I1-I{6 if before is None else 7}{' and I8' if steered else ''}"
    told = f"; {len(late)} answers later than I3 allows" if late else ""
    in_doubt = sum(status == _UNSENT for _, status in rows)
    told += f"; of {in_doubt} it is not known whether they were sent" if in_doubt else ""
    return f"{checked} hold for {len(calls)} orders and {len(rows)} audit rows{told}"


def stalls(calls: Sequence[Call]) -> dict[str, float]:
    """How late, in seconds, orders left that were due while one was under way: then its caller could not listen."""
    dues = [call.due for call in calls]
    found = {}
    for call in calls:
        during = calls[bisect_left(dues, call.sent) : bisect_right(dues, call.ended)]
        found[call.order_ref] = max((other.sent - other.due for other in during), default=0.0)
    return found


def assert_answered(calls: Sequence[Call]) -> str:
    """Every call had an answer, but for few whose deadline passed while the machine stood still; how many those are.

    A server has an answer ready some milliseconds before the deadline at the latest, whatever it waits for: a model, or
    a disk. It still has to get a core in those milliseconds. That there was none shows in the generator, a process of
    its own, which sent other orders late then.
    """
    stalled = stalls(sorted(calls, key=lambda call: call.due))
    missed = [call for call in calls if call.status != "OK"]
    excused = [
        call for call in missed if call.status == "DEADLINE_EXCEEDED" and stalled[call.order_ref] > _STOOD_STILL_SECONDS
    ]
    assert len(missed) == len(excused), Counter(call.status for call in missed)
    assert len(excused) <= _MAY_BE_MISSED * len(calls), f"{len(excused)} of {len(calls)} calls without answer"
    return f"{len(excused)} of {len(calls)} calls passed their deadline while the machine stood still"


def _of_call(call: Call, rows: Sequence[Row]) -> list[str]:
    """I1 to I4 of one order."""
    ref, found = call.order_ref, []
    if len(rows) > 1:
        found.append(f"I1: {ref} has {len(rows)} rows")
    if call.status == NO_RESULT:
        found.append(f"I1: {ref} got no result")
    elif call.fate is Fate.REFUSED and rows:
        found.append(f"I1: {ref} was refused with {call.status} and has a row")
    reply = call.decision
    if reply is None:
        return found + _of_unheard(call, rows)
    if reply.order_ref != ref:
        found.append(f"I2: {ref} heard the decision of {reply.order_ref}")
    if reply.budget.used_us > reply.budget.allowed_us:
        found.append(f"I3: {ref} used {reply.budget.used_us} of {reply.budget.allowed_us} µs")
    if not _UNAUDITED.isdisjoint(reply.reasons):
        return found + _of_unaudited(reply, rows)
    if not rows:
        return [*found, f"I1: {ref} was answered and has no row"]
    packet, status = rows[0]
    if status not in (REPLIED, _KILLED, _UNSENT):
        found.append(f"I1: {ref} was answered and its row says {status}")
    return found + _differences(reply, packet.decision)


def _of_unaudited(reply: pb.Decision, rows: Iterable[Row]) -> list[str]:
    """I2 and I4 of an order whose caller was told that its decision is not audited."""
    found = []
    if reply.action != pb.ACTION_ABSTAIN:
        found.append(f"I4: {reply.order_ref} was not durable and is {pb.Action.Name(reply.action)}")
    if any(status == REPLIED for _, status in rows):
        found.append(f"I2: {reply.order_ref} was told that it is not audited, and its row says it was replied")
    return found


def _differences(reply: pb.Decision, decided: pb.Decision) -> list[str]:
    """I2 of a reply and its row."""
    names = [name for name in pb.Decision.DESCRIPTOR.fields_by_name if name != "budget"]
    return [
        f"I2: {reply.order_ref} heard {name} {getattr(reply, name)}, its row has {getattr(decided, name)}"
        for name in names
        if getattr(reply, name) != getattr(decided, name)
    ]


def _of_unheard(call: Call, rows: Iterable[Row]) -> list[str]:
    """I1 of an order whose caller heard no decision.

    Nobody can rule out that a reply which left in time crossed its caller's giving up. A caller that did not give up
    has heard what the server said, and there is no such excuse.
    """
    found = []
    for packet, status in rows:
        decided = packet.decided_monotonic_ns / 1e9
        before, room = call.ended - decided, _CROSSING_SHARE * call.deadline_seconds
        crossed = call.given_up and min(call.leaves, call.ended) - room <= decided <= call.ended + room
        if not status.startswith(_UNCONFIRMED) and not crossed:
            found.append(
                f"I1: {call.order_ref} heard {call.status or 'nothing'}; its row, decided {1e3 * before:.0f} ms "
                f"before, says {status}"
            )
    return found


def _of_packet(packet: packet_pb2.DecisionPacket, status: str, max_feature_age_seconds: float) -> list[str]:
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
        ages = [packet.features.age_seconds + packet.features.book_age_ms / 1e3]
        if packet.order.HasField("features"):
            ages.append(packet.order.features.values[_BOOK_AGE] / 1e3)
        # Written so that NaN is found. The server's own count besides the caller's: the guards' mid is of these.
        found += [f"I4: {ref} trades on features {age:.1f} s old" for age in ages if not age <= max_feature_age_seconds]
    attempts = [attempt.replica for attempt in packet.attempts]
    if len(attempts) > 2 or len(set(attempts)) < len(attempts):
        found.append(f"I5: {ref} had attempts on {attempts}")
    if status == REPLIED and any(attempt.used_us > decision.budget.allowed_us for attempt in packet.attempts):
        found.append(f"I5: {ref} had attempts beyond its time")
    if decision.source in MODEL_SOURCES and not any(attempt.outcome == "success" for attempt in packet.attempts):
        found.append(f"I5: {ref} has a model's answer without an attempt that succeeded")
    return found


def _of_breakers(log: Iterable[dict[str, Any]]) -> list[str]:
    """I6, from the server's log."""
    found: list[str] = []
    state: dict[str, str] = {}
    for line in log:
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
