"""Writes the OpenAPI document from the contract: `.ci/protos` runs it, after every change of `proto/`.

The comments of the contract are the descriptions; its messages are schemas in the JSON mapping of proto3. Written by
hand is only what the contract does not say in a form that programs read: examples (`examples.py`), which fields a
request must have, and the HTTP statuses.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

from server.http import examples, problems
from server.http.document import FILE
from server.http.methods import PATHS
from server.http.methods import Path as ShortPath

_PROTO: Final = Path(__file__).parents[2] / "proto"
_SERVICES: Final = ("decision/v1/decision.proto", "admin/v1/admin.proto", "audit/v1/audit.proto")
_SCHEMA: Final = "#/components/schemas/"
_OPEN: Final = "pretrade.decision.v1"
"""The package whose callers need no credentials unless the server asks for them."""

REQUIRED: Final[Mapping[str, tuple[str, ...]]] = {
    "pretrade.decision.v1.Order": ("instrument", "side", "quantity", "strategy"),
    "pretrade.decision.v1.DecideRequest": ("order",),
    "pretrade.decision.v1.DecideBatchRequest": ("orders",),
}
"""Fields without which the server refuses a message."""
_STATUSES: Final[Mapping[int, str]] = {
    400: "The request breaks a rule, or it cannot be done in the state that things are in. The detail says which.",
    401: "The server asks for credentials, and they are missing or invalid.",
    403: "The caller lacks the role, or a browser shows a page of a site that is not allowed.",
    404: "Nothing is of this name, or this server serves no such method.",
    409: "The key was used for another request, or somebody else made a change since.",
    413: "The request is larger than the server accepts.",
    415: "The request is compressed in a way that the server does not know.",
    429: "Too many calls. `Retry-After` says when to ask again.",
    500: "A fault of the server, which its log explains.",
    503: "The server stops, or a part of it cannot be reached. Another server may answer.",
    504: "The deadline has passed. Of a change it means that nobody knows whether it was made.",
}
_REDUCE_ONLY: Final = "pretrade-reduce-only"
_OF_EVERY_CALL: Final = ("grpc-timeout", "x-correlation-id", "traceparent")
_HEADERS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "grpc-timeout": (
        "The caller's deadline: a number and `H`, `M`, `S` (seconds), `m` (milliseconds), `u` or `n`.",
        {"type": "string", "pattern": "^[0-9]{1,8}[HMSmun]$", "examples": ["500m"]},
    ),
    "x-correlation-id": (
        "The caller's own id of the call, which the server's log and traces carry.",
        {"type": "string"},
    ),
    "traceparent": ("W3C trace context.", {"type": "string"}),
    "last-event-id": (
        "Go on after this event, whatever `cursor` says. Browsers send it when they come back.",
        {"type": "string"},
    ),
    _REDUCE_ONLY: (
        "Any value: the call holds reduce-only orders alone. See `Order.reduce_only`.",
        {"type": "string"},
    ),
}
_INFO: Final = """\
Trade, no trade, or abstain? Answered for every order inside its deadline, with proof of why.

Every method is `POST /package.Service/Method`, as over gRPC; a few have a shorter path besides. JSON follows proto3's
mapping: 64-bit integers are strings, durations are seconds with an `s`, times are RFC 3339, bytes are base64. A field
with its default value may be missing from an answer. Requests may also name fields in camelCase, give 64-bit integers
as numbers, and shorten enum values (`buy` for `SIDE_BUY`). A name that is not in a request's schema is refused. Answers
may have more fields in later versions.

