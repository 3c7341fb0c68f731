"""Errors as HTTP says them."""

from __future__ import annotations

import json

import pytest

from server import errors
from server.http import problems


def test_a_problem_has_the_reason_and_the_field_that_grpc_has() -> None:
    refusal = problems.refusal(errors.InvalidOrderError("INVALID_QUANTITY", "quantity: must be > 0", "quantity"))
    assert json.loads(refusal.body) == {
        "type": "urn:pretrade:reason:INVALID_QUANTITY",
        "title": "Invalid argument",
        "status": 400,
        "detail": "quantity: must be > 0",
        "code": "INVALID_ARGUMENT",
        "reason": "INVALID_QUANTITY",
        "field": "quantity",
    }


def test_a_problem_says_when_to_ask_again_and_what_else_is_known() -> None:
    assert json.loads(problems.refusal(errors.OverloadedError("MANY", "later")).body)["retry_after_seconds"] == 0.05
    never = problems.refusal(errors.MessageTooLargeError(2, 1))
    assert "retry_after_seconds" not in json.loads(never.body)
    named = errors.PermissionDeniedError("NOT_YOURS", "no", "strategy", {"strategy": "twap"})
    assert json.loads(problems.refusal(named).body)["metadata"] == {"strategy": "twap"}


def test_who_is_not_known_and_who_uses_another_method_is_told_what_to_use() -> None:
    unknown = problems.refusal(errors.UnauthenticatedError("NO_TOKEN", "who?"))
    assert (b"www-authenticate", b"Bearer") in unknown.headers
    other = problems.refusal(errors.HttpMethodError("PUT", ("POST",)))
    assert (other.http_status, dict(other.headers)[b"allow"]) == (405, b"POST")


@pytest.mark.parametrize(
    ("error", "http_status"),
    [
        (errors.KeyReusedError("REUSED", "no"), 409),
        (errors.OverloadedError("TOO_MANY", "later"), 429),
        (errors.MessageTooLargeError(2, 1), 413),
        (errors.UnknownMethodError(), 404),
        (errors.DeadlineError("LATE", "late"), 504),
        (errors.DrainingError("DRAINING", "draining"), 503),
        (errors.InternalError("oh"), 500),
        (errors.UnauthenticatedError("NO_TOKEN", "who?"), 401),
        (errors.PermissionDeniedError("NO", "no"), 403),
    ],
)
def test_an_error_has_the_status_that_http_has_for_it(error: errors.PretradeError, http_status: int) -> None:
    refusal = problems.refusal(error)
    assert refusal.http_status == http_status
    assert dict(refusal.headers)[b"content-type"] == b"application/problem+json"
    assert (b"retry-after" in dict(refusal.headers)) == (http_status == 429)


def test_every_error_has_a_status_of_http() -> None:
    def kinds(kind: type[errors.PretradeError]) -> set[type[errors.PretradeError]]:
        return {kind}.union(*map(kinds, kind.__subclasses__()))

    for kind in kinds(errors.PretradeError) - {errors.PretradeError}:
        error = kind.__new__(kind)
        error.reason, error.field = "ANY", ""
        if isinstance(error, errors.HttpMethodError):
            error.allowed = ("GET",)
        assert problems.refusal(error).http_status >= 400
