"""The order book of one instrument, built from a snapshot and the updates after it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from pretrade.market.v1 import market_pb2 as pb

MAX_BUFFERED_DELTAS: Final = 10_000
CLOSED: Final = "closed"
"""Reason of a `BookReset` with which a feed that is stopped on purpose takes its leave."""


class EventError(ValueError):
    """A market event that breaks the contract.

    Attributes:
        field: The field at fault, for example `delta.bid_lots`.
        rule: The rule it breaks.
    """

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule


class Levels:
    """Prices and sizes of one side, best first.

    Changes come in mostly near the best price. The prices are kept in a list with the best one last, so that finding a
    level is a binary search and inserting or removing one moves only the few better levels.

    Args:
        sign: 1 for bids (the highest price is best), −1 for asks.
    """

    __slots__ = ("_keys", "_sign", "sizes")

    def __init__(self, sign: int) -> None:
        self._sign = sign
        self._keys: list[int] = []  # sign × price, ascending: the best is last
        self.sizes: dict[int, int] = {}
        """Lots by price in ticks; read-only for others."""

    def __len__(self) -> int:
        return len(self._keys)

    def clear(self) -> None:
        """Removes every level."""
        self._keys.clear()
        self.sizes.clear()

    def replace(self, levels: Iterable[tuple[int, int]]) -> None:
        """Takes (ticks, lots) as the whole side; size 0 is no level, and the last one of a price counts."""
        self.sizes = {ticks: lots for ticks, lots in dict(levels).items() if lots}
        sign = self._sign
        self._keys = sorted(sign * ticks for ticks in self.sizes)

    def set(self, ticks: int, lots: int) -> None:
        """Sets the size of one level; 0 removes it, and removing what is not there does nothing."""
        sizes = self.sizes
        if lots:
            if ticks not in sizes:
                insort(self._keys, self._sign * ticks)
            sizes[ticks] = lots
        elif ticks in sizes:
            del sizes[ticks]
            keys = self._keys
            del keys[bisect_left(keys, self._sign * ticks)]

    def best(self) -> tuple[int, int] | None:
        """(ticks, lots) of the best level; None when the side is empty."""
        if not self._keys:
            return None
        ticks = self._sign * self._keys[-1]
        return ticks, self.sizes[ticks]

    def worst(self) -> int | None:
        """Ticks of the level farthest from the best; None when the side is empty."""
        return self._sign * self._keys[0] if self._keys else None

    def top(self, count: int) -> list[tuple[int, int]]:
        """The best `count` levels as (ticks, lots), best first; fewer when there are fewer."""
        sign, sizes = self._sign, self.sizes
        return [(ticks := sign * key, sizes[ticks]) for key in self._keys[: -count - 1 : -1]]


class OrderBook:
    """Order book with the snapshot procedure and the sequence check.

    States::

        unknown ── snapshot that joins the buffered deltas ──▶ valid
        valid ── gap in the update ids, crossed book, reset ──▶ unknown

    While unknown, deltas are buffered. A snapshot at update id L drops the buffered deltas that end at or before L; the
    first one left must begin at or before L + 1, or the book stays unknown until a newer snapshot. While valid, a delta
    must follow on the last update id; one that ends at or before it is stale and dropped. A delta that was already
    partly applied is harmless, since it carries absolute sizes. A newer snapshot replaces a valid book.

    Locked (best bid = best ask) is valid.
    """

    def __init__(self) -> None:
        self.bids = Levels(1)
        self.asks = Levels(-1)
        self.valid = False
        """Whether the book is what the exchange's was at `last_update_id`."""
        self.unknown_because = "no snapshot yet"
        """Why the book is not valid, for people; without meaning while it is."""
        self.last_update_id = 0
        """The last update applied; 0 while none is."""
        self.gaps = 0
        """Times the update ids did not follow on."""
        self.crossings = 0
        """Times the best bid was above the best ask."""
        self.stale = 0
        """Deltas and snapshots older than the book."""
        self._buffer: deque[pb.BookDelta] = deque(maxlen=MAX_BUFFERED_DELTAS)

    def reset(self, reason: str = "reset") -> None:
        """The feed lost continuity: the book is unknown, and update ids may begin again anywhere."""
        self._forget(reason)
        self._buffer.clear()

    def apply_snapshot(self, snapshot: pb.BookSnapshot) -> bool:
        """Takes a full state of the book in, and the buffered deltas after it.

        Returns:
            Whether it was used; False when it is older than the book or than the buffered deltas.
        """
        if self.valid and snapshot.last_update_id < self.last_update_id:
            self.stale += 1
            return False
        buffer = self._buffer
        while buffer and buffer[0].last_update_id <= snapshot.last_update_id:
            buffer.popleft()
        if buffer and _expected(buffer[0]) > snapshot.last_update_id:
            self.stale += 1
            return False
        self.bids.replace(zip(snapshot.bid_ticks, snapshot.bid_lots, strict=True))
        self.asks.replace(zip(snapshot.ask_ticks, snapshot.ask_lots, strict=True))
        self.last_update_id = snapshot.last_update_id
        self.valid = True
        self._check_crossed()
        pending = list(buffer)
        buffer.clear()
        for delta in pending:
            self.apply_delta(delta)
        return True

    def apply_delta(self, delta: pb.BookDelta) -> bool:
        """Takes one change in, or buffers it while the book is unknown.

        Returns:
            Whether the book changed, becoming unknown included.
        """
        if not self.valid:
            self._buffer.append(delta)
            return False
        if delta.last_update_id <= self.last_update_id:
            self.stale += 1
            return False
        if _expected(delta) > self.last_update_id:
            self.gaps += 1
            self._forget("gap")
            self._buffer.append(delta)
            return True
        set_level = self.bids.set
        for ticks, lots in zip(delta.bid_ticks, delta.bid_lots, strict=True):
            set_level(ticks, lots)
        set_level = self.asks.set
        for ticks, lots in zip(delta.ask_ticks, delta.ask_lots, strict=True):
            set_level(ticks, lots)
        self.last_update_id = delta.last_update_id
        self._check_crossed()
        return True

    def to_snapshot(self) -> pb.BookSnapshot:
        """The state as a snapshot message, best levels first."""
        bids, asks = self.bids.top(len(self.bids)), self.asks.top(len(self.asks))
        return pb.BookSnapshot(
            last_update_id=self.last_update_id,
            bid_ticks=[ticks for ticks, _ in bids],
            bid_lots=[lots for _, lots in bids],
            ask_ticks=[ticks for ticks, _ in asks],
            ask_lots=[lots for _, lots in asks],
        )

    def _check_crossed(self) -> None:
        bid, ask = self.bids.best(), self.asks.best()
        if bid and ask and bid[0] > ask[0]:
            self.crossings += 1
            self._forget("crossed")

    def _forget(self, reason: str) -> None:
        self.valid = False
        self.unknown_because = reason
        self.last_update_id = 0
        self.bids.clear()
        self.asks.clear()


