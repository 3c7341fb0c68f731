"""The four ways in which callers in Python ask by the client library, as one function: an order in, a decision out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Final

from pretrade.client import AsyncClient, Client, Decision, Order

WAYS: Final = ("calls of threads", "calls of tasks", "a stream of threads", "a stream of tasks")
CALLS: Final = WAYS[:2]
STREAMS: Final = WAYS[2:]
ORDER: Final = Order("BTCUSDT.SIM", "buy", 0.05, "twap")

Ask = Callable[..., Decision]


@contextmanager
def asking(way: str, *addresses: str, **options: Any) -> Iterator[Ask]:
    """Connects in one of `WAYS`; options are those of `connect`. What is yielded takes what `decide` takes."""
    if way in ("calls of threads", "a stream of threads"):
        with Client.connect(*addresses, **options) as threads:
            if way == "calls of threads":
                yield threads.decide
            else:
                with threads.stream() as stream:
                    yield stream.decide
        return
    with asyncio.Runner() as runner:

        async def connect() -> tuple[AsyncClient, Any]:
            client = AsyncClient.connect(*addresses, **options)
            return client, client if way == "calls of tasks" else client.stream()

        client, asker = runner.run(connect())
        try:
            yield lambda *arguments, **named: runner.run(asker.decide(*arguments, **named), context=copy_context())
        finally:
            if asker is not client:
                runner.run(asker.close())
            runner.run(client.close())
