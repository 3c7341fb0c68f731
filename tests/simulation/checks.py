"""What must hold of a history. Each check returns what it found wrong, a line a violation that begins with its name.

They are called I1 to I8 as in `tests/support/invariants.py`, which checks the same of real servers:

* I1 Every decision that a caller heard has exactly one row, and no row is there twice. A row counts as replied exactly
  if its bytes were handed to the transport; but of a process that was killed the last ones may say `killed`,
  `unsent` where its caller had not read for seconds, or `repeated` where a repeat heard what the first call had not.
  `unsent` also stands where the process stood still from the moment of handing over until the deadline.
* I2 Reply and row agree. Every chain verifies, in the journals and in the database.
* I3 No reply comes after its caller's deadline, and no ledger says that it used more than it was allowed.
* I4 Nobody trades on an unusable score, on stale features whoever brought them, or without a durable row.
* I5 At most two attempts a decision, on different replicas.
* I6 Breakers make legal transitions only.
* I7 Once healed, a server holds no more tasks and connections than when it had started.
* I8 See `register.py`.
* key: A key gives one decision while it is remembered, to its own caller and nobody else, also where its server is
  killed and started again. What a repeat hears instead
  of TRADE is noted in the audit, and every later repeat hears it, too.
* pool: See `check_pool`.
* model: See `check_models`.
* bug: Nothing failed unexpectedly.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from feature_cache import features
from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.reply_status import reply_of
from simulation.audit import Audit, Row
from simulation.guest import GUEST, MODEL
from simulation.replica import SECOND

if TYPE_CHECKING:
    from simulation.history import Asked, History, Spell
    from simulation.scene import Scene

_UNAUDITED: Final = {pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_AUDIT_UNAVAILABLE}
_SCORED: Final = (
    pb.SOURCE_PRIMARY,
    pb.SOURCE_SECONDARY,
    pb.SOURCE_EMBEDDED,
    pb.SOURCE_CANARY,
    pb.SOURCE_CACHED_SCORE,
)
_MODELS: Final = (pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY, pb.SOURCE_EMBEDDED, pb.SOURCE_CANARY)
_LEGAL: Final = {("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("half-open", "closed")}
_BOOK_AGE: Final = features.INDEX["book_age_ms"]
_MAX_AGE_SECONDS: Final = 1.0
_TICK_SECONDS: Final = 0.25
"""A vector may be this old when the next one comes."""
_EVENTS_OF_BUGS: Final = {"decision failed", "call failed", "batch failed unexpectedly", "canary not judged"}
_TOLD_SECONDS: Final = 1.0
_REMEMBERED_SECONDS: Final = 9.0
"""A key is remembered for longer than this."""
_MORE_TASKS: Final = 4
_MAY_BE_DEAD: Final = 2
"""Endpoints of the primary's four."""
_PATIENT_SECONDS: Final = 0.2
_PASSED_OVER_SECONDS: Final = 0.1
_RECOVERS_SECONDS: Final = 2.0
"""After this nothing is left of an endpoint's fault, breaker and latencies included."""


