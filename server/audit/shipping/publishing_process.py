"""Publishes the journal to a Kafka topic: `python -m server.audit.shipping.publishing_process`, a child of the server.

Every journal entry is published after it was durable, and each decision by itself. The value is a
`pretrade.audit.v1.JournalEntry`. The key is the decision's instrument, so that the decisions of an instrument keep
their order. A `ReplyUnconfirmed` or `ReplyHeard` has the key of its decision if that is among the newest; otherwise it
has no key. A control change has no key either. Delivery is at least once: the headers `journal_id`, `position` and
`row` identify a repetition. Input and output are those of `shipping_process.py`.

The topic `<topic>.heads` says how far each journal has come (`heads.py`), at most a second late. Its key is the
journal's id, so that the brokers keep only the last head of each.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from feature_cache import kafka
from feature_cache.backoff import Backoff
from feature_cache.kafka import create_topic
from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.heads import SigningKey, Stating, heads_topic
from server.audit.shipping.shipping import CLOSE, Progress, TopicTask
from server.errors import AuditError
from server.journal.entries import entry_of, singly
from server.journal.journal_file import Head, JournalReader, Row
from server.process.child import take_task

_STATE_SECONDS: Final = 1.0
"""Least time between two heads on the topic."""
_REMEMBERED: Final = 100_000
"""Newest decisions whose instrument is known when a note about them follows."""


class Publishing:
    """Publishes one journal to one topic, row after row.

    Args:
        task: What to publish, and where to.
        closing: Set when no process writes the journal any more.

    Raises:
        KeyUnusableError: The key that the task names cannot be read.
    """

    def __init__(self, task: TopicTask, closing: threading.Event) -> None:
        self._task = task
        self._closing = closing
        self._key_of_heads = None if task.signing_key is None else SigningKey(task.signing_key)
        self._closed = False
        self._stated: Head | None = None
        self._stated_at = -math.inf
        self._kept = task.journal.with_name(f"{task.journal.name}.{task.settings.topic}.json")
        self._position = 0
        self._skipped = 0
        self._reported: Progress | None = None
        self._instruments: OrderedDict[str, str] = OrderedDict()

    async def run(self) -> None:
        """Publishes for ever."""
        settings = self._task.settings
        backoff = Backoff(settings.retry_min_seconds, settings.retry_max_seconds)
        while True:
            try:
                with closing(JournalReader(self._task.journal)) as journal:
                    self._start(journal)
                    await create_topic(settings.bootstrap_servers or "", settings.topic, settings.partitions)
                    await create_topic(settings.bootstrap_servers or "", heads_topic(settings.topic), 1, compacted=True)
                    brokers = kafka.client(settings.bootstrap_servers or "")
                    producer = AIOKafkaProducer(**brokers, acks="all", linger_ms=5, request_timeout_ms=5000)
                    await producer.start()
                    try:
                        while True:
                            await self._publish(journal, producer)
                            backoff.reset()
                    finally:
                        await producer.stop()
            except (KafkaError, sqlite3.Error, AuditError, OSError) as error:
                self._note(f"{type(error).__name__}: {error}".splitlines()[0])
            await asyncio.sleep(backoff.next_pause())

    def _start(self, journal: JournalReader) -> None:
        """Goes on where the file beside the journal says; where it says nothing, with what the journal holds."""
        anchor = journal.anchor().position
        try:
            kept = json.loads(self._kept.read_bytes())
            position = kept["position"] if kept["journal_id"] == journal.journal_id else anchor
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            position = anchor
        self._skipped += max(0, anchor - position)
        self._position = max(position, anchor)
        self._keep(journal.journal_id)  # also before the brokers were ever reached: nothing is skipped unseen

    async def _publish(self, journal: JournalReader, producer: AIOKafkaProducer) -> None:
        """Publishes the next rows and waits until the brokers have them; or for rows, when there are none."""
        settings = self._task.settings
        rows = journal.settled_rows_after(self._position, settings.batch_rows)
        await self._state(journal, producer, last=not rows)
        if not rows:
            self._note("")
            await asyncio.sleep(settings.poll_seconds)
            return
        if rows[0].position > self._position + 1:  # trimmed while the brokers were away
            self._skipped += rows[0].position - self._position - 1
        sent = []
        for row in rows:
            sent += await self._send(producer, journal.journal_id, row)
        await asyncio.gather(*sent)
        self._position = rows[-1].position
        self._keep(journal.journal_id)
        self._note("")

    async def _state(self, journal: JournalReader, producer: AIOKafkaProducer, *, last: bool) -> None:
        """Publishes how far the journal has come: now and then, and where it ends once everything is published."""
        head, now = journal.head(), time.monotonic()
        closed = last and self._closing.is_set() and head.position == self._position
        due = head != self._stated and now >= self._stated_at + _STATE_SECONDS
        if due or (closed and not self._closed):
            stating = Stating(journal.journal_id, self._task.slot, "", self._key_of_heads)
            stated = stating.head(head, time.time_ns(), closed=closed)
            topic = heads_topic(self._task.settings.topic)
            await producer.send_and_wait(topic, stated, journal.journal_id.encode())
            self._stated, self._stated_at, self._closed = head, now, closed

    async def _send(self, producer: AIOKafkaProducer, journal_id: str, row: Row) -> list[asyncio.Future[object]]:
        """Hands an entry to the producer, each of its decisions by itself."""
        sent: list[asyncio.Future[object]] = []
        held = entry_of(row.entry)
        for number, entry in enumerate(singly(held)):
            headers: Sequence[tuple[str, bytes]] = [
                ("journal_id", journal_id.encode()),
                ("position", str(row.position).encode()),
                ("row", str(number).encode()),
            ]
            value = row.entry if entry is held else entry.SerializeToString()
            sent.append(await producer.send(self._task.settings.topic, value, self._key(entry), headers=headers))
        return sent

    def _key(self, entry: packet_pb2.JournalEntry) -> bytes | None:
        if entry.HasField("decision"):
            self._instruments[entry.decision.decision.decision_id] = entry.decision.order.instrument
            if len(self._instruments) > _REMEMBERED:
                self._instruments.popitem(last=False)
            return entry.decision.order.instrument.encode()
        instrument = self._instruments.get(entry.reply_unconfirmed.decision_id or entry.reply_heard.decision_id)
        return None if instrument is None else instrument.encode()

    def _keep(self, journal_id: str) -> None:
        """Remembers the position. Not synced: what is lost with it is published again."""
        new = self._kept.with_name(f"{self._kept.name}.new")
        new.write_text(json.dumps({"journal_id": journal_id, "position": self._position}))
        new.replace(self._kept)

    def _note(self, error: str) -> None:
        progress = Progress(position=self._position, error=error, skipped=self._skipped, closed=self._closed)
        if progress != self._reported:
            self._reported = progress
            print(progress.model_dump_json(), flush=True)


def main() -> None:
    """Runs the publishing process."""
    closing = threading.Event()
    task = take_task(TopicTask, lambda line: closing.set() if line == CLOSE else None)
    # During an outage aiokafka writes several lines for every attempt; the server says once what matters.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    asyncio.run(Publishing(task, closing).run())


if __name__ == "__main__":
    main()