def check_snapshot(snapshot: pb.BookSnapshot) -> None:
    """Raises EventError when a snapshot breaks the contract."""
    _check_id("snapshot.last_update_id", snapshot.last_update_id)
    _check_side("snapshot", "bid", snapshot.bid_ticks, snapshot.bid_lots)
    _check_side("snapshot", "ask", snapshot.ask_ticks, snapshot.ask_lots)


def check_delta(delta: pb.BookDelta) -> None:
    """Raises EventError when a delta breaks the contract."""
    _check_id("delta.first_update_id", delta.first_update_id)
    if delta.last_update_id < delta.first_update_id:
        raise EventError("delta.last_update_id", "must not be below first_update_id")
    _check_side("delta", "bid", delta.bid_ticks, delta.bid_lots)
    _check_side("delta", "ask", delta.ask_ticks, delta.ask_lots)


def _check_id(field: str, value: int) -> None:
    if value <= 0:
        raise EventError(field, f"{value} must be positive")


def _check_side(event: str, side: str, ticks: Sequence[int], lots: Sequence[int]) -> None:
    if len(ticks) != len(lots):
        raise EventError(f"{event}.{side}_lots", f"has {len(lots)} entries, {side}_ticks {len(ticks)}")
    if ticks and min(ticks) <= 0:
        raise EventError(f"{event}.{side}_ticks", "must be positive")
    if lots and min(lots) < 0:
        raise EventError(f"{event}.{side}_lots", "must not be negative")


def _expected(delta: pb.BookDelta) -> int:
    """The update id the book must have reached for this delta to follow on."""
    return delta.previous_update_id or delta.first_update_id - 1
