"""Rows of `decisions` as COPY data, made from journal entries without a message in between.

`decision_rows_c.pyx`, where it is compiled, takes plain entries: those whose decisions have no scores of parts, and
whose texts are ASCII. What it does not take, and all where nothing is compiled, goes through `decision_columns.py` and
`binary_copy.py`. A test holds that both ways write the same bytes. A shipment has few different orders, answers and
servers; the fields of each are made once, from its bytes in the entry.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.message import DecodeError

from feature_cache.compiled import compiled
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.columns import EPOCH
from server.audit.store.decision_columns import (
    ANSWER_NAMES,
    ORDER_NAMES,
    SERVER_NAMES,
    answer_part,
    order_part,
    server_part,
)
from server.audit.store.schema import DECISIONS

_compiled: Final = compiled("server.audit.store.decision_rows_c")
_KNOWN: Final = 4096
"""Different parts whose fields are kept for the next shipments."""


class DecisionRows:
    """Decisions of a shipment that can be written as COPY data."""

    def __init__(self) -> None:
        self.rows = 0
        """How many decisions."""
        self.keyed: set[str] = set()
        """The ids of those whose calls have an idempotency key."""
        self._days: set[int] = set()
        self._entries: list[tuple[Any, int, list[bytes], list[bytes], bytes]] = []

    def take(self, entry: bytes, position: int) -> bool:
        """Takes all decisions of an entry, or none.

        Args:
            entry: A row of a journal.
            position: The row's.

        Returns:
            Whether they were taken.
        """
        plain = None if _compiled is None else _compiled.read(entry)
        if plain is None:
            return False
        try:
            orders = [_order_fields(one) for one in (b"", *plain.orders)]
            answers = [_answer_fields(one) for one in (b"", *plain.answers)]
            server = _server_fields(plain.shared)
            for attempt in plain.attempts:
                _check_attempt(attempt)
        except (DecodeError, ValueError, KeyError):  # as in shipment.py, which finds the same
            return False
        self._entries.append((plain, position, orders, answers, server))
        self.rows += plain.rows
        self.keyed.update(plain.keyed)
        self._days |= plain.days
        return True

    def days(self) -> set[dt.date]:
        """The days, UTC, on which they were made."""
        return {EPOCH.date() + dt.timedelta(days=number) for number in self._days}

    def write(self, start: bytes) -> Iterator[bytes]:
        """Their rows.

        Args:
            start: How each of them begins; see `binary_copy.start_of_row`.
        """
        return (plain.write(start, *rest) for plain, *rest in self._entries)


def _fields(names: tuple[str, ...], part: tuple[Any, ...]) -> bytes:
    from server.audit.store.binary_copy import fields_of  # noqa: PLC0415 - numpy, which readers do not need

    return fields_of(DECISIONS, names, part)


@functools.lru_cache(_KNOWN)
def _order_fields(data: bytes) -> bytes:
    return _fields(ORDER_NAMES, order_part(pb.Order.FromString(data)))


@functools.lru_cache(_KNOWN)
def _answer_fields(data: bytes) -> bytes:
    answer = packet_pb2.DecisionPacket.FromString(data)
    if answer.parts:
        raise ValueError("rows of an ensemble bring scores of its parts")
    return _fields(ANSWER_NAMES, answer_part(answer.decision))


@functools.lru_cache(_KNOWN)
def _server_fields(data: bytes) -> bytes:
    return _fields(SERVER_NAMES, server_part(packet_pb2.DecisionPacket.FromString(data)))


@functools.lru_cache(_KNOWN)
def _check_attempt(data: bytes) -> None:
    packet_pb2.Attempt.FromString(data)