def check_decisions(scene: Scene, audit: Audit) -> list[str]:
    """I1 to I5, of every decision."""
    found = list(audit.problems)
    history = scene.history
    handed = {one.decision_id for one in history.handed}
    audited: set[str] = set()
    """Decisions that somebody heard as they were recorded, by id."""
    streamed = {asked.ref for asked in history.asked if asked.kind == "stream"}
    """Orders whose callers may not read. Of all others the edges say how their calls ended."""
    outlived: set[str] = set()
    """Those of `audited` whose server ended after somebody had heard them."""
    in_doubt: set[str] = set()
    """Those of `audited` whose process stood still during the call: it may have found their deadlines passed."""
    unaudited: set[str] = set()
    """Decisions of which somebody was told that they are not recorded."""
    for asked in history.asked:
        if (reply := asked.decision) is None:
            continue
        found += _of_reply(reply, asked.ref, audit)
        if asked.deadline is not None and asked.heard_at is not None and asked.heard_at > asked.deadline + 5e-3:
            found.append(f"I3: {asked.ref} heard {1e3 * (asked.heard_at - asked.deadline):.1f} ms too late")
        if not _UNAUDITED.isdisjoint(reply.reasons):
            unaudited.add(reply.decision_id)
        elif not _is_withdrawn(reply, audit):
            audited.add(reply.decision_id)
            outlived |= {reply.decision_id} if _ended_since(scene, asked) else set()
            if asked.deadline is not None and _stood_still(scene, asked.sent_at, asked.deadline):
                in_doubt.add(reply.decision_id)
    for decision_id, rows in audit.decisions.items():
        if len(rows) > 1:
            found.append(f"I1: {decision_id} has {len(rows)} rows")
        packet = rows[0].packet
        found += _of_packet(packet)
        notes = audit.unconfirmed(decision_id)
        ref = packet.order.order_ref
        by_death = notes and (notes[-1] == "killed" or (decision_id in outlived and _nobody_knows(notes[-1])))
        is_in_doubt = notes and notes[-1] == "unsent" and decision_id in in_doubt
        if notes and not (by_death or is_in_doubt) and decision_id in audited:
            found.append(f"I1: {ref} was heard, and its row says it is unconfirmed: {', '.join(notes)}")
        if not notes and decision_id in unaudited - audited:
            found.append(f"I2: {ref} was told that it is not audited, and its row says it was replied")
        if not notes and decision_id not in handed:
            found.append(f"I1: {ref} was never handed to the transport, and its row says it was replied")
        if notes and notes[-1] == "unsent" and not is_in_doubt and ref not in streamed:
            found.append(f"I1: {ref} ended, and its row says no more than that nobody took the reply")
    return found


def _nobody_knows(cause: str) -> bool:
    """Whether the audit says with this cause that the caller may have heard the decision."""
    return reply_of(packet_pb2.ReplyUnconfirmed(cause=cause)).heard_action == audit_pb2.HEARD_ACTION_UNKNOWN


def _ended_since(scene: Scene, asked: Asked) -> bool:
    """Whether the process that answered has ended by now: it may not have noted what its caller heard."""
    return any(life.began <= asked.sent_at <= life.ended < math.inf for life in scene.history.lives[asked.server])


def _is_withdrawn(reply: pb.Decision, audit: Audit) -> bool:
    """Whether it is what a repeat heard in place of the decision."""
    return (reply.action, tuple(reply.reasons)) in audit.withdrawn[reply.decision_id]


def _of_reply(reply: pb.Decision, ref: str, audit: Audit) -> list[str]:
    rows = audit.decisions.get(reply.decision_id, [])
    if not _UNAUDITED.isdisjoint(reply.reasons):
        return [f"I4: {ref} is not durable and trades"] if reply.action != pb.ACTION_ABSTAIN else []
    if not rows:
        return [f"I1: {ref} was heard and has no row"]
    decided = rows[0].packet.decision
    if _is_withdrawn(reply, audit):
        return [f"I2: {ref} heard TRADE where a decision was withdrawn"] if reply.action == pb.ACTION_TRADE else []
    found = [
        f"I2: {ref} heard {name} {getattr(reply, name)}, its row has {getattr(decided, name)}"
        for name in ("action", "score", "source", "model_version")
        if getattr(reply, name) != getattr(decided, name)
    ]
    if reply.budget.used_us > reply.budget.allowed_us:
        found.append(f"I3: {ref} used {reply.budget.used_us} of {reply.budget.allowed_us} µs")
    return found


