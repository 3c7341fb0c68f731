"""What a caller gets for every status of gRPC, in each of the ways to ask; the server is real, on loopback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import grpc
import pytest
from support.askers import ORDER, ROOMY_SECONDS, SHARED, WAYS, asking

from pretrade.client import errors
from pretrade.client.testing import FakeServer

CODES: Final = grpc.StatusCode
EXPECTED: Final = {
    CODES.CANCELLED: errors.UnavailableError,
    CODES.UNKNOWN: errors.ServerError,
    CODES.INVALID_ARGUMENT: errors.InvalidOrderError,
    CODES.DEADLINE_EXCEEDED: errors.DeadlineError,
    CODES.NOT_FOUND: errors.WrongServerError,
    CODES.ALREADY_EXISTS: errors.KeyReusedError,
    CODES.PERMISSION_DENIED: errors.PermissionDeniedError,
    CODES.RESOURCE_EXHAUSTED: errors.OverloadedError,
    CODES.FAILED_PRECONDITION: errors.ServerError,
    CODES.ABORTED: errors.ServerError,
    CODES.OUT_OF_RANGE: errors.ServerError,
    CODES.UNIMPLEMENTED: errors.WrongServerError,
    CODES.INTERNAL: errors.ServerError,
    CODES.UNAVAILABLE: errors.UnavailableError,
    CODES.DATA_LOSS: errors.ServerError,
    CODES.UNAUTHENTICATED: errors.UnauthenticatedError,
}
ASKED_AGAIN: Final = (CODES.CANCELLED, CODES.UNAVAILABLE)
ALWAYS: Final = 1_000


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def test_every_status_of_grpc_is_expected() -> None:
    assert set(EXPECTED) == set(CODES) - {CODES.OK}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", EXPECTED)
def test_every_status_has_its_exception(server: FakeServer, code: grpc.StatusCode, way: str) -> None:
    server.fail(code, "too bad.", reason="SOME_REASON", field="quantity", times=ALWAYS)
    # One that is asked again ends with the deadline.
    seconds = 0.2 if code in ASKED_AGAIN else ROOMY_SECONDS
    with asking(way, server.address, deadline_seconds=seconds) as ask, pytest.raises(errors.CallError) as raised:
        ask(ORDER)
    error = raised.value
    if way in SHARED and code in ASKED_AGAIN and type(error) is errors.DeadlineError:
        return  # on a busy machine the caller's deadline passed before the call that it shared had failed
    assert type(error) is EXPECTED[code]
    assert (error.code, error.reason, error.field) == (code, "SOME_REASON", "quantity")
    assert isinstance(error.__cause__, grpc.RpcError)
    assert f"{server.address} answered {code.name} (SOME_REASON): too bad." in str(error)
    asked = len(server.metadata)
    assert asked > 1 if code in ASKED_AGAIN else asked == 1


@pytest.mark.parametrize("way", WAYS)
def test_an_order_that_breaks_a_rule_says_which(server: FakeServer, way: str) -> None:
    with asking(way, server.address) as ask, pytest.raises(errors.InvalidOrderError) as raised:
        ask(ORDER.__replace__(quantity=0.0) if hasattr(ORDER, "__replace__") else type(ORDER)("A.B", "buy", 0.0, "s"))
    assert (raised.value.field, raised.value.reason) == ("quantity", "INVALID_QUANTITY")
    assert "must be finite and > 0" in str(raised.value)


@pytest.mark.parametrize(("given", "said"), [(60.0, 60.0), (math.inf, None), (None, None)])
def test_a_refusal_says_when_to_ask_again_unless_never(
    server: FakeServer, given: float | None, said: float | None
) -> None:
    server.fail(CODES.RESOURCE_EXHAUSTED, retry_delay_seconds=given)
    with asking("calls of threads", server.address) as ask, pytest.raises(errors.OverloadedError) as raised:
        ask(ORDER)
    assert raised.value.retry_delay_seconds == said
    assert len(server.metadata) == 1


def test_what_transport_and_details_do_not_say_is_left_open(server: FakeServer) -> None:
    server.fail(CODES.INTERNAL, "")
    with asking("calls of threads", server.address) as ask, pytest.raises(errors.ServerError) as raised:
        ask(ORDER)
    assert str(raised.value) == (
        f"{server.address} answered INTERNAL: it gave no reason. The server's log explains it."
    )
    assert (raised.value.reason, raised.value.field, dict(raised.value.named)) == ("", "", {})
