"""An event loop in virtual time, for tests."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps: when nothing is ready, its clock moves on to the next timer.

    A test that waits for something that nothing will bring fails at once instead of hanging.
    """

    def __init__(self) -> None:
        self.now = 1_000.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(  # a loop gives back a future, this one a done one
        self, _executor: object, function: Callable[..., T], *arguments: object
    ) -> asyncio.Future[T]:
        """Does at once what is given to a thread: threads know no virtual time."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "every task waits for something that nothing will bring"
            self._loop.now += timeout
        return ready


async def until(condition: Callable[[], bool]) -> None:
    """Lets virtual time pass until the condition holds; fails after an hour of it."""
    for _ in range(360_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition never held")
