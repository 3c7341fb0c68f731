"""The engines of every instrument whose partition this worker holds."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from feature_cache.engine.book import EventError
from feature_cache.engine.engine import FeatureEngine
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.delays import Delays
from feature_cache.worker.guests import Guests
from pretrade.market.v1 import market_pb2 as pb

_log = structlog.get_logger(__name__)
_INSTRUMENT: Final = re.compile(r"[A-Za-z0-9_-]{1,40}\.[A-Za-z0-9_-]{1,20}")


class PoisonError(ValueError):
    """A record that no retry can make good.

    Attributes:
        reason: `empty`, `not_protobuf`, `instrument`, `key`, `too_many_instruments`, `contract`, or `failure` for a
            defect of ours.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(slots=True)
class _Partition:
    next_offset: int
    live_from: int
    engines: dict[str, FeatureEngine] = field(default_factory=dict)


class Engines:
    """Records in, changed feature snapshots out; no I/O.

    A partition that is taken over is first read again from some offset. Until it has caught up with where the log ended
    then, its instruments do not count as changed: what they go through is history, which must not replace newer vectors
    written by the partition's former owner.

    Sequences come from the log alone (see `engine`), so on whichever worker and host an instrument is, its newer vector
    has the higher one.

    Args:
        max_instruments: See `WorkerSettings`.
        guests: Computed sets that see what the engines have taken in.
    """

    def __init__(self, max_instruments: int, guests: Guests | None = None) -> None:
        self._max_instruments = max_instruments
        self._guests = Guests() if guests is None else guests
        self._partitions: dict[int, _Partition] = {}
        self._changed: dict[str, FeatureEngine] = {}
        self.writing = asyncio.Lock()
        """Held while changed snapshots are on their way to Redis; partitions are given up only after it is free."""
        self.progress = asyncio.Event()
        """Set when records were taken in; the waiter clears it."""
        self.poison: Counter[str] = Counter()
        """Poison records by reason."""
        self.truncations = 0
        """Times the log no longer reached the position: it had been truncated, or the broker lost it."""
        self.repeats = 0
        """Records that had been taken before; they are ignored."""
        self.delays = Delays()

    def assign(self, partition: int, next_offset: int, live_from: int) -> None:
        """Takes a partition over.

        Args:
            partition: Its number.
            next_offset: The first record that will be taken.
            live_from: Where the log ends now; history ends there.
        """
        self._partitions[partition] = _Partition(next_offset, live_from)

    def begin_again(self, partition: int, next_offset: int, live_from: int) -> None:
        """Takes a held partition over once more, because its log is another: its instruments are unknown until then."""
        self.truncations += 1
        self.revoke((partition,))
        self.assign(partition, next_offset, live_from)

    def revoke(self, partitions: Iterable[int]) -> None:
        """Gives partitions up, with their engines."""
        for partition in partitions:
            state = self._partitions.pop(partition, None)
            if state is not None:
                for instrument in state.engines:
                    self._changed.pop(instrument, None)

    def take(self, partition: int, offset: int, key: bytes | None, value: bytes | None) -> None:
        """Takes one record in; the position advances whatever the record is.

        Records of a partition that is not held, or that lie before its position, are ignored.

        Raises:
            PoisonError: The record is no sound market event; it is counted, and nothing else changed.
        """
        state = self._partitions.get(partition)
        if state is None:
            return
        if offset < state.next_offset:
            self.repeats += 1
            return
        was_history = state.next_offset < state.live_from
        state.next_offset = offset + 1
        try:
            engine, publish_time_ns = self._apply(state, key, value)
        except PoisonError as error:
            self.poison[error.reason] += 1
            raise
        finally:
            if was_history and state.next_offset >= state.live_from:  # offsets may have holes
                self._changed.update(state.engines)
                for each in state.engines.values():
                    self._guests.take(each, None, live=True)
        if state.next_offset > state.live_from:
            self._changed[engine.instrument] = engine
            self.delays.add(publish_time_ns)

    def take_changed(self) -> list[FeatureSnapshot]:
        """Snapshots of the instruments that changed since the last call."""
        changed = [engine.snapshot() for engine in self._changed.values()]
        self._changed.clear()
        return changed

    def put_back(self, snapshots: Iterable[FeatureSnapshot]) -> None:
        """Marks instruments as changed again, because their snapshots could not be written."""
        engines = self.all()
        for snapshot in snapshots:
            if engine := engines.get(snapshot.instrument):
                self._changed[engine.instrument] = engine

    def positions(self) -> dict[int, int]:
        """Offset of the next record by partition."""
        return {partition: state.next_offset for partition, state in list(self._partitions.items())}

    def all(self) -> dict[str, FeatureEngine]:
        """Every engine by instrument."""
        return {
            name: engine for state in list(self._partitions.values()) for name, engine in list(state.engines.items())
        }

    def live(self) -> dict[int, dict[str, FeatureEngine]]:
        """Engines by instrument, by partition that has caught up with the log."""
        return {
            partition: dict(state.engines)
            for partition, state in list(self._partitions.items())
            if state.next_offset >= state.live_from
        }

    @property
    def caught_up(self) -> bool:
        """Whether no partition is still reading history."""
        return all(state.next_offset >= state.live_from for state in list(self._partitions.values()))

    @property
    def held_back(self) -> set[int]:
        """Partitions whose reading should wait: they are history still, and a guest has enough of it for now."""
        if not self._guests.are_busy:
            return set()
        return {number for number, state in self._partitions.items() if state.next_offset < state.live_from}

    def _apply(self, state: _Partition, key: bytes | None, value: bytes | None) -> tuple[FeatureEngine, int]:
        if not value:
            raise PoisonError("empty", "the record has no value")
        try:
            event = pb.MarketEvent.FromString(value)
        except DecodeError as error:
            raise PoisonError("not_protobuf", str(error)) from error
        instrument = event.instrument
        engine = state.engines.get(instrument)
        if engine is None:
            if not _INSTRUMENT.fullmatch(instrument):
                raise PoisonError("instrument", f"{instrument[:80]!r} is not SYMBOL.VENUE")
            if sum(len(other.engines) for other in self._partitions.values()) >= self._max_instruments:
                raise PoisonError(
                    "too_many_instruments", f"{instrument} would be one more than {self._max_instruments}"
                )
            engine = FeatureEngine(instrument)
        if key != instrument.encode():
            raise PoisonError("key", f"is {key!r:.80}, expected the instrument {instrument}")
        try:
            is_news = engine.on_event(event)
        except EventError as error:
            raise PoisonError("contract", str(error)) from error
        except Exception as error:
            # A defect of ours must not end the worker, and with it every other instrument: this one starts again.
            _log.exception("worker.engine_failed", instrument=instrument)
            state.engines.pop(instrument, None)
            self._changed.pop(instrument, None)
            raise PoisonError("failure", repr(error)) from error
        state.engines[instrument] = engine
        if is_news:
            self._guests.take(engine, value, live=state.next_offset > state.live_from)
        return engine, event.publish_time_ns