An error is a problem of RFC 9457 with a stable `reason`."""
_WATCHED: Final = """\
Over HTTP they are server-sent events, or the messages of a WebSocket to the same URL. A watch that is silent has a
comment every 15 s, or a ping. It ends with an event of the type `error`, which is a problem; a WebSocket ends with the
message `{"error": …}` and a close code. Whoever does not read loses the watch."""
_SCALARS: Final[Mapping[int, Mapping[str, Any]]] = {
    FieldDescriptorProto.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptorProto.TYPE_STRING: {"type": "string"},
    FieldDescriptorProto.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptorProto.TYPE_INT32: {"type": "integer", "format": "int32", "minimum": -(2**31), "maximum": 2**31 - 1},
    FieldDescriptorProto.TYPE_UINT32: {"type": "integer", "format": "uint32", "minimum": 0, "maximum": 2**32 - 1},
    FieldDescriptorProto.TYPE_INT64: {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"},
    FieldDescriptorProto.TYPE_UINT64: {"type": "string", "format": "uint64", "pattern": "^[0-9]{1,20}$"},
    FieldDescriptorProto.TYPE_FLOAT: {"$ref": f"{_SCHEMA}Float"},
    FieldDescriptorProto.TYPE_DOUBLE: {"$ref": f"{_SCHEMA}Double"},
}
_WELL_KNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "google.protobuf.Duration": {
        "type": "string",
        "pattern": r"^-?[0-9]{1,12}(\.[0-9]{1,9})?s$",
        "examples": ["0.5s"],
    },
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time", "examples": ["2026-01-05T09:30:00Z"]},
}
_NOT_FINITE: Final = {"enum": ["NaN", "Infinity", "-Infinity"]}


def document() -> dict[str, Any]:
    """The document, from the contract as it stands in `proto/`."""
    return _Writer(_descriptors()).document()


def text(found: Mapping[str, Any]) -> str:
    """The document as its file has it."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _descriptors() -> FileDescriptorSet:
    """The contract with its comments, which the generated stubs do not have."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "contract")
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(_PROTO), "--include_imports"]
        command += ["--include_source_info", f"--descriptor_set_out={out}"]
        subprocess.run([*command, *(f"pretrade/{name}" for name in _SERVICES)], check=True)  # noqa: S603 - a command of ours
        return FileDescriptorSet.FromString(out.read_bytes())


class _Writer:
    """Writes the document.

    Args:
        contract: Every file of the contract, with its comments.
    """

    def __init__(self, contract: FileDescriptorSet) -> None:
        self._messages: dict[str, DescriptorProto] = {}
        self._enums: dict[str, EnumDescriptorProto] = {}
        self._services: dict[str, ServiceDescriptorProto] = {}
        self._comments: dict[str, str] = {}
        self._answers = examples.answers()
        for file in contract.file:
            if file.package.startswith("pretrade."):
                self._read(file)

    def document(self) -> dict[str, Any]:
        """The document."""
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "pretrade",
                "version": metadata.version("pretrade-server"),
                "description": _INFO,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "tags": [*self._tags(), {"name": "Server", "description": "For everybody, without credentials."}],
            "paths": dict(itertools.chain(self._paths(), _pages())),
            "components": {
                "schemas": self._schemas(),
                "responses": {f"Problem{status}": _problem_answer(status) for status in _STATUSES},
                "parameters": {name: _parameter(name) for name in _HEADERS},
                "securitySchemes": {
                    "token": {"type": "http", "scheme": "bearer", "description": "An operator's or a caller's token."},
                    "certificate": {"type": "mutualTLS", "description": "A client certificate."},
                },
            },
        }

    def _read(self, file: FileDescriptorProto) -> None:
        """Takes in a file: what it declares by full name, and the comments of that."""
        named: dict[tuple[int, ...], str] = {}
        for number, service in enumerate(file.service):
            at = named[6, number] = f"{file.package}.{service.name}"
            self._services[at] = service
            named |= {(6, number, 2, index): f"{at}.{one.name}" for index, one in enumerate(service.method)}
        for number, enum in enumerate(file.enum_type):
            at = named[5, number] = f"{file.package}.{enum.name}"
            self._enums[at] = enum
            named |= {(5, number, 2, index): f"{at}.{one.name}" for index, one in enumerate(enum.value)}
        for number, message in enumerate(file.message_type):
            self._read_message(message, file.package, (4, number), named)
        for location in file.source_code_info.location:
            if (name := named.get(tuple(location.path))) is not None:
                lines = location.leading_comments.splitlines()
                self._comments[name] = "\n".join(line.removeprefix(" ") for line in lines).strip()

    def _read_message(
        self, message: DescriptorProto, inside: str, path: tuple[int, ...], named: dict[tuple[int, ...], str]
    ) -> None:
        at = named[path] = f"{inside}.{message.name}"
        self._messages[at] = message
        named |= {(*path, 2, index): f"{at}.{one.name}" for index, one in enumerate(message.field)}
        for number, nested in enumerate(message.nested_type):
            self._read_message(nested, at, (*path, 3, number), named)

    def _tags(self) -> Iterator[dict[str, Any]]:
        for name, service in self._services.items():
            streams = [f"`{one.name}`" for one in service.method if not self._is_here(name, one)]
            also = f"\n\nFor gRPC alone: {', '.join(streams)}." if streams else ""
            yield {"name": service.name, "description": self._comments[name] + also}

    def _paths(self) -> Iterator[tuple[str, Any]]:
        for name, service in self._services.items():
            for method in service.method:
                path = f"/{name}/{method.name}"
                if not _is_stream(method):
                    yield path, {"post": self._operation(path, service, method, "POST")}
                for shorter in PATHS.get(path, ()):
                    operation = self._operation(path, service, method, shorter.verb)
                    operation["operationId"] += "_one" if shorter.field else "_short"
                    if shorter.verb == "GET":
                        operation["parameters"] += self._asked(method, shorter)
                    yield shorter.path, {shorter.verb.lower(): operation}

    def _asked(self, method: MethodDescriptorProto, path: ShortPath) -> Iterator[dict[str, Any]]:
        """The parameters of a GET: the fields of its request."""
        values = examples.PARAMETERS.get(method.name, {})
        for dotted, field, about in self._fields(method.input_type.removeprefix(".")):
            is_list = field.label == FieldDescriptorProto.LABEL_REPEATED
            found: dict[str, Any] = {"name": dotted, "in": "query", "required": False, "description": about}
            schema: Mapping[str, Any] = _value(field)
            if dotted == path.field:
                name = path.path.rpartition("{")[2].removesuffix("}")
                found |= {"name": name, "in": "path", "required": True, "description": f"Its {name}."}
            elif is_list:
                schema = {"type": "array", "items": schema}
            if found["name"] in values:
                found["example"] = values[found["name"]]
            yield found | {"schema": schema}

    def _fields(self, kind: str, before: str = "") -> Iterator[tuple[str, FieldDescriptorProto, str]]:
        """The fields of a message, and of the messages in it, by the names that a query has for them."""
        for field in self._messages[kind].field:
            part = field.type_name.removeprefix(".")
            if part in self._messages and part not in _WELL_KNOWN:
                yield from self._fields(part, f"{before}{field.name}.")
            else:
                yield before + field.name, field, self._comments[f"{kind}.{field.name}"]

    def _operation(
        self, path: str, service: ServiceDescriptorProto, method: MethodDescriptorProto, verb: str
    ) -> dict[str, Any]:
        about = self._comments[path[1:].replace("/", ".")]
        is_open = path.startswith(f"/{_OPEN}.")
        credentials: list[dict[str, Any]] = [{"token": []}, {"certificate": []}]
        headers = [*_OF_EVERY_CALL, *([_REDUCE_ONLY] if is_open else [])]
        operation: dict[str, Any] = {
            "operationId": f"{service.name}_{method.name}",
            "tags": [service.name],
            "summary": _first_sentence(about),
            "description": about,
            "security": [{}, *credentials] if is_open else credentials,
            "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in headers],
        }
        if verb == "POST":
            request: dict[str, Any] = {"schema": _reference(method.input_type)}
            request["examples"] = {
                name: {"summary": title, "value": value} for name, (title, value) in examples.REQUESTS[path].items()
            }
            operation["requestBody"] = {"required": True, "content": {"application/json": request}}
        if _is_stream(method):
            operation["description"] += f"\n\n{_WATCHED}"
            operation["parameters"].append({"$ref": "#/components/parameters/last-event-id"})
            answer = {
                "description": "The events, as they come.",
                "content": {"text/event-stream": _events(path, method)},
            }
        else:
            shown = {"schema": _reference(method.output_type), "example": self._answers[path]}
            answer = {"description": "The answer.", "content": {"application/json": shown}}
        operation["responses"] = {"200": answer} | _problem_references()
        return operation

    def _is_here(self, service: str, method: MethodDescriptorProto) -> bool:
        """Whether a method is called over HTTP."""
        return not _is_stream(method) or f"/{service}/{method.name}" in PATHS

    def _schemas(self) -> dict[str, Any]:
        """One for each message and enum that a method takes or gives, and those of what is no message.

        What is watched is asked for by parameters, which need no schema of a message.
        """
        methods = [
            one for name, service in self._services.items() for one in service.method if self._is_here(name, one)
        ]
        asked = self._reachable(one.input_type for one in methods if not _is_stream(one))
        told = self._reachable(one.output_type for one in methods)
        found = {name: self._schema(name, name in asked) for name in sorted(asked | told)}
        return {
            **found,
            "Double": {"anyOf": [{"type": "number", "format": "double"}, _NOT_FINITE]},
            "Float": {"anyOf": [{"type": "number", "format": "float"}, _NOT_FINITE]},
            "Problem": _PROBLEM,
        }

    def _reachable(self, types: Iterable[str]) -> set[str]:
        found: set[str] = set()
        left = [one.removeprefix(".") for one in types]
        while left:
            name = left.pop()
            if name in found or name in _WELL_KNOWN:
                continue
            if name in self._enums or not self._messages[name].options.map_entry:
                found.add(name)
            if name in self._messages:
                left += [one.type_name.removeprefix(".") for one in self._messages[name].field if one.type_name]
        return found

    def _schema(self, name: str, is_asked: bool) -> dict[str, Any]:
        about = self._comments[name]
        if name in self._enums:
            values = self._enums[name].value
            lines = (f"* `{one.name}`: {self._comments[f'{name}.{one.name}']}" for one in values)
            return {
                "type": "string",
                "enum": [one.name for one in values],
                "description": "\n".join((about, "", *lines)),
            }
        message = self._messages[name]
        for number, choice in enumerate(message.oneof_decl):
            named = [one.name for one in message.field if one.HasField("oneof_index") and one.oneof_index == number]
            if len(named) > 1:
                about += f"\n\nAt most one of {', '.join(f'`{one}`' for one in named)} is there: the {choice.name}."
        schema: dict[str, Any] = {
            "type": "object",
            "description": about,
            "properties": {one.name: self._property(name, one) for one in message.field},
        }
        if name in REQUIRED:
            schema["required"] = list(REQUIRED[name])
        if is_asked:
            schema["additionalProperties"] = False
        return schema

    def _property(self, message: str, field: FieldDescriptorProto) -> dict[str, Any]:
        about = {"description": self._comments[f"{message}.{field.name}"]}
        entry = self._messages.get(field.type_name.removeprefix("."))
        if entry is not None and entry.options.map_entry:
            return {"type": "object", "additionalProperties": _value(entry.field[1]), **about}
        if field.label == FieldDescriptorProto.LABEL_REPEATED:
            return {"type": "array", "items": _value(field), **about}
        return {**_value(field), **about}


def _value(field: FieldDescriptorProto) -> Mapping[str, Any]:
    """The schema of a field's value, or of one of its values."""
    if field.type_name:
        return _WELL_KNOWN.get(field.type_name.removeprefix(".")) or _reference(field.type_name)
    return _SCALARS[field.type]


