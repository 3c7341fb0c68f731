"""Which decisions are told of, and what an sink does that is asked for too much or breaks."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fallback.budget import Budget
from fallback.order import CallContext, Order
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.pending import Pending
from server.decision.record import Decided
from server.decision.reports import DecisionReports, Report, Sink
from server.errors import DeadlineError, InvalidOrderError, OverloadedError, PretradeError

DECIDED = cast("Decided", SimpleNamespace(decision_id="d"))
CONTEXT = CallContext("ab" * 16, "cd" * 8, sampled=True)


def case(*degradations: pb.Degradation.ValueType, context: CallContext = CONTEXT) -> Pending:
    order = Order(b"", "A.B", pb.SIDE_BUY, 1.0, 1.0, "s", False, None, context=context)
    nobody: Any = None  # waits
    made = Pending(order, Budget(0.0, 1.0, 0.0), nobody, nobody, has_place=True)
    made.decided = DECIDED
    made.degradations.extend(degradations)
    return made


def sink(
    written: list[Report], one_in: int = 0, slow_seconds: float = 0.01, follows: bool = False, rate: float = 1e6
) -> Sink:
    return Sink(
        "test",
        written.append,
        one_in=one_in,
        slow_seconds=slow_seconds,
        follows_traces=follows,
        max_per_second=rate,
    )


@pytest.mark.parametrize(
    ("degradations", "used", "follows", "cause"),
    [
        ((), 0.005, False, None),
        ((), 0.005, True, "caller"),
        ((), 0.011, True, "slow"),
        ((pb.DEGRADATION_PRIMARY_TIMEOUT,), 0.011, True, "degraded"),
    ],
)
def test_the_gravest_cause_is_named(
    degradations: tuple[pb.Degradation.ValueType, ...], used: float, follows: bool, cause: str | None
) -> None:
    written: list[Report] = []
    with sink(written, follows=follows) as one:
        DecisionReports((one,)).decided((case(*degradations),), used)
    assert [report.cause for report in written] == ([] if cause is None else [cause])


def test_one_in_n_of_the_others_is_told_of_and_0_is_none() -> None:
    written: list[Report] = []
    with sink(written, one_in=4) as some, sink(written, one_in=0) as none:
        reports = DecisionReports((some, none))
        for number in range(12):
            reports.decided((case(),), number * 1e-6)
    assert len(written) == 3
    assert (some.chosen["sample"], none.chosen.total()) == (3, 0)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeadlineError("DEADLINE_EXCEEDED", ""), True),
        (OverloadedError("TOO_MANY_IN_FLIGHT", ""), True),
        (InvalidOrderError("MISSING", ""), False),
    ],
)
def test_a_call_without_a_decision_is_told_of_unless_its_order_was_wrong(error: PretradeError, told: bool) -> None:
    written: list[Report] = []
    error.case = case()
    with sink(written) as one:
        DecisionReports((one,)).failed(pb.Order(order_ref="r"), CONTEXT, error, 1.0, 2.0)
    assert [(report.error, report.case, report.order.order_ref) for report in written] == (
        [(error.reason, error.case, "r")] if told else []
    )


def test_more_than_the_rate_is_lost_and_counted() -> None:
    written: list[Report] = []
    with sink(written, one_in=1, rate=10) as one:
        reports = DecisionReports((one,))
        for _ in range(25):
            reports.decided((case(),), 100.0)
        assert (one.chosen["slow"], one.lost) == (25, 15), "a second's worth may come at once"
        for _ in range(25):
            reports.decided((case(),), 100.5)
        assert one.lost == 15 + 20, "and half of it after half a second"
    assert len(written) == 15


def test_an_sink_that_hangs_fills_its_queue_and_no_more() -> None:
    released = threading.Event()

    def hang(report: Report) -> None:
        released.wait()

    one = Sink("stuck", hang, one_in=1, slow_seconds=1e9, follows_traces=False, max_per_second=1e6)
    with one:
        for number in range(5_000):
            DecisionReports((one,)).decided((case(),), number * 1e-3)
        assert 3_900 <= one.lost <= 4_000
        released.set()


def test_a_report_that_cannot_be_written_ends_no_other() -> None:
    written: list[str] = []

    def write(report: Report) -> None:
        if not written:
            written.append("broken")
            raise RuntimeError("once")
        written.append("whole")

    one = Sink("flaky", write, one_in=1, slow_seconds=1e9, follows_traces=False, max_per_second=1e6)
    with one:
        for number in range(3):
            DecisionReports((one,)).decided((case(),), number * 1e-3)
    assert written == ["broken", "whole", "whole"]
    assert one.lost == 1
