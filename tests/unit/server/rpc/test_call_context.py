"""What a call says of itself: well-formed ids are taken, anything else counts as not sent."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallback.order import NO_CONTEXT, CallContext
from server.rpc.call import Call
from server.rpc.call_context import CallContexts

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_the_callers_trace_and_correlation_id_are_taken() -> None:
    metadata = (("user-agent", "x"), ("traceparent", f"00-{TRACE}-{SPAN}-01"), ("x-correlation-id", "basket-7"))
    assert CallContexts().of(Call(None, metadata)) == CallContext(TRACE, SPAN, True, "basket-7")


def test_headers_as_bytes_say_the_same() -> None:
    headers = [(b":path", b"/x"), (b"traceparent", f"00-{TRACE}-{SPAN}-00".encode()), (b"x-correlation-id", b"b")]
    assert CallContexts().of(Call(None, headers)) == CallContext(TRACE, SPAN, False, "b")


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01\n",
        "x" * 10_000,
    ],
)
def test_a_malformed_trace_is_no_trace(traceparent: str) -> None:
    assert CallContexts().of(Call(None, (("traceparent", traceparent),))) == NO_CONTEXT


def test_a_later_version_of_traceparent_may_say_more() -> None:
    context = CallContexts().of(Call(None, (("traceparent", f"01-{TRACE}-{SPAN}-03-more"),)))
    assert (context.trace_id, context.span_id, context.sampled) == (TRACE, SPAN, True)


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "é", "x" * 65, b"\xff"])
def test_a_correlation_id_that_would_spoil_a_log_is_none(value: str | bytes) -> None:
    assert CallContexts().of(Call(None, (("x-correlation-id", value),))) == NO_CONTEXT


def test_one_order_in_so_many_is_chosen_to_be_traced() -> None:
    contexts, call = CallContexts(one_in=3), Call(None, ())
    found = [contexts.of(call) for _ in range(6)]
    assert [one.is_chosen for one in found] == [False, False, True] * 2
    assert all(one is NO_CONTEXT for one in found if not one.is_chosen)
    assert re.fullmatch("[0-9a-f]{32}", found[2].trace_id)
    assert found[2].trace_id != found[5].trace_id
    assert (found[2].span_id, found[2].sampled) == ("", False)


def test_a_chosen_order_keeps_its_callers_trace() -> None:
    metadata = (("traceparent", f"00-{TRACE}-{SPAN}-00"), ("x-correlation-id", "basket-7"))
    assert CallContexts(one_in=1).of(Call(None, metadata)) == CallContext(TRACE, SPAN, False, "basket-7", True)


@given(st.integers(0, 5), st.lists(st.integers(1, 9), max_size=9))
def test_as_many_orders_of_batches_are_chosen_as_of_single_calls(one_in: int, batches: list[int]) -> None:
    call = Call(None, (("x-correlation-id", "basket-7"),))
    together, alone = CallContexts(one_in), CallContexts(one_in)
    for orders in batches:
        most, chosen = together.of_some(call, orders)
        assert most == CallContext(correlation_id="basket-7")
        each = [alone.of(call) for _ in range(orders)]
        assert sorted(chosen) == [place for place, one in enumerate(each) if one.is_chosen]
        assert all(one.is_chosen and one.trace_id and one.correlation_id == "basket-7" for one in chosen.values())


@given(st.integers(0, 5), st.lists(st.integers(0, 9), max_size=9))
def test_as_many_orders_of_bare_calls_are_chosen(one_in: int, bursts: list[int]) -> None:
    together, alone, call = CallContexts(one_in), CallContexts(one_in), Call(None, ())
    for orders in bursts:
        chosen = together.of_bare(orders)
        each = [alone.of(call) for _ in range(orders)]
        assert sorted(chosen) == [place for place, one in enumerate(each) if one.is_chosen]
        assert all(one.is_chosen and one.trace_id and not one.correlation_id for one in chosen.values())
