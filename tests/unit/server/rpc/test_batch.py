"""Of a batch the plain orders are decided in columns, whatever else is in it, and each is answered in its place."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.plain_orders import busy_plane
from support.planes import INSTRUMENT, INSTRUMENTS, Plane, packets_in
from support.scripted_replica import answers
from support.twins import compiled_here
from support.waiting import until

from feature_cache.token_bucket import TokenBuckets
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.convert import OrderReader
from server.decision.decided_block import DecidedBlock
from server.decision.reports import DecisionReports, Report, Sink
from server.inference.wire import ScoreBatch
from server.rpc.call import Call
from server.rpc.call_context import CallContexts
from server.rpc.decision import DecisionServicer
from server.rpc.stream import StreamSettings
from server.security.identity import Attempt, Caller, Grants
from server.security.orders import OrderAccess
from server.security.refusals import Refusals

_READ_IN_COLUMNS = pytest.mark.usefixtures("reads_columns")
"""Where nothing is compiled a batch is read order by order, and a few of them are decided one by one."""
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def reads_columns() -> None:
    compiled_here("server.decision.order_wire_c")


def servicer_of(p: Plane, one_in: int = 0, reports: DecisionReports | None = None) -> DecisionServicer:
    explaining: Any = None  # nobody asks for an explanation
    refusals = Refusals(p.journal.append, TokenBuckets(1.0, 1.0, p.clock), "", time.time_ns)
    return DecisionServicer(
        p.dataplane,
        OrderReader(INSTRUMENTS),
        p.metrics,
        StreamSettings(),
        CallContexts(one_in),
        reports or DecisionReports(()),
        explaining,
        p.clock,
        OrderAccess(TokenBuckets(math.inf, 1.0, p.clock), refusals),
    )


def caller(strategies: str | None = None, decisions_per_second: float | None = None) -> Caller:
    grants = Grants(frozenset(), None if strategies is None else re.compile(strategies), decisions_per_second, math.inf)
    return Caller("desk", grants, Attempt("/", "", lambda: "here", lambda: None))


def order(number: int, **changes: Any) -> pb.Order:
    fields: dict[str, Any] = {
        "order_ref": f"o-{number}",
        "instrument": INSTRUMENT,
        "side": pb.SIDE_BUY,
        "quantity": 1.0,
        "strategy": "twap",
    }
    return pb.Order(**(fields | changes))


async def decided(
    p: Plane, servicer: DecisionServicer, orders: list[pb.Order], call: Call | None = None
) -> list[pb.OrderResult]:
    """The results of a batch, whose reply is heard."""
    reader = OrderReader(INSTRUMENTS)
    request = reader.batch(pb.DecideBatchRequest(orders=orders).SerializeToString())
    reply = await servicer.DecideBatch(request, call or Call(p.clock() + 9.0, ()))
    servicer.sent(reply)
    await until(lambda: p.admission.in_flight == p.replies.owed == 0)
    return list(pb.DecideBatchResponse.FromString(reply.wire).results)


@_READ_IN_COLUMNS
async def test_a_batch_whose_reply_cannot_be_written_was_not_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(_: DecidedBlock) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(DecidedBlock, "results", unwritable)
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        with pytest.raises(RuntimeError, match="a bug"):
            await decided(p, servicer_of(p), [order(number) for number in range(20)])
        await until(lambda: p.replies.owed == 0)
        assert p.replies.unconfirmed == {"cancelled": 20}
        assert p.admission.in_flight == 0


def refs(results: list[pb.OrderResult]) -> list[str]:
    return [one.decision.order_ref for one in results]


def in_columns(p: Plane) -> float:
    """Orders that were decided in columns so far."""
    return p.metrics.blocks.buckets()[1]


def _with_timeout(message: pb.Order) -> None:
    message.timeout.FromSeconds(5)


def _with_key(message: pb.Order) -> None:
    message.idempotency_key = message.order_ref


def _wrong(message: pb.Order) -> None:
    message.quantity = -1.0


@_READ_IN_COLUMNS
@pytest.mark.parametrize(("change", "is_decided"), [(_with_timeout, True), (_with_key, True), (_wrong, False)])
@pytest.mark.parametrize("places", [(0,), (3,), (11,), (2, 3, 7), tuple(range(12))])
async def test_an_order_that_is_not_plain_leaves_the_others_in_columns(
    change: Callable[[pb.Order], None], is_decided: bool, places: tuple[int, ...], tmp_path: Path
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = [order(number) for number in range(12)]
        for place in places:
            change(orders[place])
        results = await decided(p, servicer_of(p), orders)
        assert in_columns(p) >= 12 - len(places)
        assert [one.order_ref for one in results] == [f"o-{number}" for number in range(12)]
        for place, one in enumerate(results):
            assert one.HasField("decision") == (is_decided or place not in places)
            if one.HasField("decision"):
                assert one.decision.order_ref == one.order_ref
                assert (one.decision.budget.allowed_us <= 5e6) == (change is _with_timeout and place in places)
        await p.journal.flush()
    assert len(packets_in(tmp_path)) == (12 if is_decided else 12 - len(places))


@_READ_IN_COLUMNS
async def test_a_caller_with_credentials_gets_columns_and_is_held_to_its_strategies_and_its_rate(
    tmp_path: Path,
) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        orders = [order(number, strategy="vwap" if number % 4 == 1 else "twap") for number in range(12)]
        call = Call(p.clock() + 9.0, (), caller("twap", decisions_per_second=8.0))
        results = await decided(p, servicer_of(p), orders, call)
        errors = {one.order_ref: one.error.reason for one in results if one.HasField("error")}
        assert errors == {
            "o-1": "STRATEGY_NOT_ALLOWED",
            "o-5": "STRATEGY_NOT_ALLOWED",
            **{f"o-{number}": "RATE_LIMITED" for number in range(8, 12)},
        }
        assert in_columns(p) == 6


async def test_the_correlation_id_of_a_call_is_on_its_decisions_which_are_decided_in_columns(tmp_path: Path) -> None:
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        call = Call(p.clock() + 9.0, (("x-correlation-id", "basket-7"),))
        await decided(p, servicer_of(p), [order(number) for number in range(12)], call)
        assert in_columns(p) == 12
        await p.journal.flush()
    assert [(one.correlation_id, one.trace_id) for one in packets_in(tmp_path)] == [("basket-7", "")] * 12


async def test_the_trace_of_a_call_goes_with_each_of_its_orders_to_the_model_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[str] = []
    async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
        score = p.primary._score

        async def noted(rows: list[bytes], traceparent: str = "") -> ScoreBatch:
            carried.append(traceparent)
            return await score(rows, traceparent)

        monkeypatch.setattr(p.primary.batcher, "_send", noted)
        call = Call(p.clock() + 9.0, (("traceparent", f"00-{TRACE}-{SPAN}-00"),))
        await decided(p, servicer_of(p), [order(number) for number in range(3)], call)
        await p.journal.flush()
        assert p.metrics.alone["trace"] == 3
    assert [one.trace_id for one in packets_in(tmp_path)] == [TRACE] * 3
    assert all(one.startswith(f"00-{TRACE}-") for one in carried)
    assert carried


async def test_where_calls_are_traced_only_the_chosen_orders_are_decided_alone(tmp_path: Path) -> None:
    told: list[Report] = []
    with Sink("traces", told.append, one_in=0, slow_seconds=9.0, follows_traces=True, max_per_second=1e6) as sink:
        reports = DecisionReports((sink,), traces=True)
        async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
            p.dataplane._following._reports = reports
            results = await decided(p, servicer_of(p, 8, reports), [order(number) for number in range(20)])
            assert (in_columns(p), p.metrics.alone["trace"]) == (18, 2)
            await p.journal.flush()
    assert refs(results) == [f"o-{number}" for number in range(20)]
    traced = {one.order.order_ref: one for one in packets_in(tmp_path) if one.trace_id}
    assert set(traced) == {"o-7", "o-15"}
    assert {one.order.order_ref: (one.cause, one.context.trace_id) for one in told} == {
        ref: ("sample", packet.trace_id) for ref, packet in traced.items()
    }


@_READ_IN_COLUMNS
async def test_what_is_slow_is_told_of_in_the_trace_that_has_its_decisions_id(tmp_path: Path) -> None:
    told: list[Report] = []
    with Sink("traces", told.append, one_in=0, slow_seconds=1e-9, follows_traces=True, max_per_second=1e6) as sink:
        async with busy_plane(tmp_path, answers(0.75), answers(0.75)) as p:
            p.dataplane._following._reports = DecisionReports((sink,), traces=True)
            results = await decided(p, servicer_of(p), [order(number) for number in range(4)])
            assert in_columns(p) == 4
    assert {one.cause for one in told} == {"slow"}
    found = {one.context.trace_id for one in told}
    assert found == {one.decision.decision_id.replace("-", "") for one in results}
