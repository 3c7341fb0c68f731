"""Keeps bars: reads the topic of market events and writes the bars to SQL, and each day that is over to Parquet.

It is a process of its own, and not a part of the feature worker, so that it can never delay `mf1`: not by its work, not
by a database that is slow or away, not by reading hours of the log after it was down. The price is that it builds the
order books once more.

What it has to remember are offsets. It commits, for each partition, the one from which all bars that have not ended can
be made again, after the ended ones are in the database. So a restart, whenever it comes, makes some bars again and
writes the same rows, and none is missing; a database that is away stops the reading until it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError

from feature_cache import kafka
from feature_cache.backoff import Backoff
from feature_cache.bars.bar import Bar
from feature_cache.bars.parquet import write_day
from feature_cache.bars.partition import Partition
from feature_cache.bars.settings import BarsSettings
from feature_cache.bars.store import BarStore, BarStoreError

_BATCH: Final = 1000
_WRITE_SECONDS: Final = 1.0
_LEAVE_SECONDS: Final = 8.0
_RETRY_SECONDS: Final = (0.2, 5.0)
_DAY_NS: Final = 86_400 * 10**9
_EPOCH: Final = dt.date(1970, 1, 1)

_log = structlog.get_logger(__name__)


class Days:
    """Writes the Parquet files of the days that are over, again where a bar of one has been written since.

    Args:
        directory: Where to.
        store: Where from.
    """

    def __init__(self, directory: Path, store: BarStore) -> None:
        self._directory = directory
        self._store = store
        self._changed: set[int] = set()
        self._newest = 0

    def note(self, bars: Iterable[Bar]) -> None:
        """Notes the days of bars that are in the database now."""
        days = {bar.start_ns // _DAY_NS for bar in bars}
        self._changed |= days
        self._newest = max(self._newest, *days)

    def write(self) -> None:
        """Writes what is over.

        Raises:
            BarStoreError, OSError: It will be tried again the next time.
        """
        for day in sorted(day for day in self._changed if day < self._newest):
            date = _EPOCH + dt.timedelta(days=day)
            path = write_day(self._directory, date, self._store.of_day(date))
            self._changed.discard(day)
            _log.info("bars.day_written", path=str(path))


class Keeper:
    """The process.

    Args:
        settings: See there.
        store: Prepared.
        monotonic: Seconds on a clock that never jumps.
    """

    def __init__(
        self, settings: BarsSettings, store: BarStore, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._store = store
        self._monotonic = monotonic
        self._days = Days(settings.parquet_dir, store) if settings.parquet_dir is not None else None
        self.partitions: dict[int, Partition] = {}
        """Those that are held, by number."""
        self.written = 0
        """Bars written, those that were written again included."""
        self.newest_ns = 0
        """Event time at which the newest of them ended."""
        self.interruptions = 0
        """Times that the reading was interrupted."""
        self.refusals = 0
        """Times that the database refused or did not answer."""
        self.problem: str | None = "no partitions assigned"
        """Why bars are not kept just now, for people; None when they are."""
        self._refused = 0

    @property
    def refused(self) -> int:
        """Records that are no sound market event."""
        return self._refused + sum(one.refused for one in list(self.partitions.values()))

    def forget(self) -> None:
        """Forgets what has not been written, after which the reading goes on where it was committed last."""
        self._refused = self.refused
        self.partitions.clear()

    def take_over(self) -> None:
        """The group has settled: partitions are read, unless others of the group have all of them."""
        self.forget()
        self.problem = None

    async def run(self) -> None:
        """Keeps bars for ever, through any outage of brokers and database; ends only by cancellation."""
        backoff = Backoff(*_RETRY_SECONDS)
        while True:
            try:
                await self._consume(backoff)
            except (KafkaError, OSError, BarStoreError) as error:
                self.interruptions += 1
                self.problem = f"interrupted: {error}"
                _log.warning("bars.interrupted", error=str(error), again_in_seconds=round(backoff.seconds, 2))
            await asyncio.sleep(backoff.next_pause())

    async def _consume(self, backoff: Backoff) -> None:
        consumer = AIOKafkaConsumer(
            **kafka.client(self._settings.kafka_bootstrap_servers),
            group_id=self._settings.kafka_group,
            client_id="pretrade-bars",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            session_timeout_ms=6000,
            heartbeat_interval_ms=1000,
        )
        consumer.subscribe([self._settings.kafka_topic], listener=_Rebalance(self))
        try:
            await consumer.start()
            wrote = self._monotonic()
            while True:
                batches = await consumer.getmany(timeout_ms=200, max_records=_BATCH)
                for topic_partition, records in batches.items():
                    number = topic_partition.partition
                    partition = self.partitions.get(number)
                    if partition is None:
                        partition = self.partitions[number] = Partition(records[0].offset)
                    for record in records:
                        partition.take(record.offset, record.value)
                if self._monotonic() - wrote >= _WRITE_SECONDS:
                    await self._write(consumer)
                    wrote = self._monotonic()
                    backoff.reset()
        finally:
            self.forget()
            with contextlib.suppress(KafkaError, OSError, TimeoutError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await consumer.stop()

    async def _write(self, consumer: AIOKafkaConsumer) -> None:
        held = dict(self.partitions)
        bars = [bar for partition in held.values() for bar in partition.ended]
        if not bars:
            return
        await self._store_surely(bars)
        self.written += len(bars)
        self.newest_ns = max(self.newest_ns, *(bar.end_ns for bar in bars))
        for partition in held.values():
            partition.ended.clear()
        topic, assigned = self._settings.kafka_topic, consumer.assignment()
        offsets = {TopicPartition(topic, number): one.read_again_from for number, one in held.items()}
        await consumer.commit({one: offset for one, offset in offsets.items() if one in assigned})
        if self._days is not None:
            self._days.note(bars)
            await asyncio.to_thread(self._days.write)

    async def _store_surely(self, bars: Sequence[Bar]) -> None:
        """Writes bars, as often as it takes: to read them again would take longer."""
        backoff = Backoff(*_RETRY_SECONDS)
        while True:
            try:
                await asyncio.to_thread(self._store.write, bars)
            except BarStoreError as error:
                self.refusals += 1
                self.problem = f"database: {error}"
                _log.warning("bars.not_written", error=str(error), bars=len(bars))
            else:
                self.problem = None
                return
            await asyncio.sleep(backoff.next_pause())


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type information
    """What another process holds from now on is forgotten; it begins where we committed last."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._keeper.forget()

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._keeper.take_over()
