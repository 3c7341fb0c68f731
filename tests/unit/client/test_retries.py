"""How our callers try again; the server here is real, on loopback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from pretrade.client.credentials import ClientCredentials
from pretrade.client.retries import retry_delay
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

SECONDS = 10.0


class Refusing:
    """Refuses some calls, then answers.

    Args:
        code: Of a refusal.
        pushback: What it says in its metadata; None for nothing.
        times: How many calls are refused.
    """

    def __init__(self, code: grpc.StatusCode, pushback: str | None, times: int) -> None:
        self._code = code
        self._metadata = () if pushback is None else (("grpc-retry-pushback-ms", pushback),)
        self._times = times
        self.calls = 0

    def decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideResponse:
        self.calls += 1
        if self.calls <= self._times:
            context.set_trailing_metadata(self._metadata)
            context.abort(self._code, "full")
        return pb.DecideResponse()


@contextmanager
def calling(servicer: Refusing, channel_to: Callable[[str], grpc.Channel]) -> Iterator[Callable[[], pb.DecideResponse]]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler: Any = grpc.unary_unary_rpc_method_handler(
        servicer.decide, pb.DecideRequest.FromString, pb.DecideResponse.SerializeToString
    )
    service = "pretrade.decision.v1.DecisionService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Decide": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with channel_to(f"127.0.0.1:{port}") as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            yield lambda: stub.Decide(pb.DecideRequest(), timeout=SECONDS)
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("code", "pushback", "times", "answered"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "1", 3, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "1", 4, False),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "-1", 1, False),
        (grpc.StatusCode.UNAVAILABLE, None, 1, True),
        (grpc.StatusCode.INVALID_ARGUMENT, None, 1, False),
    ],
)
def test_a_call_is_made_again_where_that_may_help(
    code: grpc.StatusCode, pushback: str | None, times: int, answered: bool
) -> None:
    servicer = Refusing(code, pushback, times)
    with calling(servicer, ClientCredentials().channel) as call:
        if answered:
            call()
            assert servicer.calls == times + 1
        else:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is code
            assert servicer.calls == times


@pytest.mark.parametrize(
    ("pushback", "delay"), [("50", 0.05), ("0", 0.0), ("-1", math.inf), ("soon", math.inf), (None, None)]
)
def test_a_caller_without_retries_reads_when_to_ask_again(pushback: str | None, delay: float | None) -> None:
    servicer = Refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, pushback, 1)
    with calling(servicer, grpc.insecure_channel) as call, pytest.raises(grpc.RpcError) as refused:
        call()
    assert retry_delay(refused.value) == delay


def test_a_call_that_was_never_made_says_nothing() -> None:
    assert retry_delay(grpc.RpcError()) is None
