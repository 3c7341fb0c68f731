"""Where the models are served: one endpoint of a role, or several."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.inference.endpoints import ReplicaEndpoints


def test_one_endpoint_has_the_name_of_its_role() -> None:
    endpoints = ReplicaEndpoints(primary="models:7070", management={"primary": "models:7071"})
    assert endpoints.named("primary") == {"primary": "models:7070"}
    assert endpoints.managed() == {"primary": "models:7071"}


def test_several_are_numbered_in_their_order() -> None:
    endpoints = ReplicaEndpoints(
        primary="a:7070,dns://ns:53/b:7070", secondary="", management={"primary": "a:7071,b:7071"}
    )
    assert endpoints.named("primary") == {"primary-1": "a:7070", "primary-2": "dns://ns:53/b:7070"}
    assert endpoints.managed() == {"primary-1": "a:7071", "primary-2": "b:7071"}
    assert endpoints.named("secondary") == {}


def test_a_name_whose_addresses_are_to_be_looked_up_has_no_endpoints_yet() -> None:
    endpoints = ReplicaEndpoints(primary="each://models:7070", secondary="", management={"primary": "models:7071"})
    assert (endpoints.each("primary"), endpoints.each("challenger")) == ("models:7070", "")
    assert endpoints.named("primary") == {}
    assert endpoints.managed() == {}


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"primary": "each://a:1", "management": {"primary": "a:2,b:2"}}, "primary has 1 endpoints"),
        ({"management": {"primary": "each://a:2"}}, "management.primary"),
        ({"primary": "each://a:1,b:1"}, "primary"),
        ({"primary": "each://a:1", "token_files": {"primary-1": "keys.json"}}, "token_files: primary is each://a:1"),
        ({"primary": "a:1,a:1"}, "primary: a:1 is named twice"),
        ({"primary": "a:1,b:1", "management": {"primary": "a:2"}}, "primary has 2 endpoints, and must have as many"),
        ({"management": {"secondary": "a:2,b:2"}}, "secondary has 1 endpoints"),
        ({"secondary": ""}, "may be empty only where primary has several"),
        ({"primary": "a:1,"}, "primary"),
        ({"primary": ""}, "primary"),
        ({"token_files": {"primary-": "keys.json"}}, "token_files"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        ReplicaEndpoints(**fields)
