"""Where the models are served: one endpoint of a role, or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.inference.endpoints import NamedModel, OtherChallenger, ReplicaEndpoints, role_of
from server.inference.oip import OpenInferenceSettings

DESCRIPTION = '{"version": "0123456789abcdef", "threshold": 0.5, "feature_set_fingerprint": 1}'


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


def test_a_named_model_may_have_endpoints_that_come_and_go() -> None:
    model = NamedModel(secondary="each://others:7070", management={"secondary": "others:7071"})
    endpoints = model.endpoints("scalper", ReplicaEndpoints(primary="models:7070"))
    assert (endpoints.each("secondary"), endpoints.named("primary")) == ("others:7070", {"primary": "models:7070"})
    with pytest.raises(ValidationError, match="management"):
        NamedModel(secondary="each://others:7070", management={"secondary": "each://others:7071"})


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


def test_a_named_model_is_hosted_by_the_default_models_replicas_under_its_own_name() -> None:
    shared = ReplicaEndpoints(
        primary="one:1,two:2",
        management={"primary": "one:9,two:9", "secondary": "three:9"},
        token_files={"primary-1": Path("one.json"), "secondary": Path("three.json")},
        champion_version="ab" * 8,
        other_challengers={"challenger-x": OtherChallenger(endpoint="x:1")},
    )
    hosted = NamedModel().endpoints("scalper", shared)
    assert hosted.named("primary") == {"primary-1": "one:1", "primary-2": "two:2"}
    assert (hosted.champion_model, hosted.challenger_model, hosted.champion_version) == ("scalper", "scalper", None)
    assert (hosted.management, hosted.token_files) == (shared.management, shared.token_files)
    assert not hosted.other_challengers


def test_a_role_of_its_own_takes_nothing_of_the_shared_one() -> None:
    shared = ReplicaEndpoints(
        management={"primary": "one:9", "secondary": "three:9"}, token_files={"primary": Path("one.json")}
    )
    own = NamedModel(primary="four:4", served_as="fast", champion_version="cd" * 8).endpoints("scalper", shared)
    assert (own.primary, own.secondary) == ("four:4", shared.secondary)
    assert (own.management, own.token_files) == ({"secondary": "three:9"}, {})
    assert (own.champion_model, own.champion_version) == ("fast", "cd" * 8)
    with pytest.raises(ValueError, match="management: primary has 2 endpoints"):
        NamedModel(primary="four:4,five:5", management={"primary": "four:9"}).endpoints("scalper", shared)


def test_a_shared_replica_speaks_what_it_speaks_and_one_of_its_own_what_the_model_says() -> None:
    shared = ReplicaEndpoints(primary_protocol="oip")
    assert NamedModel().endpoints("scalper", shared).primary_protocol == "oip"
    assert NamedModel(primary="four:4").endpoints("scalper", shared).primary_protocol == "torchserve"
    own = NamedModel(secondary="four:4", secondary_protocol="oip").endpoints("scalper", shared)
    assert (own.primary_protocol, own.secondary_protocol, own.challenger_protocol) == ("oip", "oip", "torchserve")
    with pytest.raises(ValueError, match="primary_protocol: torchserve, but its primary is that of replicas, which"):
        NamedModel(primary_protocol="torchserve").endpoints("scalper", shared)


def test_a_named_model_has_the_shared_names_of_tensors_and_descriptions_of_its_own(tmp_path: Path) -> None:
    for name in ("champion", "scalper"):
        (tmp_path / f"{name}.json").write_text(DESCRIPTION)
        (tmp_path / f"{name}.config.json").write_text("{}")
    configs = {name: tmp_path / f"{name}.config.json" for name in ("champion", "scalper")}
    shared = OpenInferenceSettings.model_validate(
        {
            "input_name": "input__0",
            "version_names": "number",
            "champion": tmp_path / "champion.json",
            "triton_configs": configs,
        }
    )
    hosted = NamedModel().open_inference("scalper", shared)
    assert (hosted.input_name, hosted.version_names, hosted.champion) == ("input__0", "number", None)
    assert hosted.triton_configs == {"scalper": configs["scalper"]}
    own = NamedModel.model_validate({"oip": {"champion": tmp_path / "scalper.json", "input_name": "rows"}})
    described = own.open_inference("scalper", shared)
    assert (described.input_name, described.champion) == ("rows", tmp_path / "scalper.json")
    assert described.challenger == described.champion
    elsewhere = NamedModel.model_validate({"served_as": "fast", "oip": {"version_names": "hash"}})
    assert elsewhere.open_inference("scalper", shared).triton_configs == {}


@pytest.mark.parametrize(
    ("replica", "role"),
    [
        ("primary", "primary"),
        ("primary-2", "primary"),
        ("scalper/secondary-11", "secondary"),
        ("a-1/challenger", "challenger"),
        ("challenger-x", "challenger-x"),
    ],
)
def test_a_replicas_name_says_its_role(replica: str, role: str) -> None:
    assert role_of(replica) == role
