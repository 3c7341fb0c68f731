"""Labels from the events that a real broker holds are those from the events themselves."""

from __future__ import annotations

import pytest

from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from server.audit.reading.labels import events_of_topic

pytestmark = pytest.mark.stack


async def test_every_event_of_a_topic_is_read_those_of_an_instrument_in_order(kafka_bootstrap_servers: str) -> None:
    events = list(simulate(3, duration_seconds=5.0))
    async with EventPublisher(kafka_bootstrap_servers, "market.events") as publisher:
        await publisher.publish(events, speed=None)
    read = [event async for event in events_of_topic(kafka_bootstrap_servers, "market.events")]
    for instrument in {event.instrument for event in events}:
        sent = [event.event_time_ns for event in events if event.instrument == instrument]
        assert [event.event_time_ns for event in read if event.instrument == instrument] == sent


async def test_an_empty_topic_ends_at_once(kafka_bootstrap_servers: str) -> None:
    async with EventPublisher(kafka_bootstrap_servers, "market.events"):
        pass
    assert [event async for event in events_of_topic(kafka_bootstrap_servers, "market.events")] == []
