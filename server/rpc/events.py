"""The events of a stream as callers over HTTP get them: JSON, each with the place where to go on after it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from server.rpc.call import Call


class Event(NamedTuple):
    """One event."""

    cursor: str
    """Where to go on after it."""
    text: bytes
    """The answer's message as JSON, in one line."""


Watch = Callable[[Any, Call], AsyncGenerator[Sequence[Event]]]
"""A servicer's method that answers a request with events, as many at once as there are."""


def document_of(message: Message) -> dict[str, Any]:
    """A message as an object, in proto3's own mapping, with the contract's names."""
    return MessageToDict(message, preserving_proto_field_name=True)


def dumped(document: object) -> bytes:
    """JSON in one line."""
    return json.dumps(document, separators=(",", ":")).encode()


def json_of(message: Message) -> bytes:
    """A message as JSON in one line."""
    return dumped(document_of(message))
