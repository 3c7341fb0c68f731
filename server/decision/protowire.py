"""Protocol Buffers' wire format, written directly for the few messages that are too frequent to build as objects first.

Filling and serialising message objects with the fifty fields of a reply and its audit packet took longer than any other
part of a decision. Field numbers come from the contract's own descriptors, and tests compare what is written here with
the generated classes.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_64_BITS: Final = (1 << 64) - 1
_PREFIXED: Final = frozenset((FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_MESSAGE))
_WIRE_TYPES: Final = {
    FieldDescriptor.TYPE_DOUBLE: 1,
    FieldDescriptor.TYPE_FLOAT: 5,
    **dict.fromkeys(_PREFIXED, 2),
}


_PAIRS: Final = tuple(bytes((number & 0x7F | 0x80, number >> 7 | 0x80)) for number in range(1 << 14))
"""The lowest 14 bits of an integer that has more."""
_LAST: Final = tuple(
    bytes((number,)) if number < 0x80 else bytes((number & 0x7F | 0x80, number >> 7)) for number in range(1 << 14)
)
"""The highest 14 bits of an integer, or all of them."""


def varint(number: int) -> bytes:
    """An integer, bool or enum; a negative one as its two's complement in 64 bits."""
    if 0 <= number < 1 << 14:
        return _LAST[number]
    if 0 <= number < 1 << 28:
        return _PAIRS[number & 0x3FFF] + _LAST[number >> 14]
    number &= _64_BITS
    return _PAIRS[number & 0x3FFF] + _PAIRS[number >> 14 & 0x3FFF] + varint(number >> 28)


def prefixed(content: bytes) -> bytes:
    """A message, a string, bytes, or packed numbers: the content behind its length."""
    return varint(len(content)) + content


def template(message: Descriptor, *fields: str) -> bytes:
    """A format for `%` with a place for the encoded value of each field, in this order.

    A value of zero or nothing may be written all the same, unless the field is optional: then it counts as present.

    Raises:
        KeyError: The message has no such field.
    """
    return b"".join(_tag(message.fields_by_name[name]).replace(b"%", b"%%") + b"%b" for name in fields)


def _tag(field: FieldDescriptor) -> bytes:
    """What stands before a field's value: its number and how long the value is."""
    return varint(field.number << 3 | (2 if field.is_repeated else _WIRE_TYPES.get(field.type, 0)))
