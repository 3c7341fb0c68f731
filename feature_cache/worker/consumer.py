"""The Kafka side of the worker: topic, group membership, rewinding, commits, dead letters."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from feature_cache import kafka
from feature_cache.backoff import Backoff
from feature_cache.worker.engines import Engines, PoisonError
from feature_cache.worker.settings import WorkerSettings

DEAD_LETTER_SUFFIX: Final = ".dlq"
_BATCH: Final = 500
_CHECK_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 3.0
_LEAVE_SECONDS: Final = 8.0  # a member that is just joining does so first, which takes seconds
_SECOND_LOOK_SECONDS: Final = 0.25
_LOOKS: Final = 4
_RECONNECT_SECONDS: Final = (0.2, 5.0)
_GUESTS_SECONDS: Final = 0.02
_MOST_FOR_GUESTS_SECONDS: Final = 5.0
"""Of a take-over, for which history waits for guests at most: the books of `mf1` are unknown meanwhile."""
_DEAD_LETTERS: Final = 1000
_DEAD_LETTER_BYTES: Final = 100_000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _DeadLetter:
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]


class MarketEventConsumer:
    """Feeds the records of the topic to the engines, through any outage of the brokers.

    When a partition is taken over, it is read again from `rewind_seconds` ago, so that books and windows are complete
    without any stored state. Offsets of what has been written to Redis are committed about once a second. No worker
    starts from them, but Kafka's tools show the group's lag by them.

    A log that shrank was truncated, or lost by the broker: the partition is taken over once more. An end below the
    position is no proof of it, since the embedded broker gives the last batch's first offset for the end; an end below
    an earlier one is, or a refused fetch, once it has been seen several times in a row.

    Args:
        settings: See there.
        engines: What the records go to.
        dead_letters: Where poison records go.
        monotonic: Seconds on a clock that never jumps.
        wall_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engines: Engines,
        dead_letters: DeadLetters,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings = settings
        self._engines = engines
        self._dead_letters = dead_letters
        self._monotonic = monotonic
        self._wall_ns = wall_ns
        self._assigned = False
        self._waited = 0.0  # for guests, since partitions were taken over
        self._answered = -float("inf")
        self._take_over_error: Exception | None = None
        self._committed: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._refused: set[int] = set()  # partitions in which a fetch was out of range
        self._looks: dict[int, int] = {}  # by partition, how often in a row the log seemed to have shrunk
        self.written: dict[int, int] = {}
        """Offset of the next record by partition, as of the last write to Redis; what may be committed."""
        self.lag: dict[int, int] = {}
        """Records between position and end of the log by partition, about a second old. The embedded broker's end lies
        before its last batch, so that the lag may be too low by that many records: nothing but this figure and its
        limit for readiness, which is far larger than a batch, depends on it."""
        self.failures = 0
        """Times the brokers did not answer, or refused."""

    @property
    def problem(self) -> str | None:
        """Why the newest events may not be here, for people; None when they are."""
        if self._monotonic() - self._answered > _CHECK_SECONDS + 2 * _ANSWER_SECONDS:
            return "kafka does not answer"
        if not self._assigned:
            return "no partitions assigned"
        if not self._engines.caught_up:
            return "reading history"
        return None

    async def run(self) -> None:
        """Consumes for ever; ends only by cancellation, which leaves the group."""
        backoff = Backoff(*_RECONNECT_SECONDS)
        while True:
            try:
                await kafka.create_topic(
                    self._settings.kafka_bootstrap_servers,
                    self._settings.kafka_topic,
                    self._settings.kafka_partitions,
                    self._settings.kafka_replicas,
                    kafka.MAX_EVENT_BYTES,
                )
                await self._consume()
            except* (KafkaError, OSError, TimeoutError) as errors:
                self.failures += 1
                again = round(backoff.seconds, 2)
                _log.warning("worker.kafka_lost", error=repr(errors.exceptions[0]), again_in_seconds=again)
            if self._assigned:
                backoff.reset()
            self._assigned = False
            await asyncio.sleep(backoff.next_pause())

    async def _consume(self) -> None:
        consumer = AIOKafkaConsumer(
            **kafka.client(self._settings.kafka_bootstrap_servers),
            group_id=self._settings.kafka_group,
            client_id="pretrade-feature-worker",
            enable_auto_commit=False,
            auto_offset_reset="none",  # where to begin is ours to say, at the start and after a truncation
            fetch_max_wait_ms=round(self._settings.fetch_wait_seconds * 1000),
            session_timeout_ms=6000,
            heartbeat_interval_ms=1000,
            request_timeout_ms=10_000,
        )
        self._take_over_error = None
        consumer.subscribe([self._settings.kafka_topic], listener=_Rebalance(self, consumer))
        try:
            await consumer.start()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._poll(consumer))
                tasks.create_task(self._check(consumer))
        finally:
            self._engines.revoke(self._engines.positions())
            # Whatever goes wrong here must not replace what ended the consumption, a cancellation above all.
            with contextlib.suppress(KafkaError, OSError):
                async with asyncio.timeout(_LEAVE_SECONDS):
                    await consumer.stop()
            self._engines.revoke(self._engines.positions())  # of a rebalance that was still under way

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        take = self._engines.take
        while True:
            if self._take_over_error is not None:
                raise self._take_over_error
            try:
                batches = await self._next(consumer)
            except NoOffsetForPartitionError:
                await asyncio.sleep(self._settings.poll_interval_seconds)  # it is being taken over just now
                continue
            except OffsetOutOfRangeError as error:
                self._refused.update(partition.partition for partition in error.args[0])
                await asyncio.sleep(_SECOND_LOOK_SECONDS)
                continue
            for partition, records in batches.items():
                for record in records:
                    try:
                        take(partition.partition, record.offset, record.key, record.value)
                    except PoisonError as error:
                        self._dead_letters.add(record, error)
            if batches:
                self._engines.delays.all_read()
                self._engines.progress.set()
                # Behind, only the writer has its turn: a full buffer is returned without a pause.
                full = sum(map(len, batches.values())) == _BATCH
                await asyncio.sleep(0 if full else self._settings.poll_interval_seconds)

    async def _next(self, consumer: AIOKafkaConsumer) -> dict[TopicPartition, list[ConsumerRecord]]:
        """The next records. History waits a while for guests that have enough of it; what is live never does."""
        held_back = self._engines.held_back if self._waited < _MOST_FOR_GUESTS_SECONDS else set()
        if not held_back:
            found: dict[TopicPartition, list[ConsumerRecord]] = await consumer.getmany(
                timeout_ms=1000, max_records=_BATCH
            )
            return found
        began = self._monotonic()
        live = [one for one in consumer.assignment() if one.partition not in held_back]
        if live:
            found = await consumer.getmany(*live, timeout_ms=round(_GUESTS_SECONDS * 1000), max_records=_BATCH)
        else:
            await asyncio.sleep(_GUESTS_SECONDS)
            found = {}
        self._waited += self._monotonic() - began
        return found

    async def _check(self, consumer: AIOKafkaConsumer) -> None:
        """Asks the brokers for the ends of the log, for lag and for a sign of life, and commits."""
        answering = True
        while True:
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._check_once(consumer)
                answering = True
            except (KafkaError, TimeoutError) as error:
                self.failures += 1
                if answering:
                    _log.warning("worker.kafka_check_failed", error=repr(error))
                answering = False
            await asyncio.sleep(_SECOND_LOOK_SECONDS if self._looks else _CHECK_SECONDS)

    async def _check_once(self, consumer: AIOKafkaConsumer) -> None:
        assigned = list(consumer.assignment())
        starts, ends = await asyncio.gather(consumer.beginning_offsets(assigned), consumer.end_offsets(assigned))
        self._answered = self._monotonic()
        positions = self._engines.positions()
        for partition in assigned:
            if self._has_shrunk(partition.partition, positions, starts[partition], ends[partition]):
                await self._rewind(consumer, [partition])
        self.lag = {
            partition.partition: max(0, end - positions[partition.partition])
            for partition, end in ends.items()
            if partition.partition in positions
        }
        await self.commit(consumer)

    def _has_shrunk(self, partition: int, positions: dict[int, int], start: int, end: int) -> bool:
        """Whether a partition's log has seemed to lack its position often enough to believe it."""
        position = positions.get(partition, start)
        highest = self._ends[partition] = max(end, self._ends.get(partition, end))
        if start <= position and end >= highest and (end >= position or partition not in self._refused):
            self._looks.pop(partition, None)
            self._refused.discard(partition)
            return False
        self._looks[partition] = self._looks.get(partition, 0) + 1
        return self._looks[partition] >= _LOOKS

    async def commit(self, consumer: AIOKafkaConsumer) -> None:
        """Commits what has been written and is still held. Cancelling is safe.

        Raises:
            KafkaError: The group has moved on, or the brokers refuse.
        """
        held = self._engines.positions()
        news = {
            partition: offset
            for partition, offset in self.written.items()
            # Above the position lies what was written before the log was truncated.
            if offset <= held.get(partition, -1) and self._committed.get(partition) != offset
        }
        if news:
            topic = self._settings.kafka_topic
            await consumer.commit({TopicPartition(topic, partition): offset for partition, offset in news.items()})
            self._committed.update(news)

    async def release(self, consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition]) -> None:
        """Gives up partitions before another worker gets them: pending writes to Redis finish and are committed."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS), self._engines.writing:
                await self.commit(consumer)
        except (KafkaError, TimeoutError) as error:
            _log.warning("worker.commit_failed", error=repr(error))
        finally:
            self._engines.revoke([partition.partition for partition in partitions])
            self._assigned = False  # until the group has settled, which a broker may not let it

    async def take_over(self, consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition]) -> None:
        """Finds where to begin in each partition and goes there."""
        try:
            await self._rewind(consumer, list(partitions))
        except Exception as error:
            self._take_over_error = error  # aiokafka swallows what a rebalance listener raises
        else:
            self._answered = self._monotonic()
            self._assigned = True
            self._waited = 0.0

    async def _rewind(self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> None:
        if not partitions:
            return
        since_ms = self._wall_ns() // 1_000_000 - round(self._settings.rewind_seconds * 1000)
        starts, ends = await asyncio.gather(
            consumer.offsets_for_times(dict.fromkeys(partitions, since_ms)), consumer.end_offsets(partitions)
        )
        for topic_partition in partitions:
            start, end = starts.get(topic_partition), ends[topic_partition]
            # Nothing that young: some brokers say so with no answer, others with an answer without a timestamp.
            offset = end if start is None or start.timestamp < 0 else min(start.offset, end)
            consumer.seek(topic_partition, offset)
            partition = topic_partition.partition
            # An end never goes back, whoever has held the partition since, unless the log is another.
            lost = partition in self._engines.positions() or end < self._ends.get(partition, 0)
            for known in (self._committed, self.written, self._ends, self._looks):
                known.pop(partition, None)
            self._refused.discard(partition)
            take_over = self._engines.begin_again if lost else self._engines.assign
            take_over(partition, offset, end)
            if lost:
                _log.warning("worker.log_truncated", partition=partition, offset=offset, end=end)
            _log.info("worker.partition_taken", partition=partition, offset=offset, end=end)


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no type information
    def __init__(self, owner: MarketEventConsumer, consumer: AIOKafkaConsumer) -> None:
        self._owner = owner
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        await self._owner.release(self._consumer, revoked)

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        await self._owner.take_over(self._consumer, assigned)


class DeadLetters:
    """Sends poison records to a topic of their own, in the background.

    The key and value are as they were (a value beyond 100,000 bytes is cut); headers say why, and where the record
    was. A letter that cannot be sent within a few attempts, or that finds the queue full, is dropped and counted: bad
    records must not hold up good ones.

    Args:
        bootstrap_servers: Comma-separated `host:port`.
        topic: The topic of the letters.
    """

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._bootstrap_servers = bootstrap_servers
        self._topic = topic
        self._queue: asyncio.Queue[_DeadLetter] = asyncio.Queue(_DEAD_LETTERS)
        self._seen = 0
        self.sent = 0
        """Letters the brokers have."""
        self.dropped = 0
        """Letters given up."""

    def add(self, record: ConsumerRecord, error: PoisonError) -> None:
        """Queues a record; never waits."""
        position = f"{record.topic}/{record.partition}/{record.offset}"
        self._seen += 1
        if self._seen.bit_count() == 1:  # the 1st, 2nd, 4th, 8th …: a flood of them must not flood the log
            _log.warning("worker.poison", count=self._seen, position=position, reason=error.reason, detail=str(error))
        value = record.value
        headers = [
            ("reason", error.reason.encode()),
            ("detail", str(error).encode()),
            ("position", position.encode()),
            ("bytes", str(len(value or b"")).encode()),
        ]
        try:
            self._queue.put_nowait(_DeadLetter(record.key, value and value[:_DEAD_LETTER_BYTES], headers))
        except asyncio.QueueFull:
            self.dropped += 1

    async def run(self) -> None:
        """Sends for ever; ends only by cancellation, which drops what is queued."""
        while True:
            letter = await self._queue.get()
            try:
                await self._send_from(letter)
            except (KafkaError, OSError) as error:
                self.dropped += 1
                _log.warning("worker.dead_letter_dropped", error=repr(error))

    async def _send_from(self, letter: _DeadLetter) -> None:
        """Sends a letter and all that are queued or come within a while after it."""
        producer = AIOKafkaProducer(**kafka.client(self._bootstrap_servers), request_timeout_ms=5000)
        await producer.start()
        try:
            while True:
                await producer.send_and_wait(self._topic, letter.value, letter.key, headers=letter.headers)
                self.sent += 1
                try:
                    async with asyncio.timeout(10):
                        letter = await self._queue.get()
                except TimeoutError:
                    return
        finally:
            with contextlib.suppress(KafkaError, OSError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await producer.stop()
