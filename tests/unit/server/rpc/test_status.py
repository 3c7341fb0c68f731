"""Every error of the one tree has a status and says its reason."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server import errors
from server.errors import ControlChangedError, JournalFullError, OverloadedError, PretradeError, RateLimitedError
from server.rpc import status


def classes(base: type[PretradeError]) -> Iterator[type[PretradeError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from classes(kind)


def details(error: PretradeError) -> status_pb2.Status:
    """What a caller finds in the trailing metadata."""
    _, _, trailing_metadata = status.of(error)
    return status_pb2.Status.FromString(dict(trailing_metadata)["grpc-status-details-bin"])


def test_every_error_that_can_reach_a_caller_has_a_line_in_the_table() -> None:
    bases = (errors.AuditError, errors.JournalError, errors.NotReplayableError, errors.UnauthenticatedError)
    for kind in classes(PretradeError):
        found = next(one for one in kind.__mro__ if one in status.CODES)
        assert found is kind or found in bases, kind


def test_the_drawing_names_every_class_of_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "── " in line}
    assert drawn == {kind.__name__ for kind in classes(PretradeError) if kind.__module__ == errors.__name__}


@pytest.mark.parametrize(
    ("error", "code", "reason", "metadata"),
    [
        (JournalFullError("full"), grpc.StatusCode.UNAVAILABLE, "JOURNAL_FULL", {}),
        (errors.UnknownDecisionError("nowhere"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_DECISION", {}),
        (errors.ModelUnknownError("gone"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_UNKNOWN", {}),
        (ControlChangedError(2, 1), grpc.StatusCode.ABORTED, "CONTROL_CHANGED", {}),
        (
            errors.ChangeInDoubtError("7", "Redis"),
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "CHANGE_IN_DOUBT",
            {"change_id": "7"},
        ),
        (
            errors.InvalidOrderError("INVALID_QUANTITY", "quantity: must be > 0", "quantity"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_QUANTITY",
            {"field": "quantity"},
        ),
    ],
)
def test_a_failed_call_says_why_for_programs(
    error: PretradeError, code: grpc.StatusCode, reason: str, metadata: dict[str, str]
) -> None:
    assert status.of(error)[:2] == (code, str(error))
    info = error_details_pb2.ErrorInfo()
    assert details(error).details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == ("pretrade", reason, metadata)


@pytest.mark.parametrize(
    ("error", "nanos"),
    [
        (OverloadedError("TOO_MANY_IN_FLIGHT", "later"), 50_000_000),
        (RateLimitedError("RATE_LIMITED", "", 0.25), 250_000_000),
    ],
)
def test_a_caller_learns_when_to_ask_again(error: PretradeError, nanos: int) -> None:
    retry = error_details_pb2.RetryInfo()
    assert details(error).details[1].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() == nanos
    assert dict(status.of(error)[2])["grpc-retry-pushback-ms"] == str(nanos // 1_000_000)
    assert status.order_error(error).retry_delay.ToNanoseconds() == nanos
    assert status.http_headers(error) == [(b"retry-after", b"1")]


def test_a_caller_learns_that_asking_again_is_of_no_use() -> None:
    error = errors.MessageTooLargeError(2, 1)
    assert len(details(error).details) == 1
    assert dict(status.of(error)[2])["grpc-retry-pushback-ms"] == "-1"
    assert status.http_headers(error) == []
    assert not status.order_error(error).HasField("retry_delay")


def test_a_caller_of_whom_nobody_knows_when_to_ask_again_hears_nothing_of_it() -> None:
    error = JournalFullError("full")
    assert "grpc-retry-pushback-ms" not in dict(status.of(error)[2])
    assert status.http_headers(error) == []