def _of_packet(packet: object) -> list[str]:
    """I4 and I5 of one row."""
    decision, order, found = packet.decision, packet.order, []  # type: ignore[attr-defined]
    ref = order.order_ref
    if decision.source in _SCORED and not (decision.HasField("score") and 0.0 <= decision.score <= 1.0):
        found.append(f"I4: {ref} rests on score {decision.score if decision.HasField('score') else 'nan'}")
    if decision.action == pb.ACTION_TRADE:
        if decision.source == pb.SOURCE_NONE:
            found.append(f"I4: {ref} trades on nobody's word")
        if decision.source in _SCORED and not decision.threshold <= decision.score:
            found.append(f"I4: {ref} trades on score {decision.score} and threshold {decision.threshold}")
        if order.HasField("features"):
            age = order.features.values[_BOOK_AGE]
            if not age <= 1e3 * _MAX_AGE_SECONDS:
                found.append(f"I4: {ref} trades on its caller's features of a book {age:.0f} ms old")
    attempts = [attempt.replica for attempt in packet.attempts]  # type: ignore[attr-defined]
    if len(attempts) > 2 or len(set(attempts)) < len(attempts):
        found.append(f"I5: {ref} had attempts on {attempts}")
    succeeded = any(attempt.outcome == "success" for attempt in packet.attempts)  # type: ignore[attr-defined]
    if decision.source in _MODELS and not succeeded:
        found.append(f"I5: {ref} has a model's answer without an attempt that succeeded")
    return found


def check_freshness(scene: Scene) -> list[str]:
    """I4: nobody trades on the market as it was more than a second ago, as far as the worker knew.

    That the worker knows no book's age any more is known with its next vector. Where a server does not hear of that, or
    refuses the vector because its own clock is wrong, the one before holds for its second.
    """
    found = []
    history = scene.history
    for what, since, until in scene.market.bad:
        for asked in history.asked:
            decision = asked.decision
            if decision is None or decision.action != pb.ACTION_TRADE or asked.order.HasField("features"):
                continue
            assert asked.heard_at is not None
            hears = asked.sent_at < history.clock_wrong_since.get(asked.server, math.inf) and not history.was_apart(
                asked.server, since, asked.sent_at
            )
            at_once = hears and what == "nan_since"
            patience = _TICK_SECONDS if at_once else _MAX_AGE_SECONDS + _TICK_SECONDS
            if asked.sent_at > since + patience and asked.heard_at < until:
                found.append(f"I4: {asked.ref} trades {asked.sent_at - since:.2f} s after {_BAD[what]}")
    return found


_BAD: Final = {
    "stopped_at": "the last vector",
    "book_died_at": "the book died, while trades went on",
    "nan_since": "the worker has known no book's age",
}


def check_keys(scene: Scene) -> list[str]:
    """Keys, of servers that were not started anew."""
    found = []
    decided: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    first: dict[tuple[str, str, str], bytes] = {}
    safest: dict[tuple[tuple[str, str, str], str], float] = {}
    for asked in scene.history.asked:
        key = asked.order.idempotency_key
        if not key or len(scene.history.lives[asked.server]) != 1:
            continue
        content = asked.order.SerializeToString(deterministic=True)
        mine = (asked.server, asked.caller, key)
        is_first = first.setdefault(mine, content) == content
        if asked.error in ("IDEMPOTENCY_KEY_REUSED", "ALREADY_EXISTS") and is_first:
            found.append(f"key: {asked.ref} was refused for a key that its caller used for nothing else")
        if asked.decision is not None and asked.decision.order_ref != asked.order.order_ref:
            found.append(f"key: {asked.ref} heard the decision of {asked.decision.order_ref}")
        if asked.decision is not None and is_first:
            decided[mine].add(asked.decision.decision_id)
            found += _less_safe(asked, mine, safest)
    found += [
        f"key: {caller}'s key {key} gave {len(ids)} decisions"
        for (_, caller, key), ids in decided.items()
        if len(ids) > 1
    ]
    return found


def check_killed_keys(scene: Scene, audit: Audit) -> list[str]:
    """Keys whose orders a killed process had decided: the process after it decides none of them again."""
    if scene.history.clock_wrong_since:
        return []  # how long a key is remembered, and in which order rows were made, is told by the wall clock
    decided: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row, *_ in audit.decisions.values():
        order = row.packet.order
        if order.idempotency_key:
            decided[row.journal_id, order.order_ref, order.idempotency_key].append(row)
    found = []
    for (_, ref, key), rows in decided.items():
        rows.sort(key=_decided_at)
        for first, second in pairwise(rows):
            was_left = "killed" in audit.notes.get(first.packet.decision.decision_id, ())
            if was_left and _follows(first, second) and _decided_at(second) - _decided_at(first) < _REMEMBERED_SECONDS:
                found.append(f"key: {ref}'s key {key} was decided by a killed process, and again by the next one")
    return found


