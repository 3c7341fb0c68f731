"""Reads what a Redis subscription receives, a burst at a time.

One write of a worker reaches a server as a message for each vector, tens of them in one packet. To ask redis-py for
each of them takes several times as long as to use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redis._parsers.hiredis import NOT_ENOUGH_DATA, _AsyncHiredisParser
from redis.asyncio.client import PubSub


async def next_burst(pubsub: PubSub) -> Iterator[Any]:
    """Waits until something comes, and gives all that is complete then; cancelling loses nothing.

    A message is a list of kind, channel and data, as Redis sent them.

    Raises:
        redis.exceptions.ConnectionError: Redis closed the connection.
    """
    # redis-py has no public name for the connection's parser.
    parser = pubsub.connection._parser  # type: ignore[attr-defined]
    assert isinstance(parser, _AsyncHiredisParser)
    await parser.read_from_socket()  # type: ignore[no-untyped-call]
    return _complete(parser._reader)


def _complete(reader: Any) -> Iterator[Any]:
    while (answer := reader.gets(False)) is not NOT_ENOUGH_DATA:
        yield answer
