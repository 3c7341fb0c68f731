"""One server process: what all of its parts are built with, and the background loops whose end is an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final

from feature_cache.ending import end
from server.decision.ids import Ids
from server.decision.metrics import DecisionMetrics
from server.machine import REAL, Machine
from server.process.slot import Slot, journal_path
from server.settings import Settings

_SPARE_SECONDS: Final = 10.0
"""What a process may take to end beyond what draining may take by the settings."""


class ComponentEndedError(Exception):
    """A component's loop ended while the server was running."""


@dataclass(frozen=True, slots=True)
class Process:
    """What every part of the server is built with."""

    shared: Settings
    """Settings of all processes of the server."""
    settings: Settings
    """Those of this process: with its own journal and metrics port where it is one of several."""
    slot: Slot | None
    """The place of this process; None when it is alone."""
    stack: AsyncExitStack
    """Ends the components when it is left, in reverse order."""
    stop: asyncio.Future[None]
    """Ends the server when it is done; an exception is the reason why it had to end."""
    instance_id: str
    metrics: DecisionMetrics
    machine: Machine
    """What it gets from the machine that it runs on."""
    new_id: Ids
    """Makes a unique, time-ordered id."""

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds, the event loop's own."""
        return self.machine.clock

    @property
    def uniform(self) -> Callable[[], float]:
        """Uniform in [0, 1)."""
        return self.machine.uniform

    async def background(self, work: Coroutine[None, None, None], name: str) -> None:
        """Runs a component's loop until the stack is left. One that ends by itself stops the server, which fails."""
        await self.stack.enter_async_context(_background(work, name, self.stop))


def this_process(
    shared: Settings, slot: Slot | None, stack: AsyncExitStack, stop: asyncio.Future[None], machine: Machine = REAL
) -> Process:
    """The process that runs this; the arguments are fields of `Process`."""
    new_id = Ids(machine.wall_clock_ns, machine.random_bytes)
    return Process(
        shared=shared,
        settings=shared if slot is None else settings_of(slot, shared),
        slot=slot,
        stack=stack,
        stop=stop,
        instance_id=f"{machine.process_name()}-{new_id()[:13]}",
        metrics=DecisionMetrics(),
        machine=machine,
        new_id=new_id,
    )


def settings_of(slot: Slot, shared: Settings) -> Settings:
    """The settings of the process in a slot: its own journal and its own metrics port."""
    journal = shared.journal.model_copy(update={"path": journal_path(shared.journal.path, slot.index)})
    port = shared.metrics.port and shared.metrics.port + slot.index
    metrics = shared.metrics.model_copy(update={"port": port})
    return shared.model_copy(update={"journal": journal, "metrics": metrics})


def seconds_to_end(settings: Settings) -> float:
    """How long a process may take to end after it was asked to drain."""
    return settings.grpc.drain_seconds + settings.grpc.grace_seconds + settings.shipping.drain_seconds + _SPARE_SECONDS


@contextlib.asynccontextmanager
async def _background(work: Coroutine[None, None, None], name: str, stop: asyncio.Future[None]) -> AsyncIterator[None]:
    """Runs a component's loop while the context is open. One that ends by itself stops the server, which then fails."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not stop.done():
            stop.set_exception(ComponentEndedError(f"{name} ended: {task.exception()!r}"))

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    try:
        yield
    finally:
        await end([task])
        with contextlib.suppress(asyncio.CancelledError):
            task.result()
