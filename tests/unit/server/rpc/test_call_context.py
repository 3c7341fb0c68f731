"""What a call says of itself: well-formed ids are taken, anything else counts as not sent."""

from __future__ import annotations

import re

import pytest

from fallback.order import NO_CONTEXT, CallContext
from server.rpc.call import Call
from server.rpc.call_context import CallContexts

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_the_callers_trace_and_correlation_id_are_taken() -> None:
    metadata = (("user-agent", "x"), ("traceparent", f"00-{TRACE}-{SPAN}-01"), ("x-correlation-id", "basket-7"))
    assert CallContexts(tracing=False).of(Call(None, metadata)) == CallContext(TRACE, SPAN, True, "basket-7")


def test_headers_as_bytes_say_the_same() -> None:
    headers = [(b":path", b"/x"), (b"traceparent", f"00-{TRACE}-{SPAN}-00".encode()), (b"x-correlation-id", b"b")]
    assert CallContexts(tracing=True).of(Call(None, headers)) == CallContext(TRACE, SPAN, False, "b")


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
    assert CallContexts(tracing=False).of(Call(None, (("traceparent", traceparent),))) == NO_CONTEXT


def test_a_later_version_of_traceparent_may_say_more() -> None:
    context = CallContexts(tracing=False).of(Call(None, (("traceparent", f"01-{TRACE}-{SPAN}-03-more"),)))
    assert (context.trace_id, context.span_id, context.sampled) == (TRACE, SPAN, True)


@pytest.mark.parametrize("value", ["", "a b", "a\nb", "é", "x" * 65, b"\xff"])
def test_a_correlation_id_that_would_spoil_a_log_is_none(value: str | bytes) -> None:
    assert CallContexts(tracing=False).of(Call(None, (("x-correlation-id", value),))) == NO_CONTEXT


def test_a_trace_begins_here_when_nobody_sent_one_and_spans_are_made() -> None:
    contexts = CallContexts(tracing=True)
    call = Call(None, ())
    first, second = contexts.of(call), contexts.of(call)
    assert re.fullmatch("[0-9a-f]{32}", first.trace_id)
    assert first.trace_id != second.trace_id
    assert (first.span_id, first.sampled) == ("", False)
    assert CallContexts(tracing=False).of(Call(None, None)) is NO_CONTEXT
