"""Requests and answers as JSON, for callers without gRPC. Errors are in `problems.py`.

The mapping is proto3's own, and stricter and kinder in two places. A name that the contract does not have is refused,
with the nearest one it has: were it ignored, an order with a misspelt `limit_price` would be decided as a market order.
(Envoy's own filter, `grpc_json_transcoder`, ignores such names and has no option to refuse them.) And an enum value
may be written without its prefix and in any case: `buy` is `SIDE_BUY`.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Final, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.message import Message

from server.errors import InvalidOrderError
from server.rpc.events import dumped, json_of

_M = TypeVar("_M", bound=Message)

CONTENT_TYPE: Final = b"application/json"
GRPC: Final = b"application/grpc"
"""How the content types of gRPC begin. A call with another one, or with none, is JSON."""
_AT_A_TIME: Final = 16
"""Orders of a batch that are converted before other calls get their turn. One takes some 0.1 ms, there and back."""
_MOST_SHOWN: Final = 64
"""Characters of a caller's text in a message."""
_WELL_KNOWN: Final = "google.protobuf"


async def request_of(body: bytes, kind: type[_M]) -> _M:
    """The request in a body.

    Raises:
        InvalidOrderError: It is not JSON, or not a message of this kind; names the field.
    """
    if not body:
        raise InvalidOrderError("MISSING_REQUEST", "the request has no body: it must be a JSON object")
    try:
        document = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _malformed("", f"the request is not JSON: {str(error)[:_MOST_SHOWN]}") from None
    request = kind()
    for number, _ in enumerate(_fill(request, document, ""), 1):
        if not number % _AT_A_TIME:
            await asyncio.sleep(0)
    return request


async def answer_of(answer: Message) -> bytes:
    """An answer as a body."""
    match answer.ListFields():
        case [(FieldDescriptor(is_repeated=True, message_type=Descriptor()) as field, entries)]:
            parts = []
            for number, entry in enumerate(entries, 1):
                parts.append(json_of(entry))
                if not number % _AT_A_TIME:
                    await asyncio.sleep(0)
            return b"{%s:[%s]}" % (dumped(field.name), b",".join(parts))
        case _:
            return json_of(answer)


def _fill(message: Message, document: object, at: str) -> Iterator[None]:
    """Writes a JSON object into an empty message, and stops after each entry of a list of messages.

    Raises:
        InvalidOrderError: It does not fit.
    """
    if not isinstance(document, dict):
        raise _malformed(at, f"{at or 'the request'}: must be a JSON object, not {_shown(document)}")
    fields, seen = _fields(message.DESCRIPTOR), set[int]()
    for name, value in document.items():
        here = f"{at}.{name}" if at else name
        field = fields.get(name)
        if field is None:
            raise _unknown_field(list(message.DESCRIPTOR.fields_by_name), name, at)
        if field.number in seen:
            raise _malformed(here, f"{here}: is there twice, by both of its names")
        seen.add(field.number)
        if value is not None:  # null stands for a field that is not there
            yield from _set(message, field, value, here)


def _set(message: Message, field: FieldDescriptor, value: object, at: str) -> Iterator[None]:
    kind = field.message_type
    if field.is_repeated and not isinstance(value, list):
        raise _malformed(at, f"{at}: must be a JSON array, not {_shown(value)}")
    if kind is None or kind.file.package == _WELL_KNOWN:
        _set_scalar(message, field, value, at)
    elif field.is_repeated:
        entries = getattr(message, field.name)
        for number, entry in enumerate(value):  # type: ignore[arg-type, var-annotated]  # it is a list
            yield from _fill(entries.add(), entry, f"{at}[{number}]")
            yield
    else:
        part = getattr(message, field.name)
        part.SetInParent()
        yield from _fill(part, value, at)


def _set_scalar(message: Message, field: FieldDescriptor, value: object, at: str) -> None:
    if field.enum_type is not None:
        enum = field.enum_type
        if isinstance(value, list) and field.is_repeated:
            value = [_enum_value(enum, one, f"{at}[{number}]") for number, one in enumerate(value)]
        else:
            value = _enum_value(enum, value, at)
    elif isinstance(value, bool) and field.type != FieldDescriptor.TYPE_BOOL:
        raise _malformed(at, f"{at}: must not be {_shown(value)}")
    try:
        ParseDict({field.name: value}, message)
    except ParseError as error:
        why = str(error).removeprefix(f"Failed to parse {field.name} field: ").partition("\n")[0]
        raise _malformed(at, f"{at}: {_ascii(why)}") from None


def _enum_value(enum: EnumDescriptor, value: object, at: str) -> int:
    """The number of an enum value: given as that number, or by its name, with or without prefix, in any case."""
    names = _enum_names(enum)
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # of a value or of none: whoever reads the message checks that, as with gRPC
    if isinstance(value, str) and (number := names.get(value.upper())) is not None:
        return number
    offered = ", ".join(one.name for one in enum.values if one.number)
    nearest = _nearest(value.upper(), names) if isinstance(value, str) else ""
    hint = f"did you mean {nearest}?" if nearest else f"there are {offered}"
    raise InvalidOrderError("UNKNOWN_ENUM_VALUE", f"{at}: {_shown(value)} is no value of it; {hint}", at)


def _unknown_field(names: Sequence[str], name: str, at: str) -> InvalidOrderError:
    shown = f"{at}.{_cut(name)}" if at else _cut(name)
    nearest = _nearest(name, names)
    hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(names)}"
    return InvalidOrderError("UNKNOWN_FIELD", f"{_ascii(shown)}: there is no such field; {hint}", _ascii(shown))


@cache
def _fields(kind: Descriptor) -> Mapping[str, FieldDescriptor]:
    """The fields of a message by both names that each has in JSON: `limit_price`, `limitPrice`."""
    return {name: field for field in kind.fields for name in (field.name, field.json_name)}


@cache
def _enum_names(enum: EnumDescriptor) -> Mapping[str, int]:
    """The numbers of an enum by name, with and without the prefix that all of its names have."""
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    named = {value.name: value.number for value in enum.values}
    return {name.removeprefix(prefix): number for name, number in named.items() if number} | named


def _nearest(name: str, names: Iterable[str]) -> str:
    """The name that was probably meant; empty when none is like it."""
    return next(iter(difflib.get_close_matches(name, names, 1)), "")


def _without_repeats(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; raises where a name is there twice, since nobody knows which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _malformed(field: str, message: str) -> InvalidOrderError:
    return InvalidOrderError("MALFORMED_REQUEST", message, field)


def _shown(value: object) -> str:
    """What a caller sent, for a message."""
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _ascii(text: str) -> str:
    """A text that any protocol carries: JSON may hold halves of characters, which have no UTF-8."""
    return text.encode("ascii", "backslashreplace").decode()