def _decided_at(row: Row) -> float:
    """When a decision was made, in seconds."""
    return row.packet.decision.decided_at.ToNanoseconds() / 1e9


def _follows(first: Row, second: Row) -> bool:
    """Whether the second row is of the server process that was started next: `a.2` after `a.1`."""
    before, after = (row.packet.instance_id.partition("-")[0].rpartition(".") for row in (first, second))
    return before[0] == after[0] and int(before[2]) + 1 == int(after[2])


def _less_safe(
    asked: Asked, mine: tuple[str, str, str], safest: dict[tuple[tuple[str, str, str], str], float]
) -> list[str]:
    """What a call heard that was asked after another one with its key had heard something safer."""
    assert asked.decision is not None
    assert asked.heard_at is not None
    decision = mine, asked.decision.decision_id
    if asked.decision.action != pb.ACTION_TRADE:
        safest[decision] = min(asked.heard_at, safest.get(decision, math.inf))
    elif asked.sent_at > safest.get(decision, math.inf):
        return [f"key: {asked.ref} trades, and a call before it with this key heard something safer"]
    return []


def check_breakers(scene: Scene) -> list[str]:
    """I6, from what the servers log."""
    found = []
    state: dict[tuple[str, str], str] = {}
    for _, process, line in scene.log:
        if line.get("event") != "breaker":
            continue
        which = (process, line["replica"])
        move = (line["previous"], line["state"])
        if move not in _LEGAL:
            found.append(f"I6: {which[1]} of {process} went from {move[0]} to {move[1]}")
        if move[0] != (was := state.get(which, "closed")):
            found.append(f"I6: {which[1]} of {process} was {was} and left {move[0]}")
        state[which] = move[1]
    return found


def check_pool(scene: Scene, audit: Audit) -> list[str]:
    """What several endpoints of one role promise, as long as two of four are sound and the event loop runs.

    Two may be dead and each order with a fifth of a second is answered, by a model, unless the retry budget is spent.
    An endpoint that becomes slow is passed over within 100 ms of the first order that found it so.
    """
    history, found = scene.history, []
    for number, spell in history.down:
        if len({which for which, _ in _at_once(spell, history)}) > _MAY_BE_DEAD or _stalled(history, spell):
            continue
        for asked in history.asked:
            if not spell.began <= asked.sent_at <= spell.ended or asked.kind != "unary":
                continue
            if asked.order.idempotency_key:  # decided for another call, which may have had less time
                continue
            patient = asked.deadline is None or asked.deadline - asked.sent_at >= _PATIENT_SECONDS
            if patient and asked.error and asked.error not in {"CANCELLED", "ABORTED"}:
                found.append(f"pool: {asked.ref} got {asked.error} while primary-{number + 1} was dead")
            if patient and (decision := asked.decision) is not None and not _by_a_model(decision):
                found.append(f"pool: {asked.ref} was answered by {pb.Source.Name(decision.source)}")
    sent = {asked.ref: asked.sent_at for asked in reversed(history.asked)}
    for number, spell in history.slow:
        if len({which for which, _ in _at_once(spell, history)}) > 1 or _stalled(history, spell):
            continue
        name = f"primary-{number + 1}"
        packets = [rows[0].packet for rows in audit.decisions.values()]
        asked_of = [one for one in packets if name in {attempt.replica for attempt in one.attempts}]
        instants = sorted(sent.get(one.order.order_ref, -math.inf) for one in asked_of)
        within = [instant for instant in instants if spell.began <= instant <= spell.ended]
        late = [instant - within[0] for instant in within if instant > within[0] + _PASSED_OVER_SECONDS]
        found += [f"pool: slow {name} got orders {seconds:.3f} s after the first" for seconds in late]
    return found


