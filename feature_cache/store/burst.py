"""Reads what a Redis subscription receives, a packet at a time.

One write of a worker reaches a server as a message for each vector, tens of them in one packet. To ask redis-py for
each of them takes several times as long as to use it, and to wake a task for each packet costs a fifth of the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

from redis._parsers.hiredis import NOT_ENOUGH_DATA, _AsyncHiredisParser
from redis.asyncio.client import PubSub

_READ_BYTES: Final = 2**20


class Bursts(asyncio.Protocol):
    """Takes a subscription's packets from its connection, in the place of redis-py's stream.

    Writing to the connection and closing it stay with redis-py.

    Args:
        pubsub: Has subscribed. Nothing may read from it any more.
        take: Called with all messages that are complete, whenever some are. A message is a list of kind, channel and
            data, as Redis sent them; an answer to a ping may be another value. What it raises ends the reading.
    """

    def __init__(self, pubsub: PubSub, take: Callable[[Iterator[Any]], None]) -> None:
        # redis-py has no public names for a connection's parser and stream.
        connection: Any = pubsub.connection
        assert isinstance(connection._parser, _AsyncHiredisParser)
        reader: Any = connection._parser._reader
        self._feed = reader.feed
        self._next_answer = partial(reader.gets, False)
        self._stream: asyncio.StreamReader = connection._reader
        self._transport: asyncio.Transport = connection._writer.transport
        self._before: Any = self._transport.get_protocol()
        self._take = take
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.heard = False
        """Whether anything came since somebody set it to False."""

    async def run(self, seconds: float) -> None:
        """Reads for so long, or until the connection ends; cancelling loses nothing.

        Raises:
            ConnectionError: The connection has ended.
        """
        if self._transport.get_protocol() is not self:
            if self._transport.is_closing():
                raise ConnectionError("Redis closed the connection")
            self._transport.set_protocol(self)
            await self._take_what_the_stream_holds()
        await asyncio.wait((self._ended,), timeout=max(0.0, seconds))
        if self._ended.done():
            self._ended.result()

    async def _take_what_the_stream_holds(self) -> None:
        if self._stream._buffer:  # type: ignore[attr-defined]
            self.data_received(await self._stream.read(_READ_BYTES))

    def data_received(self, data: bytes) -> None:
        """Takes a packet."""
        self.heard = True
        self._feed(data)
        try:
            self._take(iter(self._next_answer, NOT_ENOUGH_DATA))
        except Exception as error:
            self._end(error)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection has ended."""
        self._end(error or ConnectionError("Redis closed the connection"))
        self._before.connection_lost(error)

    def pause_writing(self) -> None:
        """What is written has to wait, which is the writer's business."""
        self._before.pause_writing()

    def resume_writing(self) -> None:
        """The end of that."""
        self._before.resume_writing()

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # it may be that nobody waits any more
