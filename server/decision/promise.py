"""What the caller of an order waits for: its decision, or why there is none.

It is used as an `asyncio.Future`, which costs several times as much: a future asks the event loop for a turn for each
of its callbacks, while orders that are decided together tell their callers in one turn (`Promises`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from server.decision.decided_block import OneDecided


CaseT = TypeVar("CaseT")


class Promises(Generic[CaseT]):
    """Tells callers in the next turn of the event loop, all those together whose promises end in this one.

    Args:
        ended: Called with them before their callers hear.
    """

    def __init__(self, ended: Callable[[Sequence[Promise[CaseT]]], None]) -> None:
        self._ended = ended
        self._telling: list[Promise[CaseT]] = []

    def tell(self, promise: Promise[CaseT]) -> None:
        """A promise has ended."""
        if not self._telling:
            asyncio.get_running_loop().call_soon(self._tell)
        self._telling.append(promise)

    def decided(self, promises: Sequence[Promise[CaseT]], decisions: Iterable[OneDecided]) -> None:
        """All of these have their decisions; none has ended before."""
        if not self._telling:
            asyncio.get_running_loop().call_soon(self._tell)
        self._telling += promises
        for promise, decided in zip(promises, decisions, strict=True):
            promise.end(decided)

    def _tell(self) -> None:
        told, self._telling = self._telling, []
        try:
            self._ended(told)
        finally:
            for promise in told:
                promise.tell()


class Promise(Generic[CaseT]):
    """The decision of one case, once it is there. One caller awaits it at most.

    Args:
        promises: Of those that end together with it.
        case: Set as soon as there is one, and gone when its caller was told: a decision leaves the collector no cycle.
    """

    __slots__ = ("_callbacks", "_outcome", "_waiter", "case", "promises")

    def __init__(self, promises: Promises[CaseT], case: CaseT | None = None) -> None:
        self.case = case
        self.promises = promises
        self._outcome: OneDecided | BaseException | None = None
        self._callbacks: tuple[Callable[[Any], object], ...] = ()
        self._waiter: asyncio.Future[None] | None = None

    def done(self) -> bool:
        """Whether it has ended."""
        return self._outcome is not None

    def cancelled(self) -> bool:
        """Whether nobody waits any more, and nobody has been answered."""
        return isinstance(self._outcome, asyncio.CancelledError)

    def result(self) -> OneDecided:
        """The decision; raises why there is none."""
        outcome = self._outcome
        if outcome is None:
            raise asyncio.InvalidStateError("not decided yet")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def exception(self) -> BaseException | None:
        """Why there is no decision; None when there is one."""
        outcome = self._outcome
        if outcome is None:
            raise asyncio.InvalidStateError("not decided yet")
        if isinstance(outcome, asyncio.CancelledError):
            raise outcome
        return outcome if isinstance(outcome, BaseException) else None

    def set_result(self, decided: OneDecided) -> None:
        """It was decided."""
        self._end_alone(decided)

    def set_exception(self, error: BaseException) -> None:
        """It gets no decision."""
        self._end_alone(error)

    def cancel(self) -> bool:
        """Nobody waits any more; False when it has ended before."""
        if self._outcome is not None:
            return False
        self._end_alone(asyncio.CancelledError())
        return True

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Has a function called with this when it has ended, never at once."""
        if self._outcome is None:
            self._callbacks += (callback,)
        else:
            asyncio.get_running_loop().call_soon(callback, self)

    def __await__(self) -> Generator[Any, None, OneDecided]:
        if self._outcome is None:
            self._waiter = asyncio.get_running_loop().create_future()
            yield from self._waiter
        return self.result()

    def _end_alone(self, outcome: OneDecided | BaseException) -> None:
        if self._outcome is None:  # else `end` says so
            self.promises.tell(self)
        self.end(outcome)

    def end(self, outcome: OneDecided | BaseException) -> None:
        """It has ended so, and whoever calls this has `Promises` tell of it."""
        if self._outcome is not None:
            raise asyncio.InvalidStateError("it has ended before")
        self._outcome = outcome
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)  # its task has a turn after `Promises` has

    def tell(self) -> None:
        """Calls what was to be called, and lets go of it."""
        callbacks, self._callbacks = self._callbacks, ()
        self.case = None
        for callback in callbacks:
            try:
                callback(self)
            except Exception as error:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"an error in {callback!r}, which is called with decisions", "exception": error}
                )