def check_models(audit: Audit) -> list[str]:
    """An order is decided by the model that the map chose for it and by no other, on features of that one's set."""
    found = []
    for rows in audit.decisions.values():
        packet = rows[0].packet
        ref, chosen, answer = packet.order.order_ref, packet.chosen_model, packet.decision
        is_second = chosen == MODEL
        others = [one.replica for one in packet.attempts if one.replica.startswith(f"{MODEL}/") != is_second]
        if others:
            found.append(f"model: {ref} of the model {chosen!r} had attempts on {others}")
        if answer.source in _SCORED and (answer.model_version == SECOND) != is_second:
            found.append(f"model: {ref} of the model {chosen!r} was decided by {answer.model_version}")
        wanted = GUEST.version if is_second and answer.source in _MODELS else ""
        if packet.scored_feature_set != wanted:
            found.append(f"model: {ref} of the model {chosen!r} was scored by features of {packet.scored_feature_set}")
    return found


def _at_once(spell: Spell, history: History) -> list[tuple[int, Spell]]:
    """Endpoints that were unwell at some time in this spell or just before it, itself among them."""
    return [
        (which, one)
        for which, one in (*history.down, *history.slow)
        if one.began <= spell.ended and one.ended + _RECOVERS_SECONDS >= spell.began
    ]


def _stalled(history: History, spell: Spell) -> bool:
    return any(one.began <= spell.ended and one.ended >= spell.began - _RECOVERS_SECONDS for one in history.stalled)


def _by_a_model(decision: pb.Decision) -> bool:
    spent = pb.DEGRADATION_RETRY_BUDGET_EXHAUSTED in decision.degradations
    return decision.source in _MODELS or decision.source == pb.SOURCE_NONE or spent


def check_health(scene: Scene) -> list[str]:
    """Whoever reads hears within a second or so that a server whose journal is broken is not serving."""
    found = []
    outages: dict[str, list[tuple[float, float]]] = defaultdict(list)
    began: dict[str, float] = {}
    for at, process, line in scene.log:
        if line.get("event") == "audit_journal_unwritable":
            began[process] = at
        elif line.get("event") == "audit_journal_writable" and process in began:
            outages[process].append((began.pop(process), at))
    for watch in scene.history.watches:
        for process, spells in outages.items():
            if process.partition(".")[0] != watch.server:
                continue
            for since, until in spells:
                told_by = since + _TOLD_SECONDS
                if (
                    told_by >= until
                    or not watch.began_at < since
                    or watch.ended_at < told_by
                    or _stood_still(scene, since - 2.0, told_by)
                ):
                    continue
                heard = [serving for at, serving in watch.heard if at <= told_by]
                if heard and heard[-1]:
                    found.append(
                        f"health: {watch.server} is told to be serving {_TOLD_SECONDS:g} s after its journal broke"
                    )
    return found


def _stood_still(scene: Scene, since: float, until: float) -> bool:
    """Whether a process was stopped or stalled at a moment of this time."""
    return any(
        f" {kind} " in what and since <= at <= until for at, what in scene.history.faults for kind in ("stop", "stall")
    )


def check_tasks(scene: Scene) -> list[str]:
    """I7, of the tasks of every process that still runs."""
    found = []
    for name, server in scene.servers.items():
        process = server.process
        if process is None or process.dead or server.tasks_at_start is None:
            continue
        tasks = len(asyncio.all_tasks(process.loop))
        models = 1 + len(server.settings.models)  # each with probes of its own, and a copy of its set
        if tasks > server.tasks_at_start + _MORE_TASKS * models:
            found.append(f"I7: {name} has {tasks} tasks, and had {server.tasks_at_start} when it had started")
    return found


def check_bugs(scene: Scene) -> list[str]:
    """Nothing failed that must not."""
    found = []
    for server in scene.servers.values():
        found += [f"bug: {failure}" for failure in server.failures]
        if server.process is not None:
            found += [f"bug: {problem}" for problem in server.process.loop.problems]
    found += [
        f"bug: {process}: {line['event']}: {line.get('exception', line.get('exc_info', ''))}"
        for _, process, line in scene.log
        if line.get("event") in _EVENTS_OF_BUGS
    ]
    return found