def _reference(type_name: str) -> dict[str, str]:
    return {"$ref": _SCHEMA + type_name.removeprefix(".")}


def _is_stream(method: MethodDescriptorProto) -> bool:
    return method.client_streaming or method.server_streaming


def _first_sentence(about: str) -> str:
    return re.split(r"(?<=[.?])\s", about, maxsplit=1)[0].replace("\n", " ")


def _parameter(name: str) -> dict[str, Any]:
    about, schema = _HEADERS[name]
    return {"name": name, "in": "header", "required": False, "description": about, "schema": schema}


def _problem_references(*statuses: int) -> dict[str, Any]:
    """The answers that are problems: of these statuses, or else of all."""
    return {str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in statuses or _STATUSES}


def _events(path: str, method: MethodDescriptorProto) -> dict[str, Any]:
    """What is watched: the schema is that of one event, as OpenAPI 3.1 has no word for a stream of them."""
    schema = {
        "type": "object",
        "description": "One of the server-sent events.",
        "properties": {
            "id": {"type": "string", "description": "The message's `cursor`."},
            "event": {
                "enum": ["message", "error"],
                "default": "message",
                "description": "`error` of the last event alone: its data is why the watch ended.",
            },
            "data": {"type": "string"},
        },
        "required": ["data"],
        "if": {"properties": {"event": {"const": "error"}}, "required": ["event"]},
        "then": _event_data({"$ref": f"{_SCHEMA}Problem"}),
        "else": {"required": ["id"], **_event_data(_reference(method.output_type))},
    }
    data = json.dumps(examples.event(path), separators=(",", ":"))
    return {"schema": schema, "example": f"retry: 1000\n\nid: {examples.CURSORS[path]}\ndata: {data}\n\n"}


