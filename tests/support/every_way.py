"""A load by the Python client library in every way that it has of asking, and what its callers heard."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

from pretrade.client import AsyncClient, CallError, Client, Order
from support.harness import INSTRUMENTS, MID, eventually

_BATCH: Final = 3
"""Orders in a call of those who ask for batches."""
_OF_THREADS: Final = ("call-of-threads", "shared-of-threads", "batch-of-threads")
_OF_TASKS: Final = ("call-of-tasks", "shared-of-tasks", "batch-of-tasks", "stream-of-tasks")
_SECONDS: Final = 20.0
"""Room for an order that is asked for again, on a machine that has other work."""
_PATIENCE_SECONDS: Final = 100.0
"""In which callers of every way have made some calls."""


class Heard(NamedTuple):
    """A decision, as its caller heard it."""

    order_ref: str
    decision_id: str
    source: str
    server: str


class EveryWay:
    """Callers who ask one thing after another in every way, from entering the context until leaving it.

    Threads share one client and tasks another one, and those of one way its shared calls or its stream. Every order has
    a reference of its own.

    Args:
        addresses: Servers; the others are asked while the first is away.
        deadline_seconds: Of every call.
        callers: Of each way.
    """

    def __init__(self, *addresses: str, deadline_seconds: float = _SECONDS, callers: int = 2) -> None:
        self.heard: Final[list[Heard]] = []
        self.errors: Final[list[str]] = []
        self._addresses: Final = addresses
        self._deadline_seconds: Final = deadline_seconds
        self._callers: Final = callers
        self._ended: Final[list[str]] = []
        """The way of every call that has."""
        self._stopped: Final = threading.Event()
        self._running: Final = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._running.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._running.join()

    def wait_for_more(self, calls: int) -> None:
        """Waits until so many more calls of every way have ended."""
        before = Counter(self._ended)

        def made() -> int:
            now = Counter(self._ended)
            return min(now[way] - before[way] for way in (*_OF_THREADS, *_OF_TASKS))

        eventually(made, lambda found: found >= calls, _PATIENCE_SECONDS)

    def decided_once(self, *audits: Mapping[str, Sequence[str]]) -> None:
        """Checks that every decision that was heard is the only one of its order where it was made.

        Args:
            audits: Of each server, the ids of its decisions by their orders' references.
        """
        where = dict(zip(self._addresses, audits, strict=True))
        wrong = [one for one in self.heard if list(where[one.server].get(one.order_ref, ())) != [one.decision_id]]
        assert wrong == []

    def _run(self) -> None:
        """Of the thread that has the event loop: a process is to have one."""
        with Client.connect(*self._addresses, deadline_seconds=self._deadline_seconds) as client:
            threads = []
            for way in _OF_THREADS:
                ask = _asked(way, client, client.shared())
                callers = range(self._callers)
                threads += [threading.Thread(target=self._call, args=(ask, way, number)) for number in callers]
            for thread in threads:
                thread.start()
            asyncio.run(self._tasks())
            for thread in threads:
                thread.join()

    async def _tasks(self) -> None:
        async with (
            AsyncClient.connect(*self._addresses, deadline_seconds=self._deadline_seconds) as client,
            client.stream() as stream,
            asyncio.TaskGroup() as tasks,
        ):
            for way in _OF_TASKS:
                ask = _asked(way, client, client.shared(), stream)
                for number in range(self._callers):
                    tasks.create_task(self._call_in_task(ask, way, number))

    def _call(self, ask: Any, way: str, number: int) -> None:
        for orders in self._orders(way, number):
            try:
                self._take(way, ask(orders))
            except CallError as error:
                self._take(way, error)

    async def _call_in_task(self, ask: Any, way: str, number: int) -> None:
        for orders in self._orders(way, number):
            try:
                self._take(way, await ask(orders))
            except CallError as error:
                self._take(way, error)

    def _orders(self, way: str, number: int) -> Iterator[Sequence[Order]]:
        """What a caller asks for, until the end."""
        for call in itertools.count():
            if self._stopped.is_set():
                return
            yield [
                Order(INSTRUMENTS[number % 2], "buy", 0.01, f"{way}-{number}", MID, f"{way}-{number}-{call}-{place}")
                for place in range(_BATCH if way.startswith("batch") else 1)
            ]

    def _take(self, way: str, answer: Any) -> None:
        """Keeps what a call has brought."""
        for result in answer if isinstance(answer, list) else [answer]:
            if isinstance(result, CallError):
                self.errors.append(f"{way}: {result}")
            else:
                self.heard.append(Heard(result.order_ref, result.decision_id, result.source, result.server))
        self._ended.append(way)


def _asked(way: str, client: Any, shared: Any, stream: Any = None) -> Callable[[Sequence[Order]], Any]:
    """What takes the orders of a call."""
    name = way.partition("-")[0]
    if name == "batch":
        in_batches: Callable[[Sequence[Order]], Any] = client.decide_batch
        return in_batches
    asked = {"call": client, "shared": shared, "stream": stream}[name]
    return lambda orders: asked.decide(orders[0])
