"""The checker of the fault tests finds each violation that is planted, and nothing in what is sound."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from support.invariants import Evidence, Steered, Usage, stalls
from support.open_loop import LEFT, NO_RESULT, Call

from feature_cache import features
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.reply_status import REPLIED, unconfirmed_status

SENT = 1_000.0
DEADLINE = 0.1
DECIDED = SENT + 0.01
"""Of the order `one`."""
CANCELLED = unconfirmed_status("cancelled")
UNSENT = unconfirmed_status("unsent")


def decision(**changes: Any) -> pb.Decision:
    made = pb.Decision(
        decision_id="d-one",
        order_ref="one",
        action=pb.ACTION_TRADE,
        score=0.9,
        threshold=0.5,
        source=pb.SOURCE_PRIMARY,
        reasons=[pb.REASON_CODE_SCORE_AT_OR_ABOVE_THRESHOLD],
        model_version="v",
    )
    made.budget.allowed_us = round(1e6 * DEADLINE)
    made.budget.used_us = 10_000
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def packet(made: pb.Decision | None = None, **changes: Any) -> packet_pb2.DecisionPacket:
    found = packet_pb2.DecisionPacket(
        order=pb.Order(order_ref="one"),
        decision=decision() if made is None else made,
        arrived_monotonic_ns=round(1e9 * (SENT + 0.001)),
        decided_monotonic_ns=round(1e9 * DECIDED),
        attempts=[packet_pb2.Attempt(replica="primary", outcome="success", used_us=5_000)],
    )
    found.features.age_seconds = 0.1
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def heard(made: pb.Decision | None = None, **changes: Any) -> Call:
    """An order that was answered in time."""
    reply = decision() if made is None else made
    return dataclasses.replace(Call("one", SENT, SENT, SENT + 0.02, "OK", reply, DEADLINE), **changes)


def unheard(status: str, **changes: Any) -> Call:
    """An order that heard no decision, when its deadline had passed."""
    return dataclasses.replace(Call("one", SENT, SENT, SENT + DEADLINE, status, None, DEADLINE), **changes)


def found(*calls: Call, rows: list[tuple[packet_pb2.DecisionPacket, str]], **changes: Any) -> list[str]:
    return Evidence(calls, rows, **changes).violations()


def test_what_is_sound_has_no_violation() -> None:
    assert not found(heard(), rows=[(packet(), REPLIED)])
    assert not found(unheard("RESOURCE_EXHAUSTED"), rows=[])
    assert not found(unheard("DEADLINE_EXCEEDED"), rows=[(packet(), CANCELLED)])
    assert not found(unheard(""), rows=[])


# --- I1


def test_an_answer_without_a_row_is_found() -> None:
    assert found(heard(), rows=[]) == ["I1: one was answered and has no row"]


def test_a_second_row_is_found() -> None:
    assert found(heard(), rows=[(packet(), REPLIED)] * 2) == ["I1: one has 2 rows"]


def test_a_refused_order_with_a_row_is_found() -> None:
    (one,) = found(unheard("RESOURCE_EXHAUSTED"), rows=[(packet(), CANCELLED)])
    assert one == "I1: one was refused with RESOURCE_EXHAUSTED and has a row"


def test_an_answer_whose_row_says_unconfirmed_is_found() -> None:
    assert found(heard(), rows=[(packet(), CANCELLED)]) == [f"I1: one was answered and its row says {CANCELLED}"]


def test_of_few_answers_alone_the_audit_need_not_know_whether_they_were_sent() -> None:
    (one,) = found(heard(), rows=[(packet(), UNSENT)])
    assert one == f"I1: 1 of 1 were answered and their rows say {UNSENT}: ['one']"
    refs = [f"{number}" for number in range(40)]
    calls = [heard(decision(order_ref=ref), order_ref=ref) for ref in refs]
    rows = [(packet(call.decision), REPLIED) for call in calls]
    for packed, _ in rows:
        packed.order.order_ref = packed.decision.order_ref
    assert not found(
        *calls, rows=[(packed, UNSENT if place < 2 else REPLIED) for place, (packed, _) in enumerate(rows)]
    )
    assert found(*calls, rows=[(packed, UNSENT if place < 3 else REPLIED) for place, (packed, _) in enumerate(rows)])


def test_an_order_that_its_batch_or_stream_left_out_is_found() -> None:
    assert found(unheard(NO_RESULT), rows=[]) == ["I1: one got no result"]


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", LEFT, ""])
@pytest.mark.parametrize("own_timer", [True, False])
def test_a_row_of_an_unheard_reply_that_says_replied_is_found(status: str, own_timer: bool) -> None:
    (one,) = found(unheard(status, own_timer=own_timer), rows=[(packet(), REPLIED)])
    assert one.startswith("I1: one heard")


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", LEFT, ""])
def test_a_row_of_an_unheard_reply_that_says_unconfirmed_is_sound(status: str) -> None:
    assert not found(unheard(status), rows=[(packet(), CANCELLED)])


@pytest.mark.parametrize("before_seconds", [0.0, 0.009, -0.009])
def test_a_reply_may_have_crossed_its_callers_giving_up(before_seconds: float) -> None:
    row = packet(decided_monotonic_ns=round(1e9 * (SENT + DEADLINE - before_seconds)))
    assert not found(unheard("DEADLINE_EXCEEDED", own_timer=True), rows=[(row, REPLIED)])
    assert not found(unheard(LEFT), rows=[(row, REPLIED)])


@pytest.mark.parametrize("before_seconds", [0.011, -0.011])
def test_the_window_for_crossing_is_a_tenth_of_the_deadline(before_seconds: float) -> None:
    row = packet(decided_monotonic_ns=round(1e9 * (SENT + DEADLINE - before_seconds)))
    assert found(unheard("DEADLINE_EXCEEDED", own_timer=True), rows=[(row, REPLIED)])
    assert found(unheard(LEFT), rows=[(row, REPLIED)])


@pytest.mark.parametrize("status", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"])
def test_nothing_crosses_a_caller_that_does_not_give_up(status: str) -> None:
    row = packet(decided_monotonic_ns=round(1e9 * (SENT + DEADLINE)))
    assert found(unheard(status), rows=[(row, REPLIED)]), "the server said it"


# --- I2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decision_id", "d-two"),
        ("action", pb.ACTION_NO_TRADE),
        ("score", 0.91),
        ("threshold", 0.6),
        ("source", pb.SOURCE_SECONDARY),
        ("model_version", "w"),
    ],
)
def test_a_reply_that_differs_from_its_row_is_found(name: str, value: object) -> None:
    (one,) = found(heard(decision(**{name: value})), rows=[(packet(), REPLIED)])
    assert one.startswith(f"I2: one heard {name} {value}")


def test_reasons_that_differ_are_found() -> None:
    reply = decision()
    reply.reasons.append(pb.REASON_CODE_TRADING_HALTED)
    (one,) = found(heard(reply), rows=[(packet(), REPLIED)])
    assert one.startswith("I2: one heard reasons")


def test_somebody_elses_decision_is_found() -> None:
    assert "I2: one heard the decision of two" in found(heard(decision(order_ref="two")), rows=[(packet(), REPLIED)])


def test_what_the_audit_adds_to_the_budget_is_no_difference() -> None:
    reply = decision()
    reply.budget.used_us += 1_000
    assert not found(heard(reply), rows=[(packet(), REPLIED)])


def unaudited(action: pb.Action.ValueType) -> Call:
    return heard(pb.Decision(order_ref="one", action=action, reasons=[pb.REASON_CODE_AUDIT_LATE]))


def test_a_caller_that_was_told_of_no_audit_has_no_row_that_says_replied() -> None:
    assert not found(unaudited(pb.ACTION_ABSTAIN), rows=[])
    assert not found(unaudited(pb.ACTION_ABSTAIN), rows=[(packet(), unconfirmed_status("audit_late"))])
    (one,) = found(unaudited(pb.ACTION_ABSTAIN), rows=[(packet(), REPLIED)])
    assert one == "I2: one was told that it is not audited, and its row says it was replied"


# --- I3


def test_a_late_answer_is_found() -> None:
    late = heard(ended=SENT + DEADLINE + 0.016)
    assert Evidence([late]).late() == ["I3: one was answered after 116.0 ms"]
    assert not Evidence([heard(ended=SENT + DEADLINE + 0.014)]).late()


def test_a_caller_that_could_not_listen_is_no_late_answer() -> None:
    late = heard(ended=SENT + DEADLINE + 0.03)
    other = Call("two", SENT + 0.1, SENT + 0.12, SENT + 0.13, "RESOURCE_EXHAUSTED", None, DEADLINE)
    assert stalls([late, other])["one"] == pytest.approx(0.02)
    assert not Evidence([late, other]).late()


def test_more_time_used_than_was_allowed_is_found() -> None:
    reply = decision()
    reply.budget.used_us = reply.budget.allowed_us + 1
    assert found(heard(reply), rows=[(packet(), REPLIED)]) == ["I3: one used 100001 of 100000 µs"]


# --- I4


@pytest.mark.parametrize(
    "plant",
    [
        {"score": 1.0000001},
        {"score": -0.1},
        {"score": math.nan},
        {"score": 0.4},
        {"source": pb.SOURCE_NONE},
    ],
)
def test_a_trade_on_what_is_no_score_is_found(plant: dict[str, Any]) -> None:
    (one,) = found(rows=[(packet(decision(**plant)), REPLIED)])
    assert one.startswith("I4: one trades on")


@pytest.mark.parametrize("source", [pb.SOURCE_PRIMARY, pb.SOURCE_CANARY, pb.SOURCE_CACHED_SCORE])
def test_a_trade_without_a_score_is_found(source: pb.Source.ValueType) -> None:
    made = decision(source=source)
    made.ClearField("score")
    assert [one for one in found(rows=[(packet(made), REPLIED)]) if one.startswith("I4")]


@pytest.mark.parametrize(
    "degradation",
    [pb.DEGRADATION_FEATURES_MISSING, pb.DEGRADATION_FEATURES_STALE, pb.DEGRADATION_BOOK_UNKNOWN],
)
def test_a_trade_on_unusable_features_is_found(degradation: pb.Degradation.ValueType) -> None:
    made = decision()
    made.degradations.append(degradation)
    assert found(rows=[(packet(made), REPLIED)]) == ["I4: one trades on unusable features"]


@pytest.mark.parametrize(("age_seconds", "book_age_ms"), [(1.1, 0.0), (0.1, 1_000.0), (math.nan, 0.0), (0.1, math.nan)])
def test_a_trade_on_features_of_no_known_or_too_great_an_age_is_found(age_seconds: float, book_age_ms: float) -> None:
    row = packet()
    row.features.age_seconds, row.features.book_age_ms = age_seconds, book_age_ms
    (one,) = found(rows=[(row, REPLIED)])
    assert one.startswith("I4: one trades on features")


@pytest.mark.parametrize("book_age_ms", [1_001.0, 3_600_000.0, math.nan])
def test_a_trade_on_features_that_its_caller_brought_too_late_is_found(book_age_ms: float) -> None:
    values = [0.0] * features.N_FEATURES
    row = packet()
    row.order.features.values.extend(values)
    assert found(heard(), rows=[(row, REPLIED)]) == []
    row.order.features.values[features.INDEX["book_age_ms"]] = book_age_ms
    (one,) = found(heard(), rows=[(row, REPLIED)])
    assert one.startswith("I4: one trades on features")


def test_a_trade_that_was_not_durable_is_found() -> None:
    assert "I4: one was not durable and is ACTION_TRADE" in found(unaudited(pb.ACTION_TRADE), rows=[])


# --- I5


def attempts(*made: tuple[str, str, int]) -> packet_pb2.DecisionPacket:
    row = packet()
    del row.attempts[:]
    row.attempts.extend(
        packet_pb2.Attempt(replica=replica, outcome=outcome, used_us=used) for replica, outcome, used in made
    )
    return row


@pytest.mark.parametrize(
    ("row", "violation"),
    [
        (
            attempts(("primary", "timeout", 1), ("secondary", "timeout", 1), ("canary", "success", 1)),
            "I5: one had attempts on ['primary', 'secondary', 'canary']",
        ),
        (
            attempts(("primary", "timeout", 1), ("primary", "success", 1)),
            "I5: one had attempts on ['primary', 'primary']",
        ),
        (attempts(("primary", "success", 100_001)), "I5: one had attempts beyond its time"),
        (attempts(("primary", "timeout", 1)), "I5: one has a model's answer without an attempt that succeeded"),
    ],
)
def test_attempts_that_are_too_many_too_late_or_none_are_found(row: packet_pb2.DecisionPacket, violation: str) -> None:
    assert found(rows=[(row, REPLIED)]) == [violation]


# --- I6


def moves(*made: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"event": "breaker", "replica": "primary", "previous": was, "state": now} for was, now in made]


def test_legal_moves_of_a_breaker_are_no_violation() -> None:
    log = moves(("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("open", "half-open"))
    assert not found(rows=[], log=[*log, *moves(("half-open", "closed"))])
    assert not found(rows=[], log=[*log, {"event": "started"}, *moves(("closed", "open"))]), "another process"


@pytest.mark.parametrize(
    "log", [moves(("closed", "half-open")), moves(("open", "half-open")), moves(("closed", "open"), ("closed", "open"))]
)
def test_a_move_that_a_breaker_may_not_make_is_found(log: list[dict[str, Any]]) -> None:
    (one,) = found(rows=[], log=log)
    assert one.startswith("I6: primary")


# --- I7

MEBIBYTE = 1024 * 1024


@pytest.mark.parametrize(
    ("after", "grown"),
    [
        (Usage(148 * MEBIBYTE, 14, 24), ""),
        (Usage(149 * MEBIBYTE, 14, 24), "memory_bytes"),
        (Usage(148 * MEBIBYTE, 15, 24), "files"),
        (Usage(148 * MEBIBYTE, 14, 25), "tasks"),
        (Usage(0, 0, 0), ""),
    ],
)
def test_what_a_server_keeps_beyond_what_is_normal_is_found(after: Usage, grown: str) -> None:
    assert after.grew_from(Usage(100 * MEBIBYTE, 10, 20)).partition(" ")[0] == grown


# --- I8


HALTED = Steered("HALTED", SENT - 2.0, SENT - 1.0, "halt")
REDUCING = Steered("REDUCING", SENT - 2.0, SENT - 1.0, "reduce")
ACTIVE = Steered("ACTIVE", SENT - 0.5, SENT - 0.4, "resume")
RESUMED = packet_pb2.ControlChange(change_id="resume", subject="trading_state", previous="HALTED", value="ACTIVE")


def test_a_trade_after_an_acknowledged_halt_is_found_in_the_reply_and_in_the_audit() -> None:
    assert found(heard(), rows=[(packet(), REPLIED)], steered=[HALTED]) == [
        "I8: one heard TRADE after HALTED was acknowledged",
        "I8: one has TRADE after HALTED was acknowledged",
    ]


def test_a_trade_that_nobody_heard_is_no_trade_after_a_halt() -> None:
    assert not found(unheard("UNAVAILABLE"), rows=[(packet(), CANCELLED)], steered=[HALTED])


def test_a_repeat_of_an_older_trade_is_found() -> None:
    older = packet(arrived_monotonic_ns=round(1e9 * (SENT - 5)), decided_monotonic_ns=round(1e9 * (SENT - 5)))
    assert found(heard(), rows=[(older, REPLIED)], steered=[HALTED]) == [
        "I8: one heard TRADE after HALTED was acknowledged"
    ]


def test_a_trade_is_sound_before_the_halt_is_acknowledged_and_after_its_relaxation_was_asked_for() -> None:
    rows = [(packet(), REPLIED)]
    assert not found(heard(), rows=rows, steered=[dataclasses.replace(HALTED, acknowledged=SENT + 0.001)])
    assert not found(heard(), rows=rows, steered=[dataclasses.replace(HALTED, acknowledged=math.nan)])
    assert not found(heard(), rows=rows, steered=[HALTED, ACTIVE], changes=[RESUMED])


@pytest.mark.parametrize(
    ("relaxation", "audited"),
    [
        (dataclasses.replace(ACTIVE, acknowledged=math.nan), [RESUMED]),
        (ACTIVE, []),
        (ACTIVE, [packet_pb2.ControlChange(change_id="resume", subject="flag/shadow", value="ACTIVE")]),
        (dataclasses.replace(ACTIVE, sent=SENT - 3.0), [RESUMED]),
        (dataclasses.replace(ACTIVE, sent=SENT + 1.0, acknowledged=SENT + 1.1), [RESUMED]),
        (dataclasses.replace(ACTIVE, state="HALTED"), [RESUMED]),
    ],
    ids=["not acknowledged", "not audited", "of a flag", "before the halt", "after the order", "no relaxation"],
)
def test_only_an_acknowledged_and_audited_relaxation_ends_a_halt(
    relaxation: Steered, audited: list[packet_pb2.ControlChange]
) -> None:
    assert found(heard(), rows=[(packet(), REPLIED)], steered=[HALTED, relaxation], changes=audited)


def test_reducing_lets_only_orders_trade_that_reduce() -> None:
    assert found(heard(), rows=[(packet(), REPLIED)], steered=[REDUCING])
    reducing = packet()
    reducing.order.reduce_only = True
    assert not found(heard(), rows=[(reducing, REPLIED)], steered=[REDUCING])
    assert found(heard(), rows=[(reducing, REPLIED)], steered=[HALTED])
