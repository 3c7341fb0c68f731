"""Where a call goes and whether it is made again, on a clock of the test's own."""

from __future__ import annotations

import grpc
import pytest

from pretrade.client.errors import CallError, DeadlineError, OverloadedError, UnavailableError
from pretrade.client.policy import Call, Policy
from pretrade.client.retries import SPARE_FAILURES

CODES = grpc.StatusCode


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lone(clock: Clock) -> Policy:
    return Policy(["a:1"], clock)


@pytest.fixture
def pair(clock: Clock) -> Policy:
    return Policy(["a:1", "b:1"], clock)


def lost(code: grpc.StatusCode = CODES.UNAVAILABLE, reason: str = "") -> CallError:
    return UnavailableError("gone", code, reason=reason)


def refused(delay: float | None = 0.05, reason: str = "TOO_MANY_IN_FLIGHT") -> CallError:
    return OverloadedError("full", CODES.RESOURCE_EXHAUSTED, reason=reason, retry_delay_seconds=delay)


def late() -> CallError:
    return DeadlineError("late", CODES.DEADLINE_EXCEEDED)


def fail(call: Call, *errors: CallError) -> None:
    for error in errors:
        call.attempt()
        call.failed(error)


def leave(policy: Policy) -> None:
    """Makes the first server away."""
    for _ in range(3):
        call = policy.begin(1.0, repeatable=False)
        with pytest.raises(UnavailableError):
            fail(call, lost())


def test_a_client_without_a_server_is_refused() -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Policy([])


@pytest.mark.parametrize("code", [CODES.UNAVAILABLE, CODES.CANCELLED])
def test_a_lone_server_is_asked_again_after_growing_pauses_and_waited_for(lone: Policy, code: grpc.StatusCode) -> None:
    call = lone.begin(10.0, repeatable=True)
    pauses = []
    for _ in range(4):
        fail(call, lost(code))
        pauses.append(call.pause)
    for pause, expected in zip(pauses, (0.005, 0.02, 0.08, 0.1), strict=True):
        assert 0.8 * expected <= pause <= 1.2 * expected
    assert call.wait_for_ready


def test_what_has_no_key_is_not_asked_again_when_it_may_have_been_decided(lone: Policy) -> None:
    call = lone.begin(10.0, repeatable=False)
    with pytest.raises(UnavailableError):
        fail(call, lost())


def test_what_has_no_key_is_asked_again_after_a_refusal(lone: Policy) -> None:
    call = lone.begin(10.0, repeatable=False)
    fail(call, refused())
    assert call.pause == 0.05


def test_nothing_is_asked_after_the_deadline(lone: Policy, clock: Clock) -> None:
    call = lone.begin(1.0, repeatable=True)
    fail(call, lost())
    clock.now += 1.0
    with pytest.raises(UnavailableError):
        fail(call, lost())


def test_a_servers_own_cap_is_no_end_where_a_process_that_is_gone_may_hold_the_key(lone: Policy) -> None:
    call = lone.begin(1.0, repeatable=True)
    fail(call, lost(), late(), late())
    assert call.pause > 0


@pytest.mark.parametrize("error", [refused(2.0), refused(None), late()])
def test_a_delay_beyond_the_deadline_none_at_all_and_a_passed_deadline_end_a_call(
    lone: Policy, error: CallError
) -> None:
    with pytest.raises(type(error)):
        fail(lone.begin(1.0, repeatable=True), error)


def test_a_deadline_that_passed_waiting_for_a_connection_says_why_there_was_none(lone: Policy, clock: Clock) -> None:
    call = lone.begin(1.0, repeatable=True)
    fail(call, lost())
    clock.now += 1.0
    with pytest.raises(UnavailableError, match="gone") as raised:
        fail(call, late())
    assert raised.value.__notes__ == ["The call was tried 2 times."]


