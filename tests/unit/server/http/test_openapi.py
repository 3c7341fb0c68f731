"""The OpenAPI document is current, valid and whole."""

from __future__ import annotations

import itertools
import json
from typing import Any, Final

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, MethodDescriptor
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.rpc import code_pb2
from openapi_spec_validator import OpenAPIV31SpecValidator

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2
from server.http import examples, openapi, problems
from server.http.document import FILE
from server.http.methods import PATHS
from server.http.problems import HTTP

SERVICES: Final = [
    service
    for module in (admin_pb2, audit_pb2, decision_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]
METHODS: Final = {f"/{service.full_name}/{one.name}": one for service in SERVICES for one in service.methods}


def is_stream(method: MethodDescriptor) -> bool:
    return bool(method.client_streaming or method.server_streaming)


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
        if is_stream(method):
            assert path not in document["paths"]
            alone = about[method.containing_service.name].rpartition("For gRPC alone: ")[2]
            assert (f"`{method.name}`" in alone) is (path not in PATHS)
            continue
        answers = document["paths"][path]["post"]["responses"]
        assert answers["200"]["content"]["application/json"]["schema"]["$ref"].endswith(method.output_type.full_name)
    for shorter in itertools.chain.from_iterable(PATHS.values()):
        assert shorter.verb.lower() in document["paths"][shorter.path]


def test_every_path_has_every_status_that_a_problem_may_have(document: dict[str, Any]) -> None:
    # Nobody is told CANCELLED, as its caller has gone; and all that is UNIMPLEMENTED has a status of its own.
    ours = {str(status) for code, status in HTTP.items() if code not in (code_pb2.CANCELLED, code_pb2.UNIMPLEMENTED)}
    for path, item in document["paths"].items():
        for operation in item.values():
            if path in ("/health", "/version"):
                assert "403" in operation["responses"], "a web page of another site"
            else:
                assert ours <= set(operation["responses"])
            assert operation["operationId"]
            assert operation["summary"].endswith((".", "?"))


def test_every_message_has_every_field_in_its_json_form(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, method in METHODS.items():
        if not is_stream(method):
            check_message(schemas, method.input_type)
        if not is_stream(method) or path in PATHS:
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


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if not is_stream(method)])
def test_every_method_has_requests_and_an_answer_as_examples(document: dict[str, Any], path: str) -> None:
    operation, method = document["paths"][path]["post"], METHODS[path]
    requests = operation["requestBody"]["content"]["application/json"]["examples"]
    assert requests
    for request in requests.values():
        assert request["summary"]
        ParseDict(request["value"], GetMessageClass(method.input_type)())
    answer = operation["responses"]["200"]["content"]["application/json"]["example"]
    assert ParseDict(answer, GetMessageClass(method.output_type)()).ListFields()


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if is_stream(method) and path in PATHS])
def test_what_is_watched_has_an_event_as_example(document: dict[str, Any], path: str) -> None:
    (shorter,) = PATHS[path]
    operation = document["paths"][shorter.path]["get"]
    answer = operation["responses"]["200"]["content"]["text/event-stream"]
    kind = METHODS[path].output_type
    ended, told = (answer["schema"][part]["properties"]["data"]["contentSchema"]["$ref"] for part in ("then", "else"))
    assert (ended, told) == ("#/components/schemas/Problem", f"#/components/schemas/{kind.full_name}")
    retry, at, data = answer["example"].split()[1::2]
    assert retry == "1000"
    assert json.loads(data)["cursor"] == at
    assert len(ParseDict(json.loads(data), GetMessageClass(kind)()).ListFields()) == 2
    assert {"$ref": "#/components/parameters/last-event-id"} in operation["parameters"]


def test_every_status_has_a_problem_as_example(document: dict[str, Any]) -> None:
    for name, answer in document["components"]["responses"].items():
        (content,) = answer["content"].values()
        example = content["example"]
        assert name == f"Problem{example['status']}"
        assert problems.status_of(examples.PROBLEMS[example["status"]]) == example["status"]
        assert set(document["components"]["schemas"]["Problem"]["required"]) <= set(example)


def test_a_part_of_a_request_is_asked_for_by_a_name_with_a_dot(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/v1/decisions/events"]["get"]["parameters"]
    named = {one["name"]: one for one in parameters if "name" in one}
    assert {"cursor", "from_oldest", "filter.instruments", "filter.since"} <= set(named)
    assert "filter" not in named
    assert named["filter.instruments"]["schema"] == {"type": "array", "items": {"type": "string"}}
    assert all(one["description"] for one in named.values())
