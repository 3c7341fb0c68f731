"""The query of a GET as a request: `?instruments=A&instruments=B&filter.since=2026-01-05T09:30:00Z`.

A parameter has the name of a field of the request, with dots for the fields of its parts. A list is given by its name
again and again.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from server.errors import InvalidOrderError

_MOST_PARAMETERS: Final = 1_000
_BOOLEANS: Final = {"true": True, "false": False}


def document_of(query: bytes, kind: Descriptor) -> dict[str, Any]:
    """The request as a JSON object, of which `transcoding.request_of` checks the names and values.

    Raises:
        InvalidOrderError: The query cannot be read, or a name is there twice that is no list.
    """
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARAMETERS
        )
    except ValueError:
        raise InvalidOrderError("MALFORMED_REQUEST", "the query is not name=value&name=value") from None
    document: dict[str, Any] = {}
    for name, value in pairs:
        _put(document, kind, name, value)
    return document


def _put(document: dict[str, Any], kind: Descriptor, name: str, value: str) -> None:
    *parts, last = name.split(".")
    for part in parts:
        field = kind.fields_by_name.get(part)
        if field is None or field.message_type is None:  # `request_of` says so of what has no parts
            _put_once(document, part, {last: value}, name)
            return
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise _twice(name)
        kind = field.message_type
    field = kind.fields_by_name.get(last)
    if field is not None and field.is_repeated:
        values = document.setdefault(last, [])
        if not isinstance(values, list):
            raise _twice(name)
        values.append(value)
    else:
        is_boolean = field is not None and field.type == FieldDescriptor.TYPE_BOOL
        _put_once(document, last, _BOOLEANS.get(value, value) if is_boolean else value, name)


def _put_once(document: dict[str, Any], part: str, value: Any, name: str) -> None:
    if part in document:
        raise _twice(name)
    document[part] = value


def _twice(name: str) -> InvalidOrderError:
    return InvalidOrderError("MALFORMED_REQUEST", f"{name[:64]!a} is there twice in the query", name[:64])
