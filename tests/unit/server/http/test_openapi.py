"""The OpenAPI document is current, valid and whole."""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from google.protobuf.json_format import Parse
from google.protobuf.message_factory import GetMessageClass
from openapi_spec_validator import OpenAPIV31SpecValidator

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2
from server.http import openapi
from server.http.document import FILE
from server.http.methods import PATHS
from server.http.problems import HTTP

SERVICES: Final = [
    service
    for module in (admin_pb2, audit_pb2, decision_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS: Final = {f"/{service.full_name}/{one.name}": one for service in SERVICES for one in service.methods}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_the_file_is_current() -> None:
    assert FILE.read_text() == openapi.text(openapi.document()), "run `make protos`"


def test_it_is_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(document).validate()


def test_every_method_is_there_and_the_streams_are_named(document: dict[str, Any]) -> None:
    about = {tag["name"]: tag["description"] for tag in document["tags"]}
    for path, method in METHODS.items():
        if method.client_streaming or method.server_streaming:
            assert path not in document["paths"]
            assert f"`{method.name}`" in about[method.containing_service.name].rpartition("For gRPC alone: ")[2]
            continue
        answers = document["paths"][path]["post"]["responses"]
        assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith(method.output_type.full_name)
    for shorter in itertools.chain.from_iterable(PATHS.values()):
        assert shorter.verb.lower() in document["paths"][shorter.path]


def test_every_path_has_every_status_that_a_problem_may_have(document: dict[str, Any]) -> None:
    ours = {str(status) for code, status in HTTP.items() if code != 1}  # nobody is told CANCELLED: its caller has gone
    for path, item in document["paths"].items():
        for operation in item.values():
            assert path in ("/health", "/version") or ours <= set(operation["responses"])
            assert operation["operationId"]
            assert operation["summary"].endswith((".", "?"))


def test_every_message_has_every_field_in_its_json_form(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for method in METHODS.values():
        if not (method.client_streaming or method.server_streaming):
            check_message(schemas, method.input_type)
            check_message(schemas, method.output_type)
    assert schemas["pretrade.audit.v1.AuditedDecision"]["properties"]["hash"]["contentEncoding"] == "base64"
    version = schemas["pretrade.decision.v1.Decision"]["properties"]["control_version"]
    assert (version["type"], version["format"]) == ("string", "uint64")
    outcomes = schemas["pretrade.admin.v1.ReplicaStatus"]["properties"]["outcomes"]
    assert outcomes["additionalProperties"]["format"] == "uint64"


def check_message(schemas: dict[str, Any], message: Descriptor) -> None:
    if message.file.package == "google.protobuf" or message.GetOptions().map_entry:
        return
    schema = schemas[message.full_name]
    assert set(schema["properties"]) == set(message.fields_by_name)
    assert schema["description"]
    assert all(one["description"] for one in schema["properties"].values())
    for field in message.fields:
        if isinstance(field.enum_type, EnumDescriptor):
            assert schemas[field.enum_type.full_name]["enum"] == list(field.enum_type.values_by_name)
        if field.message_type is not None and field.message_type is not message:
            check_message(schemas, field.message_type)


def test_only_what_is_asked_is_closed_to_other_names(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["pretrade.decision.v1.Order"]["additionalProperties"] is False
    assert "additionalProperties" not in schemas["pretrade.decision.v1.Decision"]


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, examples in openapi.EXAMPLES.items() for name in examples]
)
def test_an_example_is_a_request_of_its_method(document: dict[str, Any], path: str, name: str) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    example = body["examples"][name]["value"]
    Parse(json.dumps(example), GetMessageClass(METHODS[path].input_type)())
