"""The seven ways in which callers in Python ask by the client library, as one function: an order in, a decision out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Final

from pretrade.client import AsyncClient, Client, Decision, Order
from pretrade.client.asking import Result

CALLS: Final = ("calls of threads", "calls of tasks")
SHARED: Final = ("shared calls of threads", "shared calls of tasks")
BATCHES: Final = ("batches of threads", "batches of tasks")
STREAM: Final = "a stream of tasks"
WAYS: Final = (*CALLS, *SHARED, *BATCHES, STREAM)
ROOMY_SECONDS: Final = 20.0
"""Deadline of calls that say no other: for what ends much sooner, on a machine that has other work."""
ORDER: Final = Order("BTCUSDT.SIM", "buy", 0.05, "twap")

Ask = Callable[..., Decision]


@contextmanager
def asking(way: str, *addresses: str, **options: Any) -> Iterator[Ask]:
    """Connects in one of `WAYS`; options are those of `connect`. What is yielded takes what `decide` takes."""
    options = {"deadline_seconds": ROOMY_SECONDS} | options
    if way.endswith("threads"):
        with Client.connect(*addresses, **options) as threads:
            if way in BATCHES:
                yield lambda order, **named: _only(threads.decide_batch([order], **named))
            else:
                yield threads.decide if way in CALLS else threads.shared().decide
        return
    with asyncio.Runner() as runner:

        async def connect() -> tuple[AsyncClient, Any]:
            client = AsyncClient.connect(*addresses, **options)
            if way in BATCHES:
                return client, _Batches(client)
            if way in CALLS:
                return client, client
            return client, client.shared() if way in SHARED else client.stream()

        client, asker = runner.run(connect())
        try:
            yield lambda *arguments, **named: runner.run(asker.decide(*arguments, **named), context=copy_context())
        finally:
            if way == STREAM:
                runner.run(asker.close())
            runner.run(client.close())


class _Batches:
    """Asks for one order at a time in batches of one."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def decide(self, order: Order, **named: Any) -> Decision:
        return _only(await self._client.decide_batch([order], **named))


def _only(results: list[Result]) -> Decision:
    """What a batch of one order has brought."""
    (result,) = results
    if isinstance(result, Decision):
        return result
    raise result
