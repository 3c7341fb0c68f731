"""Reading the heads of journals that servers have published; needs the extra `worker`."""

from __future__ import annotations

import asyncio
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from google.protobuf.message import DecodeError

from feature_cache import kafka
from pretrade.audit.v1 import packet_pb2
from server.audit.shipping.heads import heads_topic
from server.errors import AuditUnavailableError

_PATIENCE_SECONDS: Final = 30.0


def read_heads(bootstrap_servers: str, topic: str) -> list[packet_pb2.JournalHead]:
    """Every head that is still on the topic beside `topic`.

    Raises:
        AuditUnavailableError: The brokers cannot be reached, or hold something else there.
    """
    try:
        return asyncio.run(_read(bootstrap_servers, heads_topic(topic)))
    except (KafkaError, OSError, TimeoutError, DecodeError) as error:
        raise AuditUnavailableError(f"the topic {heads_topic(topic)}: {error!r}") from error


async def _read(bootstrap_servers: str, topic: str) -> list[packet_pb2.JournalHead]:
    consumer = AIOKafkaConsumer(**kafka.client(bootstrap_servers), enable_auto_commit=False)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await consumer.start()
        try:
            partition = TopicPartition(topic, 0)
            consumer.assign([partition])
            end = (await consumer.end_offsets([partition]))[partition]
            await consumer.seek_to_beginning(partition)
            heads = []
            while await consumer.position(partition) < end:
                for records in (await consumer.getmany(partition, timeout_ms=500)).values():
                    heads += [packet_pb2.JournalHead.FromString(record.value) for record in records if record.value]
            return heads
        finally:
            await consumer.stop()
