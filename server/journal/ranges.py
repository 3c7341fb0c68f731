"""What is in ranges of a journal, so that a look-up opens only those that may hold what it looks for.

Each time the entries since the last range fill 2 MiB, the writer notes which instruments, strategies, models, actions
and sources the decisions in them name. The note is a column of the first row of the next commit. It needs no
transaction of its own, it is lost or kept together with that row, and it is trimmed with it.

A look-up may rely on a range to hold nothing else, but it needs no range: entries in none are always read. These are
the newest ones, those of a journal that an older version wrote, and those before a process ended. A range says what was
decided. What became of the replies is in other rows of the journal, which are written later; look-ups read all of them.

Ranges are not evidence. The hashes of the entries do not cover them, and `verify` does not read them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from google.protobuf.message import DecodeError

from feature_cache.compiled import compiled
from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb

RANGE_BYTES: Final = 2 * 2**20
"""Entries of a range, at least. A look-up reads so much in some 20 ms, and 10 GiB have 5,000 ranges."""
_MOST_VALUES: Final = 200
"""A range does not list more values of one kind: it may hold any, then."""
_PARTS: Final = 1_000
"""Different orders or answers that wait to be parsed."""
_KNOWN: Final = 4_096
"""Different orders and answers whose values are kept for the next ranges."""

Scanned = tuple[bytes, bytes, bool]
"""Of the decisions in an entry: the least id and the greatest, empty without one, and whether any has a key."""


@dataclass(frozen=True, slots=True)
class Range:
    """What is in all entries between two positions. None stands for any value."""

    first: int
    """Position of the first entry."""
    last: int
    """Position of the last entry."""
    oldest_id: str
    """The least id of a decision; empty without one."""
    newest_id: str
    """The greatest."""
    has_keys: bool
    """Whether the call of any decision has an idempotency key."""
    instruments: Collection[str] | None
    strategies: Collection[str] | None
    models: Collection[str] | None
    """Names of models and their versions."""
    actions: Collection[int] | None
    """What was decided."""
    sources: Collection[int] | None


_FIELDS: Final = [field.name for field in fields(Range) if field.name != "last"]


def read_range(last: int, text: str) -> Range | None:
    """The range that ends at a position; None when the text is not what `Notes.text` gave."""
    try:
        values = json.loads(text)
        found = Range(last=last, **{name: values[name] for name in _FIELDS})
        return found if 0 < found.first <= last else None
    except (ValueError, TypeError, KeyError):
        return None


class Notes:
    """Takes note of what is in the entries of one range.

    Args:
        first: Position of its first entry.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._bytes = 0
        self._orders: set[bytes] = set()
        """As they stand in the entries, like answers. Most entries have the same ones."""
        self._answers: set[bytes] = set()
        self._of_orders: tuple[set[Any], ...] = (set(), set())
        """Instruments and strategies."""
        self._of_answers: tuple[set[Any], ...] = (set(), set(), set())
        """Models, actions and sources."""
        self._oldest = self._newest = b""
        self._has_keys = False

    @property
    def are_full(self) -> bool:
        """Whether the range is to end here."""
        return self._bytes >= RANGE_BYTES

    def add(self, entries: Iterable[bytes]) -> None:
        """Takes note of the next entries."""
        for entry in entries:
            self._bytes += len(entry)
            oldest, newest, has_keys = scan(entry, self._orders, self._answers)
            if newest:  # else there is no decision in it
                self._oldest = min(oldest, self._oldest) if self._newest else oldest
            self._newest = max(self._newest, newest)
            self._has_keys = self._has_keys or has_keys
            if len(self._orders) > _PARTS or len(self._answers) > _PARTS:
                self._parse()

    def text(self) -> str:
        """What is in the range, as it is written down."""
        self._parse()
        instruments, strategies, models, actions, sources = (
            None if len(values) > _MOST_VALUES else sorted(values) for values in (*self._of_orders, *self._of_answers)
        )
        noted = Range(
            first=self._first,
            last=0,
            oldest_id=self._oldest.decode(errors="replace"),
            newest_id=self._newest.decode(errors="replace"),
            has_keys=self._has_keys,
            instruments=instruments,
            strategies=strategies,
            models=models,
            actions=actions,
            sources=sources,
        )
        values = asdict(noted)
        del values["last"]  # it is the position before the row's own
        return json.dumps(values, separators=(",", ":"))

    def _parse(self) -> None:
        for parts, values_of, seen in (
            (self._orders, _values_of_order, self._of_orders),
            (self._answers, _values_of_answer, self._of_answers),
        ):
            for part in parts:
                for known, values in zip(seen, values_of(part), strict=True):
                    known.update(values)
            parts.clear()


def scan_plainly(entry: bytes, orders: set[bytes], answers: set[bytes]) -> Scanned:
    """Finds what a range notes of an entry; `ranges_c.pyx`, where it is compiled, does the same without a message.

    Args:
        entry: A serialised `JournalEntry`.
        orders: The serialised orders of its decisions are added.
        answers: The serialised answers are added, packets with a decision.
    """
    ids: Sequence[str]
    keys: Sequence[str]
    try:
        parsed = packet_pb2.JournalEntry.FromString(entry)
    except DecodeError:
        return b"", b"", False  # nor does a look-up find anything in it
    match parsed.WhichOneof("entry"):
        case "decisions":
            batch = parsed.decisions
            orders.update(order.SerializeToString() for order in batch.orders)
            answers.update(answer.SerializeToString() for answer in batch.answers)
            ids, keys = batch.decision_id, batch.idempotency_key
        case "decision":
            packet = parsed.decision
            orders.add(packet.order.SerializeToString())
            answers.add(packet_pb2.DecisionPacket(decision=packet.decision).SerializeToString())
            ids, keys = (packet.decision.decision_id,), (packet.order.idempotency_key,)
        case _:
            return b"", b"", False
    return min(ids, default="").encode(), max(ids, default="").encode(), any(keys)


def _scan(entry: bytes, orders: set[bytes], answers: set[bytes]) -> Scanned:
    """The same where `ranges_c.pyx` is compiled: it takes the entries that servers write."""
    assert _compiled is not None
    found: Scanned | None = _compiled.scan(entry, orders, answers)
    return scan_plainly(entry, orders, answers) if found is None else found


@functools.lru_cache(maxsize=_KNOWN)
def _values_of_order(part: bytes) -> tuple[tuple[str, ...], ...]:
    try:
        order = pb.Order.FromString(part)
    except DecodeError:
        return (), ()
    return (order.instrument,), (order.strategy,)


@functools.lru_cache(maxsize=_KNOWN)
def _values_of_answer(part: bytes) -> tuple[tuple[str, ...] | tuple[int, ...], ...]:
    try:
        decision = packet_pb2.DecisionPacket.FromString(part).decision
    except DecodeError:
        return (), (), ()
    return (decision.model_name, decision.model_version), (decision.action,), (decision.source,)


_compiled: Final = compiled("server.journal.ranges_c")
scan: Final[Callable[[bytes, set[bytes], set[bytes]], Scanned]] = scan_plainly if _compiled is None else _scan
"""As `scan_plainly`, compiled where it can be."""