def _event_data(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What is in the data of an event, which is JSON."""
    return {"properties": {"data": {"contentMediaType": "application/json", "contentSchema": schema}}}


def _problem_answer(status: int) -> dict[str, Any]:
    kind = problems.CONTENT_TYPE.decode()
    answer: dict[str, Any] = {
        "description": _STATUSES[status],
        "content": {kind: {"schema": {"$ref": f"{_SCHEMA}Problem"}, "example": examples.problem(status)}},
    }
    if status == 429:
        answer["headers"] = {"Retry-After": {"description": "Whole seconds.", "schema": {"type": "integer"}}}
    return answer


def _pages() -> Iterator[tuple[str, Any]]:
    """The paths that are no methods."""
    states = ("SERVING", "NOT_SERVING")
    yield _page(
        "/health", "Whether the server takes decisions.", {"status": {"type": "string", "enum": list(states)}}, 503
    )
    yield _page("/version", "What answers.", {"version": {"type": "string"}, "contract": {"type": "string"}})


def _page(path: str, about: str, properties: Mapping[str, Any], *otherwise: int) -> tuple[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    answer = {"description": about, "content": {"application/json": {"schema": schema}}}
    statuses: dict[str, Any] = {str(status): answer for status in (200, *otherwise)} | _problem_references(403)
    operation = {"operationId": path[1:], "tags": ["Server"], "summary": about, "security": [], "responses": statuses}
    return path, {"get": operation}


_PROBLEM: Final[Mapping[str, Any]] = {
    "type": "object",
    "description": "Why a call got no answer: a problem of RFC 9457.",
    "properties": {
        "type": {"type": "string", "pattern": f"^{problems.TYPE}", "description": "The reason as a URN."},
        "title": {"type": "string", "description": "The gRPC code, for people."},
        "status": {"type": "integer", "description": "The HTTP status."},
        "detail": {"type": "string", "description": "One sentence for people."},
        "code": {"type": "string", "description": "The gRPC code, such as `INVALID_ARGUMENT`."},
        "reason": {"type": "string", "description": "Stable, for programs, such as `INVALID_QUANTITY`."},
        "field": {"type": "string", "description": "The field to blame, where one is."},
        "metadata": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "More by name, where there is more.",
        },
        "retry_after_seconds": {"type": "number", "description": "When to ask again, where that is known."},
    },
    "required": ["type", "title", "status", "detail", "code", "reason"],
}


if __name__ == "__main__":
    FILE.write_text(text(document()))
