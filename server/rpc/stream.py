"""`DecideStream`: orders as they come, results as they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final

from pydantic import BaseModel, ConfigDict

from feature_cache.constants import Constant
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.plane import DataPlane, Deciding
from server.errors import InvalidOrderError, PretradeError
from server.journal.protowire import prefixed, template
from server.rpc.call import Call
from server.rpc.orders import Asked, Begun, Orders, Reply, earlier, own_seconds

_RESULT: Final = template(pb.DecideStreamResponse.DESCRIPTOR, "result")


class StreamSettings(BaseModel):
    """Bounds of one `DecideStream`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_in_flight: Constant[int] = 256
    """Orders of one stream under way at once; the server reads no further until one is answered."""


class Streams:
    """Decides the orders of streams.

    Args:
        dataplane: Decides.
        orders: Begins with orders, and says what became of them.
        settings: Bounds of a stream.
        clock: Monotonic seconds.
    """

    def __init__(
        self, dataplane: DataPlane, orders: Orders, settings: StreamSettings, clock: Callable[[], float]
    ) -> None:
        self._dataplane = dataplane
        self._orders = orders
        self._settings = settings
        self._clock = clock

    async def decide(self, requests: AsyncIterator[Asked], call: Call, most: int) -> AsyncGenerator[list[Reply]]:
        """Results, those that are ready at one instant together, up to so many.

        A stream is read no faster than its orders are decided: the next one is read when there is room for it, and
        waits for a place for half of its time at most. What is not read stays with the caller, who notices when it
        writes. If the server read on, it would have to refuse the orders, or they would be late before they were begun.
        """
        ready: asyncio.Queue[Reply | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._settings.max_in_flight)
        deciding: dict[Deciding, Begun] = {}

        def decided(future: Deciding) -> None:
            begun = deciding.pop(future, None)
            if begun is not None:  # else it was given up
                ready.put_nowait(self._result_in_stream(begun, call))

        async def read() -> None:
            await room.acquire()
            async for order in requests:
                arrived = self._clock()
                if self._dataplane.must_wait and not order.reduce_only:
                    await self._dataplane.place(self._dataplane.capped(arrived, _own_deadline(order, arrived)))
                begun = self._begin_in_stream(order, arrived, call)
                if isinstance(begun.decided, PretradeError):
                    ready.put_nowait(self._result_in_stream(begun, call))
                else:
                    deciding[begun.decided] = begun
                    begun.decided.add_done_callback(decided)
                await room.acquire()

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: ready.put_nowait(None))
        under_way: list[Reply] = []
        try:
            while deciding or not reader.done() or not ready.empty():
                result = await ready.get()
                while result is not None:  # else there are no more orders
                    room.release()
                    under_way.append(self._orders.in_time(result))
                    result = ready.get_nowait() if len(under_way) < most and not ready.empty() else None
                if under_way:
                    yield [Reply(_RESULT % prefixed(one.wire)) for one in under_way]
                self._dataplane.heard([decided for one in under_way for decided in one.decisions])
                under_way = []
            await reader
        finally:
            reader.cancel()
            for reply in under_way:
                self._orders.not_sent(reply)
            while not ready.empty():
                self._orders.not_sent(ready.get_nowait())
            for begun in deciding.values():
                self._orders.give_up(begun)
            deciding.clear()

    def _begin_in_stream(self, asked: Asked, arrived: float, call: Call) -> Begun:
        if asked.order_ref:
            return self._orders.begin(asked, arrived, None, call, self._orders.context_of(call), in_company=True)
        missing = InvalidOrderError("MISSING_ORDER_REF", "order_ref: required in a stream", "order_ref")
        return Begun(asked, arrived, missing, None)

    def _result_in_stream(self, begun: Begun, call: Call) -> Reply:
        result = self._orders.result(begun, call)
        if result.decisions:
            own = earlier(begun.own_seconds, begun.arrived, None)
            result.deadline = self._dataplane.capped(begun.arrived, own)
        return result


def _own_deadline(order: Asked, arrived: float) -> float | None:
    """The instant until which an order itself allows, not yet checked; None when it does not say."""
    return earlier(own_seconds(order), arrived, None)