class _OfGrpc(grpc.RpcError):
    """What gRPC raises for a call."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "too bad"


@pytest.mark.parametrize(
    "last", [late(), _OfGrpc(CODES.DEADLINE_EXCEEDED)], ids=["the stream gave up waiting", "gRPC gave up waiting"]
)
def test_the_error_of_an_earlier_attempt_keeps_its_cause(
    lone: Policy, clock: Clock, last: CallError | grpc.RpcError
) -> None:
    call, first = lone.begin(0.5, repeatable=True), _OfGrpc(CODES.CANCELLED)
    call.attempt()
    call.failed(first)
    clock.now += 0.5
    call.attempt()
    with pytest.raises(UnavailableError) as raised:
        call.failed(last)
    assert raised.value.__cause__ is first
    assert "CANCELLED" in str(raised.value)


def test_a_server_of_which_everything_fails_is_soon_asked_once_a_call(lone: Policy) -> None:
    for _ in range(SPARE_FAILURES - 1):
        fail(lone.begin(1.0, repeatable=True), lost())
    with pytest.raises(UnavailableError):
        fail(lone.begin(1.0, repeatable=True), lost())
    for _ in range(3):  # each makes up for half a failure
        call = lone.begin(1.0, repeatable=True)
        call.attempt()
        call.answered()
    fail(lone.begin(1.0, repeatable=True), refused())


def test_a_lost_connection_ends_no_call_however_many_were_under_way(lone: Policy) -> None:
    calls = [lone.begin(1.0, repeatable=True) for _ in range(500)]
    for call in calls:
        call.attempt()
    for call in calls:
        call.failed(lost())


def test_a_call_goes_to_the_first_server_and_leaves_it_when_it_fails_twice(pair: Policy) -> None:
    call = pair.begin(1.0, repeatable=True)
    fail(call, lost())
    assert call.server.address == "a:1", "another of its processes may have the keys"
    fail(call, lost())
    assert (call.server.address, call.pause, call.wait_for_ready) == ("b:1", 0.0, False)


def test_a_server_that_says_that_it_stops_is_left_at_once(pair: Policy) -> None:
    call = pair.begin(1.0, repeatable=True)
    fail(call, lost(reason="DRAINING"))
    assert call.server.address == "b:1"


def test_a_refusal_leads_to_the_other_server_unless_it_is_about_the_caller(pair: Policy) -> None:
    call = pair.begin(1.0, repeatable=True)
    fail(call, refused())
    assert (call.server.address, call.pause) == ("b:1", 0.0)
    fail(call, refused(0.2))
    assert (call.server.address, call.pause) == ("b:1", 0.2), "both are full"
    limited = pair.begin(1.0, repeatable=True)
    fail(limited, refused(0.5, "RATE_LIMITED"))
    assert (limited.server.address, limited.pause) == ("a:1", 0.5)


def test_a_server_that_hangs_leaves_half_of_the_time_to_the_other(pair: Policy, clock: Clock) -> None:
    call = pair.begin(1.0, repeatable=True)
    assert call.attempt() == pytest.approx(0.5)
    clock.now += 0.5
    call.failed(late())
    assert call.server.address == "b:1"
    assert call.attempt() == pytest.approx(0.5), "all that is left"
    clock.now += 0.5
    with pytest.raises(DeadlineError):
        call.failed(late())


def test_a_server_that_fails_three_times_is_asked_last_until_its_health_is_well(pair: Policy, clock: Clock) -> None:
    leave(pair)
    assert pair.begin(1.0, repeatable=True).server.address == "b:1"
    away = pair.due()
    assert away is pair.servers[0]
    assert pair.due() is None, "once a second"
    clock.now += 1.0
    assert pair.due() is away
    away.is_well()
    assert pair.begin(1.0, repeatable=True).server.address == "a:1"


def test_with_all_servers_away_the_first_is_asked_and_then_the_others(pair: Policy) -> None:
    for server in pair.servers:
        for _ in range(3):
            server.began()
            server.failed(is_lost=True)
    call = pair.begin(1.0, repeatable=True)
    asked = []
    for _ in range(5):
        asked.append(call.server.address)
        fail(call, lost())
    assert set(asked) == {"a:1", "b:1"}


def test_refusals_and_errors_of_an_order_say_nothing_against_a_server(pair: Policy) -> None:
    for _ in range(5):
        fail(pair.begin(1.0, repeatable=True), refused())
        with pytest.raises(CallError):
            fail(pair.begin(1.0, repeatable=True), CallError("bad", CODES.INVALID_ARGUMENT))
    assert not pair.servers[0].is_away


def test_a_caller_who_leaves_says_nothing_against_a_server(pair: Policy) -> None:
    for _ in range(5):
        call = pair.begin(1.0, repeatable=True)
        call.attempt()
        call.abandoned()
    assert not pair.servers[0].is_away
