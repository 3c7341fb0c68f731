"""Protocol Buffers' wire format, for messages that are put together of parts which are serialised already.

The bytes of a decision are written once (`server/decision/decision_wire.py`), and stand in a reply as they are. Field
numbers come from the contract's own descriptors, and tests compare what is written here with the generated classes.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_PREFIXED: Final = frozenset((FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE))
_WIRE_TYPE: Final = 2
"""Of what stands behind its length."""
_SHORT: Final = 1 << 14
_LENGTHS: Final = tuple(
    bytes((size,)) if size < 0x80 else bytes((size & 0x7F | 0x80, size >> 7)) for size in range(_SHORT)
)
"""The lengths that nearly every part has, as they are written."""


def prefixed(content: bytes) -> bytes:
    """A message, a string or bytes: the content behind its length."""
    size = len(content)
    return (_LENGTHS[size] if size < _SHORT else _varint(size)) + content


def template(message: Descriptor, *fields: str) -> bytes:
    """A format for `%` with a place for the `prefixed` value of each field, in this order.

    An empty value may be written all the same, unless the field is optional: then it counts as present.

    Raises:
        KeyError: The message has no such field.
        ValueError: A field is no message, string or bytes.
    """
    return b"".join(_tag(message.fields_by_name[name]).replace(b"%", b"%%") + b"%b" for name in fields)


def short_tag(message: Descriptor, field: str, wire_type: int) -> int:
    """What stands before a field's value, for compiled code; below 0x80, so that it takes one byte.

    Raises:
        KeyError: The message has no such field.
        ValueError: Its number takes more.
    """
    tag = message.fields_by_name[field].number << 3 | wire_type
    if tag >= 0x80:
        raise ValueError(f"{message.full_name}.{field} has a number above 15")
    return tag


def _tag(field: FieldDescriptor) -> bytes:
    """What stands before a field's value: its number, and that a length follows."""
    if field.type not in _PREFIXED:
        raise ValueError(f"{field.full_name} is no message, string or bytes")
    return _varint(field.number << 3 | _WIRE_TYPE)


def _varint(number: int) -> bytes:
    wire = bytearray()
    while number >= 0x80:
        wire.append(number & 0x7F | 0x80)
        number >>= 7
    wire.append(number)
    return bytes(wire)
